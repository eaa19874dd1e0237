"""The residual stream: values joined by additions, what is added in, and who reads them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph
from ..nodes import is_looked_through
from .vocabulary import CHANNEL_NORMS, CONVOLUTIONS, FUSED_NORMS, LAST_AXIS_NORMS, LAYOUT, is_norm, is_normed, is_projection, is_sum, norm_output

aten = torch.ops.aten
_FAR = 12


@dataclass(frozen=True)
class Writer:
    """What one addition brings in."""

    value: fx.Node
    """The value that is added."""
    node: fx.Node
    """What makes it: a projection behind norms, scales and layout ops, else `value` itself."""
    through: tuple[fx.Node, ...] = ()
    """Norms, LayerScales and gates between the two."""


@dataclass(frozen=True)
class Stream:
    """Sums of one width. `sources` start it, `writers` add to it, `norms` read it; `bypasses` read it without a norm; `last` is its final sum."""

    width: int
    values: tuple[fx.Node, ...]
    """All sums, in graph order."""
    sources: tuple[Writer, ...]
    writers: tuple[Writer, ...]
    norms: tuple[fx.Node, ...]
    bypasses: tuple[fx.Node, ...]
    last: fx.Node

    @property
    def is_post_norm(self) -> bool:
        """Whether its one sum is normed at once and its source is not, so that nothing runs through: each norm starts a new stream."""
        return len(self.values) == 1 and len(self.norms) == 1

    def __str__(self) -> str:
        parts = [f"{len(self.writers)} writer{'s' * (len(self.writers) != 1)}", f"{len(self.norms)} norm reader{'s' * (len(self.norms) != 1)}"]
        return f"residual stream of {self.width} channels: " + ", ".join(parts)


class Streams:
    """All residual streams of a graph, longest first, and which one a value belongs to."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        sums = [n for n in graph.nodes if is_sum(n)]
        for node in sums:
            for operand in node.args[:2]:
                self._join(operand, node)
            for user in node.users:
                if node.target in FUSED_NORMS and user.target is operator.getitem and user.args[1] == 1:
                    self._join(user, node)
        for node in graph.nodes:
            if _passes_on(node) and isinstance(node.args[0], fx.Node):
                self._join(node.args[0], node)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.fx.nodes:
            if node in self._parent:
                groups.setdefault(self._root(node), []).append(node)
        groups = {root: members for root, members in groups.items() if any(is_sum(m) for m in members)}
        self._order = _order(graph, groups)
        found = {root: made for root, members in groups.items() if (made := self._stream(root, members)) is not None}
        self._found = found
        self.all = tuple(sorted(found.values(), key=lambda s: (-len(s.writers), s.values[0])))

    def of(self, node: Any) -> Stream | None:
        """The stream a value is part of."""
        return self._found.get(self._root(node)) if isinstance(node, fx.Node) and node in self._parent else None

    def same(self, a: Any, b: Any) -> bool:
        """Whether two values are joined by additions and layout ops."""
        if a is b:
            return True
        return all(isinstance(n, fx.Node) and n in self._parent for n in (a, b)) and self._root(a) is self._root(b)

    def _join(self, a: Any, b: fx.Node) -> None:
        self._parent.setdefault(a, a)
        self._parent.setdefault(b, b)
        self._parent[self._root(a)] = self._root(b)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def _stream(self, root: fx.Node, members: list[fx.Node]) -> Stream | None:
        inside = set(members)
        sums = tuple(m for m in members if is_sum(m))
        leaves = [m for m in members if not is_sum(m) and not _is_passed(m, inside)]
        bit = self._order.bits[root]
        writers = [_writer(m) for m in leaves if self._order.depends.get(m, 0) & bit]
        sources = [_writer(m) for m in leaves if not self._order.depends.get(m, 0) & bit]
        readers = [u for m in members for u in m.users if u not in inside]
        norms = tuple(dict.fromkeys([*(r for r in readers if is_norm(r)), *(norm_output(s) for s in sums if s.target in FUSED_NORMS)]))
        rest = tuple(dict.fromkeys(r for r in readers if not is_norm(r) and not is_normed(r) and r.op != "output" and not _is_shape(r)))
        projected = any(is_projection(w.node) or w.node.target in CONVOLUTIONS for w in writers)
        if not writers or not (norms or projected) or not any(isinstance(s.meta["val"], Tensor | tuple | list) for s in sums):
            return None
        value: Any = sums[-1].meta["val"]
        shape = (value[0] if isinstance(value, tuple | list) else value).shape
        by_channel = norms and norms[0].target in CHANNEL_NORMS or not norms and any(w.node.target in CONVOLUTIONS for w in writers)
        width = shape[1] if by_channel else shape[-1]
        return Stream(int(width), sums, tuple(sources), tuple(writers), norms, rest, sums[-1])


@dataclass(frozen=True)
class _Order:
    bits: dict[fx.Node, int]
    depends: dict[fx.Node, int]


def residual_streams(graph: Graph) -> tuple[Stream, ...]:
    """The residual streams of a graph, longest first; a post-norm model has one short stream a sum (`Stream.is_post_norm`)."""
    return Streams(graph).all


def _order(graph: Graph, groups: dict[fx.Node, list[fx.Node]]) -> _Order:
    """Which streams each node depends on, as bits: a writer depends on its stream, a source does not."""
    bits = {root: 1 << i for i, root in enumerate(groups)}
    member = {m: bits[root] for root, members in groups.items() for m in members}
    depends: dict[fx.Node, int] = {}
    for node in graph.fx.nodes:
        found = 0
        for n in node.all_input_nodes:
            found |= depends.get(n, 0) | member.get(n, 0)
        depends[node] = found
    return _Order(bits, depends)


def _passes_on(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or node.op != "call_function":
        return False
    return node.target in LAYOUT or is_looked_through(node) or node.target in (aten.roll.default,)


def _is_passed(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a member only passes another member on."""
    if node.target is operator.getitem:
        return node.args[0] in inside
    return _passes_on(node) and node.args[0] in inside


def _is_shape(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), Tensor | tuple | list) or node.target is aten.sym_size.int


def _writer(value: fx.Node) -> Writer:
    node, through = value, []
    for _ in range(_FAR):
        if node.op != "call_function" or is_projection(node) or node.target in CONVOLUTIONS:
            return Writer(value, node, tuple(through))
        source = _main_operand(node)
        if source is None:
            break
        if node.target not in LAYOUT and not is_looked_through(node):
            through.append(node)
        node = source
    return Writer(value, value)


def _main_operand(node: fx.Node) -> fx.Node | None:
    """What a norm, scale, gate or layout op applies to."""
    if node.target in LAST_AXIS_NORMS or node.target in CHANNEL_NORMS or node.target in LAYOUT or is_looked_through(node):
        return node.args[0]  # type: ignore[return-value]
    if node.target in (aten.roll.default, aten.slice.Tensor, aten.pad.default, aten.sum.dim_IntList, aten.index.Tensor):  # the last two: experts
        return node.args[0]  # type: ignore[return-value]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        tensors = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(tensors) == 2:  # a gate, and what it scales
            tensors = [t for t in tensors if _leads_to_projection(t)]
        return tensors[0] if len(tensors) == 1 else None
    return None


def _leads_to_projection(node: fx.Node) -> bool:
    for _ in range(_FAR):
        if is_projection(node):
            return True
        if node.op != "call_function" or node.target not in LAYOUT and not is_looked_through(node):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return False
