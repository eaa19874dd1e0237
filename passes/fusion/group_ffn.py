"""linear(act(linear(x, w1)), w2) -> sum over groups of hidden channels: a hidden layer that fits the cache, quantized group by group."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.cost import op_name
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from .group_heads import why_not_on

aten = torch.ops.aten

ELEMENTWISE = ("gelu", "relu", "silu", "quick_gelu", "sigmoid", "tanh")


@dataclass(frozen=True)
class GroupFFN(GraphPass):
    """Work on a part of a feed-forward layer's hidden channels at a time.

    Before:  y = linear(act(linear(x, w1, b1)), w2, b2)
    After:   y = sum over i of linear(act(linear(x, w1[rows i], b1[rows i])), w2[:, columns i]), b2 added once
    The hidden layer of one group stays in the cache, and each group's activations get an 8-bit range of their own.
    Declines targets other than CPUs, a hidden layer that something else reads, computed weights, and widths that `groups` does not divide.
    """

    groups: int = 2
    """Equal groups of the hidden channels behind the first `outliers`."""
    outliers: int = 0
    """This many leading channels make a group of their own: after sort-channels those with the largest activations."""

    name = "group-ffn"
    exact = True  # the same products, added in another order: within fp tolerance

    def run(self, graph: Graph, context: Context) -> Graph:
        for down in graph.find(aten.linear.default):
            act: Any = down.args[0]
            up = act.args[0] if isinstance(act, fx.Node) and act.op == "call_function" and op_name(act) in ELEMENTWISE else None
            if not isinstance(up, fx.Node) or up.target is not aten.linear.default:
                continue
            if why := why_not_on(context.target) or _why_not(graph, up, act, down, self.outliers, self.groups):
                context.decline(down, why)
            else:
                context.apply(down)
                _split(graph, up, act, down, self.outliers, self.groups)
        return graph


def _why_not(graph: Graph, up: fx.Node, act: fx.Node, down: fx.Node, outliers: int, groups: int) -> str | None:
    for node, reader in ((up, act), (act, down)):
        if any(user is not reader for user in node.users):
            return f"{node.name} is also read by {next(u.name for u in node.users if u is not reader)}"
    if not graph.is_weight(up.args[1]) or not graph.is_weight(down.args[1]):
        return "its weights are computed, not stored"
    width = int(up.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    if outliers >= width or (width - outliers) % groups:
        return f"its {width} hidden channels do not divide into {f'{outliers} and ' if outliers else ''}{groups} groups"
    return None


def _split(graph: Graph, up: fx.Node, act: fx.Node, down: fx.Node, outliers: int, groups: int) -> None:
    w1: Any = up.args[1]
    w2: Any = down.args[1]
    b1, b2 = argument(up, "bias"), argument(down, "bias")
    width = int(w1.meta["val"].shape[0])
    starts = [*([0] if outliers else []), *range(outliers, width, (width - outliers) // groups), width]
    total = None
    for i, (start, stop) in enumerate(pairwise(starts)):
        rows, columns = _Slice(0, start, stop), _Slice(1, start, stop)
        wide = graph.add_weight(f"{w1.target}_group{i}", rows, str(w1.target), like=up)
        offset = None if b1 is None else graph.add_weight(f"{b1.target}_group{i}", rows, str(b1.target), like=up)
        narrow = graph.add_weight(f"{w2.target}_group{i}", columns, str(w2.target), like=down)
        hidden = graph.insert(aten.linear.default, up.args[0], wide, offset, before=down, like=up)
        hidden = graph.insert(act.target, hidden, *act.args[1:], before=down, like=act, **act.kwargs)
        part = graph.insert(aten.linear.default, hidden, narrow, b2 if i == 0 else None, before=down)
        total = part if total is None else graph.insert(aten.add.Tensor, total, part, before=down)
    assert total is not None
    down.replace_all_uses_with(total, propagate_meta=False)
    for node in (down, act, up):
        graph.fx.erase_node(node)


@dataclass(frozen=True)
class _Slice:
    axis: int
    start: int
    stop: int

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.narrow(self.axis, self.start, self.stop - self.start).clone()
