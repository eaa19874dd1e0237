"""Ops that treat every channel alike: moves of whole channels, and sums, means, padding and concatenation of tokens. x Q passes all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.blocks.axes import kept_axis
from ...ir.nodes import argument

aten = torch.ops.aten

_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)


def axis_after(node: fx.Node, axis: int) -> int | None:
    """The axis (from 0) of the result that holds the channels counted along `axis` of the first operand; None if it does not treat them alike."""
    source: Any = node.args[0] if node.args else None
    if node.op == "call_function" and node.target is aten.cat.default:
        return None if argument(node, "dim") % node.meta["val"].dim() == axis else axis
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        dims = {d % source.meta["val"].dim() for d in argument(node, "dim") or [axis]}
        return None if axis in dims else axis if argument(node, "keepdim") else axis - sum(d < axis for d in dims)
    if node.target in _POOLS:
        return axis if axis < source.meta["val"].dim() - len(argument(node, "output_size")) else None
    if node.target is aten.pad.default:
        return axis if argument(node, "value") in (None, 0) and axis not in _padded(node) else None
    return kept_axis(node, axis)


def keeps_constants(node: fx.Node) -> bool:
    """Whether a constant added to all tokens before may be added after instead: not past zeros, not past a sum."""
    return not (node.target is aten.sum.dim_IntList or node.target is aten.pad.default and _padded(node))


def _padded(node: fx.Node) -> set[int]:
    rank = node.meta["val"].dim()
    return {rank - 1 - i // 2 for i, amount in enumerate(argument(node, "pad")) if amount != 0}
