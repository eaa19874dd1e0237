"""The rounding of BitNet's inputs as it stands around a linear: round(x (127 / max(|x|, 1e-5))), and where the product is scaled back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.evaluate import op_name
from ...ir.graph import Graph
from ...ir.nodes import CASTS, argument, same_shape
from ...ir.ops.ternary_linear import LEAST
from ...ir.pattern import Match, Pattern

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """A linear with what belongs to it.

    x: what goes in, before any rounding. activations: ternary_linear's. out: the node whose value the new call gives.
    factor, divisor: weights that the product without its bias is multiplied with or divided by on the way to `out`.
    """

    x: fx.Node
    activations: str
    out: fx.Node
    factor: fx.Node | None = None
    divisor: fx.Node | None = None


def place(graph: Graph, linear: fx.Node) -> Place:
    """Where a linear begins and ends, by the forms that training code and transformers' integrations/bitnet.py have.

    1. linear(codes as floats, w) / (s c): integers go in, one division scales them back (transformers' BitLinear)
    2. linear(codes / s, w): values on the grid go in (AutoBitLinear, MatMul-free LM)
    3. linear(x + (codes / s - x), w): the straight-through form of 2
    4. linear(x, w): x goes in as it is; so does what is rounded in another way, and the rounding stays
    With 2 to 4, a linear without a bias takes in a product or quotient with a constant behind it.
    """
    value: Any = linear.args[0]
    reader = next(iter(linear.users)) if len(linear.users) == 1 else None
    for pattern in _INTEGER if reader is not None else ():  # 1
        m = pattern.match(graph, reader)  # type: ignore[arg-type]
        if isinstance(m, Match) and (x := _source(m, reader)) is not None:  # type: ignore[arg-type]
            return Place(x, "int8-token", m.anchor, divisor=m.values.get("c"))
    x = next((x for p in _GRID if isinstance(m := p.match(graph, _uncast(value)), Match) and (x := _source(m, value)) is not None), None)  # 2, 3
    by = _constant(graph, linear, reader)
    out, activations = linear if by is None else reader, "none" if x is None else "int8-token"
    assert out is not None
    multiplies = by is not None and out.target is aten.mul.Tensor
    return Place(value if x is None else x, activations, out, by if multiplies else None, None if multiplies else by)


def rounds(value: fx.Node, within: int = 4) -> bool:
    """Whether a value comes out of a rounding a few element-wise calls before: one that `place` left where it is."""
    if value.op != "call_function" or not within:
        return False
    return value.target is aten.round.default or op_name(value) in BETWEEN and any(rounds(n, within - 1) for n in value.all_input_nodes)


BETWEEN = ("add", "sub", "mul", "div", "clamp", "_to_copy", "to")
"""What stands between a rounding and the product that reads it."""


def _codes(op: Any, x: Any, axis: Any) -> tuple[Any, Any]:
    """The codes, and what x was multiplied by."""
    size = op.abs(x)
    largest = op.either(op.max(size, axis, True)[0], op.amax(size, axis, True))
    inverse = op.mul(op.reciprocal(op.either(op.clamp(largest, LEAST), op.clamp_min(largest, LEAST))), 127)
    return op.clamp(op.round(op.mul(x, inverse)), -128, 127), inverse


def _integer(op: Any, x: Any, axis: Any, w: Any, c: Any) -> Any:
    codes, inverse = _codes(op, x, axis)
    return op.div(op.linear(op.maybe_cast(op.maybe_cast(codes)), w), op.mul(op.weight(c), inverse))


def _integer_alone(op: Any, x: Any, axis: Any, w: Any) -> Any:
    codes, inverse = _codes(op, x, axis)
    return op.div(op.linear(op.maybe_cast(op.maybe_cast(codes)), w), inverse)


def _values(op: Any, x: Any, axis: Any) -> Any:
    codes, inverse = _codes(op, x, axis)
    return op.div(codes, inverse)


def _straight_through(op: Any, x: Any, axis: Any, y: Any) -> Any:
    return op.add(y, op.sub(op.maybe_cast(_values(op, x, axis)), y))  # whatever y is


_INTEGER = (Pattern(_integer), Pattern(_integer_alone))
_GRID = (Pattern(_values), Pattern(_straight_through))


def _source(m: Match, result: fx.Node) -> fx.Node | None:
    """What is rounded, in the dtype of the result; None where that happens along another axis or in half precision."""
    axis = m.axis if isinstance(m.axis, list | tuple) else [m.axis]
    if [a % m.x.meta["val"].dim() for a in axis] != [m.x.meta["val"].dim() - 1] or m.x.meta["val"].dtype.itemsize < 4:
        return None
    x = _uncast(m.x) if result.meta["val"].dtype.itemsize < 4 else m.x
    return x if x.meta["val"].dtype == result.meta["val"].dtype else None


def _uncast(node: fx.Node) -> Any:
    return node.args[0] if node.op == "call_function" and node.target in CASTS else node


def _constant(graph: Graph, linear: fx.Node, reader: fx.Node | None) -> fx.Node | None:
    """The weight, one number or one a channel, that a linear's only reader multiplies it with or divides it by."""
    if reader is None or argument(linear, "bias") is not None or reader.target not in (aten.mul.Tensor, aten.div.Tensor) or reader.kwargs:
        return None
    a, b = reader.args[:2]
    by = b if a is linear else a
    if not graph.is_weight(by) or reader.target is aten.div.Tensor and by is a:
        return None
    assert isinstance(by, fx.Node)
    val, out = by.meta["val"], linear.meta["val"]
    one_a_channel = val.dim() == 1 and same_shape(val.shape, out.shape[-1:])
    fits = (val.numel() == 1 or one_a_channel) and val.is_floating_point() and same_shape(reader.meta["val"].shape, out.shape)
    return by if fits and reader.meta["val"].dtype == out.dtype else None
