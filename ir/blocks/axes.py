"""Where the channel axis of a value goes through an op that only moves whole channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ..nodes import argument, is_looked_through, same_shape
from .vocabulary import aten

_ALONG = (
    aten.slice.Tensor,
    aten.narrow.default,
    aten.index_select.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.roll.default,
)
"""Ops that choose, repeat or reorder places along their `dim` or `dims` and keep all axes."""


def kept_axis(node: fx.Node, axis: int) -> int | None:
    """The axis (from 0) of the result that holds the channels counted along `axis` of the first operand, whole and in order; None if none does.

    A result may hold fewer or more tokens than the operand, but nothing else: padding, which brings in zeros, is no such op.
    """
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    target: Any = node.target
    if is_looked_through(node) or target in (aten.clone.default, aten.contiguous.default):
        return axis if before.dim() == after.dim() else None
    if target is aten.reshape.default:
        if axis == before.dim() - 1 and same_shape(before.shape[-1:], after.shape[-1:]):
            return after.dim() - 1
        return axis if after.dim() > axis and same_shape(before.shape[: axis + 1], after.shape[: axis + 1]) else None
    if target is aten.permute.default:
        return [d % before.dim() for d in argument(node, "dims")].index(axis)
    if target is aten.unsqueeze.default:
        return axis + (argument(node, "dim") % after.dim() <= axis)
    if target in (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        return _squeezed(node, before, axis)
    if target is aten.expand.default:
        behind = axis + after.dim() - before.dim()
        return behind if same_shape(before.shape[axis : axis + 1], after.shape[behind : behind + 1]) else None
    if target is aten.select.int:
        dim = argument(node, "dim") % before.dim()
        return None if dim == axis else axis - (dim < axis)
    if target is aten.index.Tensor:  # the last axis stays last while others are picked from
        return after.dim() - 1 if axis == before.dim() - 1 and len(argument(node, "indices")) <= axis else None
    if target in _ALONG:
        dims: Any = argument(node, "dims" if target in (aten.flip.default, aten.roll.default) else "dim")
        dims = dims if isinstance(dims, list | tuple) else [dims]
        return axis if len(dims) and None not in dims and all(d % before.dim() != axis for d in dims) else None
    return None


def _squeezed(node: fx.Node, before: Tensor, axis: int) -> int | None:
    dims: Any = range(before.dim()) if node.target is aten.squeeze.default else argument(node, "dim")
    gone = [d % before.dim() for d in (dims if isinstance(dims, list | tuple | range) else [dims])]
    gone = [d for d in gone if isinstance(before.shape[d], int) and before.shape[d] == 1]
    return None if axis in gone else axis - sum(d < axis for d in gone)


def source_axis(node: fx.Node, axis: int, forward: Callable[[fx.Node, int], int | None] = kept_axis) -> int | None:
    """The axis of the first operand (of each, for a list of them) whose channels the result counts along `axis`: the inverse of `forward`."""
    source: Any = node.args[0] if node.args else None
    if isinstance(source, list | tuple):
        source = next(iter(source), None)
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return next((a for a in range(value.dim()) if forward(node, a) == axis), None) if isinstance(value, Tensor) else None
