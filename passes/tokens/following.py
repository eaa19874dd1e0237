"""The tokens that are left behind a cut, and what of a program has to follow them: sizes, tables of positions, copies to all tokens again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.blocks.vocabulary import CONVOLUTIONS, is_linear, path_of
from ...ir.evaluate import is_size, op_name
from ...ir.graph import Graph

aten = torch.ops.aten
ours = torch.ops.rewright


class Refused(Exception):
    """A place that can't do with fewer tokens; the message says why."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node = node


@dataclass(frozen=True)
class Tokens:
    """The tokens that are left behind a cut. The first `prefix` are never touched.   sizes, places: None after pruning without sizes, and
    where nothing can be copied back."""

    count: int
    original: int
    """How many there were at first."""
    prefix: int
    numbers: fx.Node
    """int64 [B, count]: the original token whose position each one has."""
    sizes: fx.Node | None
    """float32 [B, count]: how many each stands for; 0: padding."""
    places: fx.Node | None
    """int64 [B, original]: where each original token is."""
    masked: bool = False
    """Whether sizes began as a mask of padding."""
    proportional: bool = True
    """Whether attention counts them by their sizes."""


@dataclass(frozen=True)
class Rows:
    """Which axis of a value counts tokens, from token `begin` on; below 0: behind so many rows of other tokens."""

    tokens: Tokens
    axis: int
    begin: int = 0
    weighted: bool = False
    """Whether they are multiplied by the sizes already."""

    @property
    def count(self) -> int:
        """Rows along the axis, now."""
        return self.tokens.count - self.begin

    @property
    def before(self) -> int:
        """Rows along the axis in the original program."""
        return self.tokens.original - self.begin

    @property
    def leading(self) -> int:
        """First rows that no cut touches."""
        return self.tokens.prefix - self.begin


