"""Activation edges: a value, all linears that read it, what else does, and which weights upstream can take a factor or a shift of its channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import is_size, op_name
from ..graph import Graph
from ..nodes import argument, is_looked_through
from .absorbers import WRITTEN_OUT, Absorber, absorbers
from .axes import kept_axis, source_axis
from .channel_constants import why_not_edited
from .vocabulary import ACTIVATIONS, CONVOLUTIONS, MOVES, aten, input_axis, is_norm, is_projection, ours, path_of, reads, without_floats

SITES = ("norm-linear", "value-output", "up-down", "linear-relu-linear", "hidden", "other")
"""What an edge's value comes from: a norm; attention; a gate's product; a linear, convolution or embedding, perhaps behind a ReLU or
pooling; another activation; something else."""
_HOMOGENEOUS = ("relu", "leaky_relu", "abs", "mean", "amax")
_FAR = 64


@dataclass(frozen=True)
class Fork:
    """A place an edge's value is read at: itself, or behind ops that move whole channels. axis: its channels (from 0)."""

    value: fx.Node
    axis: int
    to_linears: tuple[fx.Node, ...]
    """Readers that lead to linears only."""
    to_others: tuple[fx.Node, ...]
    """Readers that lead to none."""


@dataclass(frozen=True)
class Edge:
    """A value X with channels along `axis` (from 0) and all `linears` (convolutions, experts) that read it through casts and moves of whole channels.

    others: what else reads it, the output of the model included.
    site: one of SITES.
    fixed: why its linears can't be edited at all, or None.   no_shift: why their biases can't take a shift, or None.
    scale_into, shift_into: who upstream takes a factor or a shift of its channels, or why nobody can.
    """

    value: fx.Node
    axis: int
    linears: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    forks: tuple[Fork, ...]
    site: str
    fixed: str | None
    no_shift: str | None
    scale_into: tuple[Absorber, ...] | str
    shift_into: tuple[Absorber, ...] | str

    @property
    def width(self) -> int:
        """The number of channels."""
        return int(self.value.meta["val"].shape[self.axis])

    @cached_property
    def ties(self) -> Tensor:
        """int64 [width]: channels with the same number come from the same channel upstream (query heads that share a value head)."""
        classes = torch.arange(self.width)
        for found in (a for into in (self.scale_into, self.shift_into) if not isinstance(into, str) for a in into):
            classes = _joined(classes, found.index)
        return classes.unique(return_inverse=True)[1]


def edges(graph: Graph) -> list[Edge]:
    """Every computed value that a linear, convolution or layer of experts with stored weights reads, in graph order. Time linear in nodes."""
    found, seen = [], set()
    for node in graph.nodes:
        if node in seen or not _is_consumer(node) or not _has_channels(reads(node), _input_axis(node)):
            continue
        value, axis = _root(reads(node), _input_axis(node))
        edge = _edge(graph, value, axis)
        seen.update(edge.linears)
        seen.add(node)
        if value.op == "call_function":
            found.append(edge)
    return found


def _edge(graph: Graph, value: fx.Node, axis: int) -> Edge:
    forks: list[Fork] = []
    linears, others = _readers(value, axis, forks)
    while len(value.users) == 1 and not linears.keys() & value.users.keys():  # statistics are of what the linears read: a pooled token, not all
        (value,), axis = value.users, kept_axis(next(iter(value.users)), axis) or 0
        forks = []
        linears, others = _readers(value, axis, forks)
    linears = tuple(sorted(linears))
    return Edge(
        value=value,
        axis=axis,
        linears=linears,
        others=tuple(sorted(others)),
        forks=tuple(forks),
        site=_site(graph, value),
        fixed=next((why for n in linears if (why := _why_fixed(n))), None),
        no_shift=next((why for n in linears if (why := _why_no_shift(n))), None),
        scale_into=absorbers(graph, value, axis, "scale"),
        shift_into=absorbers(graph, value, axis, "shift"),
    )


def _is_consumer(node: fx.Node) -> bool:
    return is_projection(node) or node.target in CONVOLUTIONS and argument(node, "groups") == 1


def _input_axis(node: fx.Node) -> int:
    return input_axis(node) % reads(node).meta["val"].dim()


