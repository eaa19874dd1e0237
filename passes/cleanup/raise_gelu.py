"""x/2 (1 + erf(x/sqrt2)) -> gelu(x);  x/2 (1 + tanh(...)) -> gelu(x, "tanh");  x sigmoid(1.702 x) -> quick_gelu(x)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ...ir.nodes import same_shape
from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite

aten = torch.ops.aten


class RaiseGELU(Rewrite):
    """One node for every spelling of GELU (Hendrycks & Gimpel 2016).

    1. erf form, each grouping of x * 0.5 * (1 + erf(x / sqrt 2))              (BERT before torch.nn.GELU, ONNX files)
    2. tanh form, x^3 by pow or products, or x (1 + 0.044715 x^2)             (GPT-2, BLOOM, gelu_fast)
    3. x * sigmoid(1.702 x)                                                   (CLIP)
    In half precision the one node rounds once where the original rounded at each step.
    Declines when a constant promotes or broadcasts x.
    """

    name = "raise-gelu"

    def pattern(self, op: Any, x: Any) -> Any:
        erf = op.erf(op.either(op.div(x, math.sqrt(2)), op.mul(x, math.sqrt(0.5))))
        square = op.either(op.pow(x, 2), op.mul(x, x))
        cube = op.either(op.pow(x, 3), op.mul(square, x))
        scaled_cube = op.either(op.mul(cube, 0.044715), op.mul(op.mul(op.mul(x, 0.044715), x), x), op.mul(op.mul(square, 0.044715), x))
        scaled_square = op.either(op.mul(square, 0.044715), op.mul(op.mul(x, 0.044715), x))
        c = math.sqrt(2 / math.pi)
        bracket = op.add(scaled_square, 1.0)
        inner = op.either(
            op.mul(op.add(x, scaled_cube), c),
            op.mul(op.mul(x, c), bracket),
            op.mul(op.mul(x, bracket), c),
        )
        gate = op.add(op.either(erf, op.tanh(inner)), 1.0)  # 1, 2
        half = op.either(op.mul(x, 0.5), op.div(x, 2.0))
        return op.either(
            op.mul(half, gate),
            op.mul(x, op.either(op.mul(gate, 0.5), op.div(gate, 2.0))),
            op.mul(op.mul(x, gate), 0.5),
            op.div(op.mul(x, gate), 2.0),
            op.mul(x, op.sigmoid(op.mul(x, 1.702))),  # 3
        )

    def why_not(self, m: Match) -> str | None:
        return constants_change(m.x, m.anchor)

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        targets = {n.target for n in m.nodes}
        if aten.sigmoid.default in targets:
            return op.quick_gelu(m.x)
        return op.gelu(m.x) if aten.erf.default in targets else op.gelu(m.x, approximate="tanh")


def constants_change(x: fx.Node, y: fx.Node) -> str | None:
    """Why y, made of x and numbers, is not like x: a constant tensor widened its dtype or shape."""
    before, after = x.meta["val"], y.meta["val"]
    if before.dtype != after.dtype:
        return f"a constant promotes {before.dtype} to {after.dtype}"
    if not same_shape(before.shape, after.shape):
        return f"a constant broadcasts {list(before.shape)} to {list(after.shape)}"
    return None
