"""(x - mean) / sqrt(var + eps) * w + b -> layer_norm(x, [d], w, b, eps)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import number, same_shape
from ...ir.pattern import Match
from ..rewrite import Builder, Context, GraphPass, Rewrite

aten = torch.ops.aten


class RaiseLayerNorm(GraphPass):
    """One node for LayerNorm (Ba et al. 2016) that a model or an ONNX file spells out, with or without scale and shift.

    1. the normalisation: the variance as mean of squares or by var(), the root as rsqrt, 1/sqrt or division by sqrt
    2. a scale by a vector weight    3. a shift by a vector weight
    Declines another axis than the last, and half precision: there each step of the original rounds, layer_norm once.
    """

    name = "raise-layer-norm"

    def run(self, graph: Graph, context: Context) -> Graph:
        for step in (_Normalise(), _Scale(), _Shift()):
            step.run(graph, context)
        return graph


class _Normalise(Rewrite):  # 1
    name = "raise-layer-norm"

    def pattern(self, op: Any, x: Any, axes: Any, eps: Any) -> Any:
        mean = op.mean(x, axes, True)
        centred = op.sub(x, mean)
        squares = op.mean(op.either(op.pow(centred, 2), op.mul(centred, centred), op.square(centred)), axes, True)
        variance = op.either(squares, op.var(x, axes, correction=0, keepdim=True), op.var(x, axes, False, True))
        shifted = op.add(variance, eps)
        root = op.either(op.sqrt(shifted), op.pow(shifted, 0.5))
        inverse = op.either(op.rsqrt(shifted), op.reciprocal(root), op.pow(shifted, -0.5), op.div(1.0, root))
        return op.either(op.mul(centred, inverse), op.div(centred, root))

    def why_not(self, m: Match) -> str | None:
        val = m.x.meta["val"]
        axes = m.axes if isinstance(m.axes, list | tuple) else [m.axes]
        if [a % val.dim() for a in axes] != [val.dim() - 1]:
            return f"it normalises axes {list(axes)}, layer_norm the last one"
        if val.dtype in (torch.float16, torch.bfloat16):
            return f"each step rounds to {val.dtype}, layer_norm rounds once"
        if number(m.graph, m.eps) is None:
            return "eps is not a number"
        return None

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.layer_norm(m.x, [m.x.meta["val"].shape[-1]], None, None, number(m.graph, m.eps))


class _Scale(Rewrite):  # 2
    name = "raise-layer-norm"

    def pattern(self, op: Any, x: Any, shape: Any, eps: Any, fast: Any, w: Any) -> Any:
        return op.mul(op.layer_norm(x, shape, None, None, eps, fast), op.weight(w))

    def why_not(self, m: Match) -> str | None:
        return _no_vector(m, m.w, "scale")

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.layer_norm(m.x, m.shape, m.w, None, m.eps)


class _Shift(Rewrite):  # 3
    name = "raise-layer-norm"

    def pattern(self, op: Any, x: Any, shape: Any, w: Any, eps: Any, fast: Any, b: Any) -> Any:
        return op.add(op.layer_norm(x, shape, w, None, eps, fast), op.weight(b))

    def why_not(self, m: Match) -> str | None:
        return _no_vector(m, m.b, "shift")

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.layer_norm(m.x, m.shape, m.w, m.b, m.eps)


def _no_vector(m: Match, v: Any, what: str) -> str | None:
    if not same_shape(v.meta["val"].shape, m.shape):
        return f"the {what} is of shape {list(v.meta['val'].shape)}, not {list(m.shape)}"
    if v.meta["val"].dtype != m.x.meta["val"].dtype:
        return f"the {what} is {v.meta['val'].dtype}, x is {m.x.meta['val'].dtype}"
    if m.x.meta["val"].dtype in (torch.float16, torch.bfloat16):
        return f"the {what} rounds on its own in {m.x.meta['val'].dtype}"
    return None
