"""w * (x * rsqrt(mean(x^2) + eps)) -> rms_norm(x, w, eps)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import argument, is_looked_through, number, same_shape
from ...ir.pattern import Match
from ..rewrite import Builder, Context, GraphPass, Rewrite

aten = torch.ops.aten


class RaiseRMSNorm(GraphPass):
    """One node for RMSNorm (Zhang & Sennrich 2019): Llama, T5, Qwen's head norms, Gemma (its 1 + w is folded before), aten.rms_norm.

    Keeps the rounding. A model that rounds to half precision before the weight (Llama, T5) becomes rms_norm of the half
    tensor; one that rounds after it (Gemma) becomes rms_norm of the float32 tensor, with its casts left around it.
    Declines a mean taken in half precision, a scale that is not a vector weight, and another axis than the last.
    """

    name = "raise-rms-norm"

    def run(self, graph: Graph, context: Context) -> Graph:
        _FromParts().run(graph, context)
        for node in graph.find(aten.rms_norm.default):
            _from_aten(graph, node, context)
        return graph


class _FromParts(Rewrite):
    name = "raise-rms-norm"

    def pattern(self, op: Any, x: Any, y: Any, w: Any, axes: Any, eps: Any) -> Any:
        shifted = op.add(op.mean(op.either(op.pow(y, 2), op.mul(y, y), op.square(y)), axes, True), eps)
        root = op.either(op.sqrt(shifted), op.pow(shifted, 0.5))
        inverse = op.either(op.rsqrt(shifted), op.pow(shifted, -0.5), op.reciprocal(root), op.div(1.0, root))
        return op.mul(w, op.maybe_cast(op.either(op.mul(x, inverse), op.div(x, root))))

    def why_not(self, m: Match) -> str | None:
        if not isinstance(m.x, fx.Node):
            return f"the root is divided into {m.x}, not into a tensor"
        x, y = m.x.meta["val"], m.y.meta["val"]
        axes = m.axes if isinstance(m.axes, list | tuple) else [m.axes]
        if _uncast(m.x) is not _uncast(m.y):
            return f"the mean is of {m.y.name}, the product of {m.x.name}"
        if [a % x.dim() for a in axes] != [x.dim() - 1]:
            return f"the mean is over axes {list(axes)}, rms_norm's over the last one"
        if not m.graph.is_weight(m.w):
            return f"the scale {m.w.name if isinstance(m.w, fx.Node) else m.w} is not a weight"
        if not same_shape(m.w.meta["val"].shape, x.shape[-1:]):
            return f"the scale is of shape {list(m.w.meta['val'].shape)}, not {list(x.shape[-1:])}"
        if y.dtype != torch.float32:
            return f"the mean is taken in {y.dtype}, rms_norm takes it in float32"
        if number(m.graph, m.eps) is None:
            return "eps is not a number"
        if _source(m) is None:
            return f"it rounds to {_scaled(m).meta['val'].dtype} before the weight, but x is {_uncast(m.x).meta['val'].dtype}"
        return None

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.rms_norm(_source(m), m.w, number(m.graph, m.eps))


def _scaled(m: Match) -> fx.Node:
    """What the weight multiplies: the normalised value, rounded or not."""
    a, b = m.anchor.args[:2]
    return b if a is m.w else a  # type: ignore[return-value]


def _source(m: Match) -> fx.Node | None:
    """The x whose dtype is what the weight multiplies: then rms_norm rounds where the original did."""
    return next((x for x in (_uncast(m.x), m.y) if x.meta["val"].dtype == _scaled(m).meta["val"].dtype), None)


def _uncast(node: fx.Node) -> fx.Node:
    """The half-precision value behind a cast to float32, which loses nothing; else the node itself."""
    source = node.args[0] if is_looked_through(node) else None
    if isinstance(source, fx.Node) and source.meta["val"].dtype in (torch.float16, torch.bfloat16):
        return source
    return node


def _from_aten(graph: Graph, node: fx.Node, context: Context) -> None:
    x, w, eps = node.args[0], argument(node, "weight"), argument(node, "eps")
    assert isinstance(x, fx.Node)
    if w is None or len(argument(node, "normalized_shape")) != 1:
        return context.decline(node, "it has no weight" if w is None else "it normalises several axes")
    if x.meta["val"].dtype != torch.float32:
        return context.decline(node, f"aten.rms_norm applies the weight before it rounds to {x.meta['val'].dtype}")
    context.apply(node)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    node.replace_all_uses_with(Builder(graph, node, node).rms_norm(x, w, eps), propagate_meta=False)
    graph.fx.erase_node(node)