class Following:
    """A graph under edit with the values in it that have fewer rows than they had."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rows: dict[fx.Node, Rows] = {}
        """What holds fewer tokens, after its adaptation."""
        self._copies: dict[fx.Node, fx.Node] = {}
        self._gathered: dict[tuple, fx.Node] = {}
        self._sizes: dict[tuple, fx.Node] = {}
        self._content: dict[fx.Node, bool] = {}

    def insert(self, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call."""
        return self.graph.insert(target, *args, before=before, like=like, **kwargs)

    def items(self, call: fx.Node, before: fx.Node) -> list[fx.Node]:
        """The results of a call that has several."""
        return [self.insert(before, operator.getitem, call, i) for i in range(len(call.meta["val"]))]

    def sizes(self, rows: Rows, before: fx.Node) -> fx.Node:
        """float32 [B, rows]: how many each row stands for."""
        assert rows.tokens.sizes is not None
        key = (rows.tokens, rows.begin)
        if key not in self._sizes:
            found = rows.tokens.sizes
            if rows.begin > 0:
                found = self.insert(before, aten.slice.Tensor, found, 1, rows.begin)
            elif rows.begin < 0:
                first = self.insert(before, aten.slice.Tensor, found, 1, 0, 1)
                ones = self.insert(before, aten.expand.default, self.insert(before, aten.ones_like.default, first), [-1, -rows.begin])
                found = self.insert(before, aten.cat.default, [ones, found], 1)
            self._sizes[key] = found
        return self._sizes[key]

    def numbers(self, rows: Rows, before: fx.Node) -> fx.Node:
        """int64 [B, rows]: the row of the original program whose position each has; begin is not below 0."""
        found = rows.tokens.numbers
        if rows.begin > 0:
            found = self.insert(before, aten.slice.Tensor, found, 1, rows.begin)
            found = self.insert(before, aten.sub.Tensor, found, rows.begin)
        return found

    def shaped(self, values: fx.Node, rows: Rows, dims: int, before: fx.Node) -> fx.Node:
        """[B, rows] -> [B, 1, rows, 1], with the rows along their axis."""
        for axis in range(1, dims):
            if axis != rows.axis:
                values = self.insert(before, aten.unsqueeze.default, values, axis)
        return values

    def follow(self, node: fx.Node, table: fx.Node, rows: Rows, dims: int) -> fx.Node:
        """The rows of a table of positions, one for each token left."""
        key = (table, rows, dims)
        if key in self._gathered:
            return self._gathered[key]
        value = table.meta["val"]
        axis = rows.axis - (dims - value.dim())
        lead, tail = value.shape[:axis], [int(s) for s in value.shape[axis + 1 :]]
        numbers = self.numbers(rows, node)
        if all(self.graph.size(s) == 1 for s in lead):
            flat = self.insert(node, aten.reshape.default, table, [rows.before, *tail])
            found = self.insert(node, aten.index.Tensor, flat, [numbers])
        elif value.dim() == dims and all(self.graph.size(s) == 1 for s in lead[1:]):
            flat = table
            for _ in lead[1:]:
                flat = self.insert(node, aten.squeeze.dim, flat, 1)
            found = self.insert(node, ours.token_take.default, flat, numbers)
        else:
            raise Refused(node, f"{path_of(node)}: its table of positions of shape {list(value.shape)} can't follow the tokens")
        for _ in range(rows.axis - 1):
            found = self.insert(node, aten.unsqueeze.default, found, 1)
        self._gathered[key] = found
        return found

    def is_content(self, node: fx.Node) -> bool:
        """Whether a value depends on what tokens are, not only on where: on a layer with an input behind it."""
        if node not in self._content:
            self._content[node] = any(_sees_content(n) for n in made_of(node, is_size))
        return self._content[node]

    # -- back to all tokens -----------------------------------------------------------------------------------------------

    def unmerge(self, value: fx.Node, node: fx.Node) -> fx.Node:
        """A value with a row for every original token in front of a node: each is a copy of the one it was merged into."""
        if value in self._copies:
            return self._copies[value]
        rows = self.rows[value]
        held = value.meta["val"]
        if isinstance(held, tuple | list):
            raise Refused(node, f"{path_of(node)}: {op_name(node)} of several results needs all tokens")
        places = rows.tokens.places
        if places is None or rows.weighted:
            raise Refused(node, f"{path_of(node) or 'the output'} needs all tokens ({op_name(node)}), and those that were dropped can't be copied back")
        if self.graph.size(held.shape[0]) != self.graph.size(places.meta["val"].shape[0]) or rows.axis == 0:
            raise Refused(node, f"{path_of(node)}: {op_name(node)} reads tokens of a batch in other groups, {list(held.shape)}")
        if rows.begin > 0:
            places = self.insert(node, aten.sub.Tensor, self.insert(node, aten.slice.Tensor, places, 1, rows.begin), rows.begin)
        elif rows.begin < 0:
            first = self.graph.add_constant("first_tokens", torch.arange(-rows.begin)[None])
            batch = self.insert(node, aten.add.Tensor, self.insert(node, aten.mul.Tensor, self.insert(node, aten.slice.Tensor, places, 1, 0, 1), 0), first)
            places = self.insert(node, aten.cat.default, [batch, self.insert(node, aten.add.Tensor, places, -rows.begin)], 1)
        order = [0, rows.axis, *(i for i in range(1, held.dim()) if i != rows.axis)]
        moved = value if rows.axis == 1 else self.insert(node, aten.permute.default, value, order)
        found = self.insert(node, ours.token_take.default, moved, places)
        if rows.axis != 1:
            found = self.insert(node, aten.permute.default, found, [order.index(i) for i in range(held.dim())])
        self._copies[value] = found
        return found


def made_of(node: fx.Node, without: Callable[[fx.Node], bool] = lambda n: False) -> Iterator[fx.Node]:
    """A value and all it is computed from, but what is only behind nodes to do without."""
    work, seen = [node], {node}
    while work:
        yield (n := work.pop())
        new = [m for m in n.all_input_nodes if m not in seen and not without(m)]
        seen.update(new)
        work += new


def _sees_content(node: fx.Node) -> bool:
    """Whether a node is a layer with an input behind it, or an input of floats."""
    if node.op == "placeholder":
        return node.meta["val"].is_floating_point()
    layer = is_linear(node) or node.target in CONVOLUTIONS or node.target is aten.embedding.default
    return layer and any(n.op == "placeholder" for n in made_of(node))


def static_count(value: fx.Node) -> int | None:
    """How many tokens a value [B, tokens, ...] has; None: a dynamic number."""
    count = value.meta["val"].shape[1]
    return count if isinstance(count, int) else None
