"""Reading one node: its arguments by name, numbers behind constants, and whether it changes its input at all."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from .graph import Graph

aten = torch.ops.aten


@cache
def schema(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    """(name, has a default, default) of every argument of an op."""
    return tuple((a.name, a.has_default_value(), a.default_value) for a in target._schema.arguments)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults filled in; positions for plain Python functions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)}
    given = {}
    for i, (name, _, default) in enumerate(schema(node.target)):
        given[name] = node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    return given


def argument(node: fx.Node, name: str) -> Any:
    """One argument of a call by its schema name."""
    return arguments(node)[name]


def number(graph: Graph, value: Any) -> float | int | bool | None:
    """A Python number, or the one number in a constant of the graph that has data; else None."""
    if isinstance(value, bool | int | float):
        return value
    while isinstance(value, fx.Node) and value.op == "call_function" and (source := no_op_source(value)) is not None:
        value = source
    if graph.is_weight(value):
        tensor = graph.weight(value)
        return tensor.item() if tensor.numel() == 1 and not tensor.is_meta else None
    return None


def same_shape(a: Any, b: Any) -> bool:
    """Whether two (possibly symbolic) shapes are known to be equal."""
    return len(a) == len(b) and all(_same_size(x, y) for x, y in zip(a, b))


def _same_size(x: Any, y: Any) -> bool:
    if isinstance(x, torch.SymInt) or isinstance(y, torch.SymInt):
        x, y = (v.node.expr if isinstance(v, torch.SymInt) else v for v in (x, y))
    return bool(x == y)


def set_argument(call: fx.Node, name: str, value: Any) -> None:
    """Give a call another operand, by the name in its schema; arguments left out before it get their defaults."""
    names = [s[0] for s in schema(call.target)]
    place = names.index(name)
    if place < len(call.args):
        call.update_arg(place, value)
    else:
        call.update_kwarg(name, value)


def no_op_source(node: fx.Node) -> fx.Node | None:
    """The value a node merely passes on (same-dtype copy, alias, full slice, reshape to its own shape), or None."""
    target = node.target
    if target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default, aten.contiguous.default):
        return node.args[0]  # type: ignore[return-value]
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or not isinstance(before := source.meta.get("val"), torch.Tensor) or not isinstance(after := node.meta.get("val"), torch.Tensor):
        return None
    if target in CASTS and before.dtype == after.dtype and before.device == after.device:
        return source
    if target is aten.dropout.default and not argument(node, "train"):
        return source
    if target in _MAY_KEEP_SHAPE and same_shape(before.shape, after.shape):
        if target is aten.slice.Tensor and argument(node, "step") != 1:
            return None
        return source
    if target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] == 1 and not node.kwargs and before.dtype == after.dtype:
        return source
    if target is aten.add.Tensor and node.args[1] == 0 and type(node.args[1]) is int and before.dtype == after.dtype and not after.is_floating_point():
        return source  # -0.0 + 0 is 0.0: not for floats
    if target is aten.permute.default and list(argument(node, "dims")) == list(range(before.dim())):
        return source
    return None


def is_looked_through(node: fx.Node) -> bool:
    """Whether the matcher may see past this node: a no-op or a dtype conversion."""
    return node.target in CASTS or no_op_source(node) is not None


CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default)
_MAY_KEEP_SHAPE = (
    aten.slice.Tensor,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
)