def _has_channels(value: Any, axis: int) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr" and isinstance(value.meta["val"].shape[axis], int)


def _root(value: fx.Node, axis: int) -> tuple[fx.Node, int]:
    """Up through what moves whole channels, so that all readers of one value are found together."""
    for _ in range(_FAR):
        above = source_axis(value, axis) if value.op == "call_function" else None
        if above is None:
            break
        value, axis = value.args[0], above  # type: ignore[assignment]
    return value, axis


def _readers(value: fx.Node, axis: int, forks: list[Fork]) -> tuple[dict[fx.Node, None], dict[fx.Node, None]]:
    """(linears, others) at the ends of all ways down from a value; the places they part at are added to `forks`."""
    linears: dict[fx.Node, None] = {}
    others: dict[fx.Node, None] = {}
    to_linears, to_others = [], []
    for user in value.users:
        if is_size(user):
            continue
        if _is_consumer(user) and reads(user) is value and _input_axis(user) == axis:
            linears[user] = None
            to_linears.append(user)
            continue
        below = kept_axis(user, axis) if user.args and user.args[0] is value else None
        if below is None:
            others[user] = None
            to_others.append(user)
            continue
        deeper: list[Fork] = []
        some, rest = _readers(user, below, deeper)
        linears.update(some)
        others.update(rest)
        if some and rest:
            forks += deeper
        else:
            (to_linears if some else to_others).append(user)
    if to_linears or to_others:
        forks.append(Fork(value, axis, tuple(to_linears), tuple(to_others)))
    return linears, others


def _site(graph: Graph, value: fx.Node) -> str:
    """What kind of thing makes a value: up through moves and constants to the first node that is more."""
    node: Any = value
    for _ in range(_FAR):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return "other"
        if is_norm(node) or "batch_norm" in op_name(node):
            return "norm-linear"
        if node.target in (ours.attention.default, ours.multi_head_attention.default) or op_name(node) in WRITTEN_OUT:
            return "value-output"
        if is_projection(node) or node.target in CONVOLUTIONS or node.target is aten.embedding.default:
            return "linear-relu-linear"
        if node.target in ACTIVATIONS and op_name(node) not in _HOMOGENEOUS:
            return "hidden"
        if op_name(node) in ("mul", "add", "sub", "div"):
            computed = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr" and isinstance(a.meta.get("val"), Tensor)]
            if len(computed) == 2:
                return "up-down" if op_name(node) == "mul" else "other"
            node = computed[0] if computed else None
        elif node.target in MOVES or is_looked_through(node) or node.target is operator.getitem or op_name(node) in _HOMOGENEOUS or "pool" in op_name(node):
            node = node.args[0]
        else:
            return "other"
    return "other"


def _why_fixed(node: fx.Node) -> str | None:
    """Why the input columns of a layer can't be changed."""
    if node.target is aten.linear.default or node.target in CONVOLUTIONS or node.target is ours.grouped_linear.default:
        return why_not_edited(node.args[1], node)
    return without_floats(node)


def _why_no_shift(node: fx.Node) -> str | None:
    """Why what a shift of its input adds to a layer's output can't be put into its bias."""
    if node.target is ours.grouped_linear.default:
        return f"the experts of {path_of(node)} have no bias that could give a shift back"
    if node.target in CONVOLUTIONS:
        padding = argument(node, "padding")
        if padding not in ("valid",) and (isinstance(padding, str) or any(padding)):
            return f"{path_of(node)} pads its input with zeros, and a shift moves what zero means"
    if node.target is aten.linear.default or node.target in CONVOLUTIONS:
        bias = argument(node, "bias")
        if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
            return f"the bias of {path_of(node)} is computed, not stored"
    return None


def _joined(classes: Tensor, index: Tensor) -> Tensor:
    """Two partitions joined: channels are one class if either puts them into one."""
    while True:
        lowest = torch.full((int(index.max()) + 1,), len(classes)).scatter_reduce(0, index, classes, "amin")
        joined = torch.minimum(classes, lowest[index])
        joined = joined[joined]  # a class goes where its first member goes
        if torch.equal(joined, classes):
            return classes
        classes = joined
