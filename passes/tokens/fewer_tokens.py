"""What follows from fewer tokens: a sweep over a program that, from given places on, lets every value hold one row for each token left.

The other half of token merging and pruning: `Cut`s say where tokens go and which, the sweep does the rest. It knows what it may leave as it
is (layers that work on each token by itself), what it has to adapt (sizes in reshapes, rows of position tables, sums over tokens,
attention's keys) and copies merged tokens back to all they stand for in front of everything else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.axes import kept_axis
from ...ir.blocks.vocabulary import (
    CONVOLUTIONS,
    FUSED_NORMS,
    LAST_AXIS_NORMS,
    is_linear,
    is_pointwise,
    path_of,
)
from ...ir.evaluate import is_size, op_name
from ...ir.graph import Graph
from ...ir.nodes import CASTS, argument, arguments, set_argument

aten = torch.ops.aten
ours = torch.ops.rewright

_SUMS = (aten.mean.dim, aten.sum.dim_IntList)


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


Make = Callable[["Sweep", fx.Node, Rows | None, fx.Node], tuple[fx.Node, Tokens]]
"""(sweep, value [B, tokens, ...], its rows if it has fewer already, the node to insert before) -> the value with fewer tokens, and which."""


@dataclass(frozen=True)
class Cut:
    """Where tokens go. readers: which users of the value get the one with fewer tokens; None: all."""

    make: Make
    readers: frozenset[fx.Node] | None = None


class Sweep:
    """One run over a graph, which it edits; raises Refused in the middle, so give it a draft."""

    def __init__(self, graph: Graph, cuts: Mapping[fx.Node, Cut]) -> None:
        self.graph, self.cuts = graph, cuts
        self.rows: dict[fx.Node, Rows] = {}
        """What holds fewer tokens, after its adaptation."""
        self.unmerged: list[fx.Node] = []
        """Nodes in front of which tokens were copied back, in order."""
        self._copies: dict[fx.Node, fx.Node] = {}
        self._gathered: dict[tuple, fx.Node] = {}
        self._sizes: dict[tuple, fx.Node] = {}
        self._content: dict[fx.Node, bool] = {}

    def run(self) -> None:
        """Adapt everything behind the cuts."""
        for node in list(self.graph.fx.nodes):
            if node.op == "output":
                self._output(node)
                continue
            if node.op == "call_function" and any(n in self.rows for n in node.all_input_nodes):
                self._adapt(node)
            if node in self.cuts:
                self._cut(node)

    def insert(self, before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call."""
        return self.graph.insert(target, *args, before=before, like=like, **kwargs)

    def _cut(self, node: fx.Node) -> None:
        known = self.rows.get(node)
        following, old = node.next, set(self.graph.fx.nodes)
        cut = self.cuts[node]
        value, tokens = cut.make(self, node, known, following)
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user in (old if cut.readers is None else cut.readers), propagate_meta=False)
        self.rows[value] = Rows(tokens, 1)

    # -- one node -------------------------------------------------------------------------------------------------------

    def _adapt(self, node: fx.Node) -> None:
        found = self._rule(node)
        if found is None:
            for operand in dict.fromkeys(node.all_input_nodes):
                if operand in self.rows:
                    node.replace_input_with(operand, self.unmerge(operand, node))
            self.unmerged.append(node)
        elif isinstance(found, Rows):
            self.rows[node] = found
        self.graph.infer(node)
        self._check(node)

    def _check(self, node: fx.Node) -> None:
        rows, value = self.rows.get(node), node.meta["val"]
        for v in value if isinstance(value, tuple | list) else [value]:
            if rows is not None and int(v.shape[rows.axis]) != rows.count:
                raise Refused(node, f"{path_of(node)}: {op_name(node)} has {int(v.shape[rows.axis])} rows where {rows.count} tokens are left")

    def _rule(self, node: fx.Node) -> Rows | bool | None:
        """The rows of a node's result, adapted; True: it needs no adaptation and holds no tokens; None: it needs all tokens."""
        target: Any = node.target
        first: Any = node.args[0] if node.args else None
        rows = self.rows.get(first) if isinstance(first, fx.Node) else None
        if target is aten.sym_size.int:
            return None if rows is not None and rows.axis == argument(node, "dim") % first.meta["val"].dim() else True
        if target is operator.getitem:
            return rows
        if target in (ours.attention.default, ours.multi_head_attention.default):
            return self._attention(node)
        if target is aten.cat.default:
            return self._joined(node)
        if target is aten.stack.default:
            return self._stacked(node)
        if is_linear(node) or target in LAST_AXIS_NORMS:
            return rows if rows is not None and len([n for n in node.all_input_nodes if n in self.rows]) == 1 and not self._is_last(first, rows) else None
        if target in FUSED_NORMS or target is ours.rope.default or (is_pointwise(node) and target not in CASTS):
            return self._pointwise(node)
        if rows is None or any(n in self.rows for n in node.all_input_nodes if n is not first):
            return None
        if target is aten.reshape.default:
            return self._reshaped(node, rows)
        if target is aten.slice.Tensor:
            return self._sliced(node, rows)
        if target is aten.select.int and argument(node, "dim") % first.meta["val"].dim() == rows.axis:
            return True if 0 <= argument(node, "index") < rows.leading else None
        if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
            return rows if argument(node, "dim") % first.meta["val"].dim() != rows.axis else None
        if target is aten.unbind.int:
            dim = argument(node, "dim") % first.meta["val"].dim()
            return None if dim == rows.axis else replace(rows, axis=rows.axis - (dim < rows.axis))
        if target in _SUMS:
            return self._reduced(node, rows)
        if target is aten.expand.default:
            behind = rows.axis + len(argument(node, "size")) - first.meta["val"].dim()
            set_argument(node, "size", [-1 if i == behind else s for i, s in enumerate(argument(node, "size"))])
        elif target not in (*CASTS, *_MOVED) and not is_pointwise(node):
            return None
        self.graph.infer(node)
        axis = kept_axis(node, rows.axis)
        return None if axis is None else replace(rows, axis=axis)

    @staticmethod
    def _is_last(value: fx.Node, rows: Rows) -> bool:
        return rows.axis == value.meta["val"].dim() - 1

    def _reshaped(self, node: fx.Node, rows: Rows) -> Rows | None:
        """The token axis stays an axis of its own, behind as many elements as before."""
        first: Any = node.args[0]
        size = self.graph.size
        lead = math.prod(size(s) for s in first.meta["val"].shape[: rows.axis])
        after = [size(s) for s in node.meta["val"].shape]  # still the original's
        axis = next((i for i, s in enumerate(after) if s == rows.before and math.prod(after[:i]) == lead), None)
        if axis is None:
            return None
        sizes = list(argument(node, "shape"))
        if sizes[axis] != -1:
            sizes[axis] = rows.count
        set_argument(node, "shape", sizes)
        return replace(rows, axis=axis)

    def _sliced(self, node: fx.Node, rows: Rows) -> Rows | bool | None:
        first: Any = node.args[0]
        if argument(node, "dim") % first.meta["val"].dim() != rows.axis:
            return rows
        start, end, step = (argument(node, n) for n in ("start", "end", "step"))
        start, end = 0 if start is None else start, rows.before if end is None else end
        if not all(isinstance(x, int) for x in (start, end, step)) or step != 1:
            return None
        start, end = (x + rows.before if x < 0 else min(x, rows.before) for x in (start, end))
        if end <= rows.leading:
            return True
        if end < rows.before or start > rows.leading:
            return None
        set_argument(node, "start", start)
        set_argument(node, "end", torch.iinfo(torch.int64).max)
        return replace(rows, begin=rows.begin + start)

    def _joined(self, node: fx.Node) -> Rows | None:
        """A concatenation: of channels of the same tokens, or of other tokens before them."""
        parts: Any = node.args[0]
        axis = argument(node, "dim") % node.meta["val"].dim()
        last = self.rows.get(parts[-1])
        if last is not None and last.axis == axis and not any(p in self.rows for p in parts[:-1]):
            ahead = sum(int(p.meta["val"].shape[axis]) for p in parts[:-1])
            return replace(last, begin=last.begin - ahead)
        found = {self.rows.get(p) for p in parts}
        (rows,) = found if len(found) == 1 else (None,)
        return rows if rows is not None and rows.axis != axis else None

    def _stacked(self, node: fx.Node) -> Rows | None:
        """Parts of the same tokens beside each other along a new axis."""
        parts: Any = node.args[0]
        rows = self.rows.get(parts[0])
        if rows is None or any(self.rows.get(p) != rows for p in parts):
            return None
        return replace(rows, axis=rows.axis + (argument(node, "dim") % node.meta["val"].dim() <= rows.axis))

    def _pointwise(self, node: fx.Node) -> Rows | None:
        """Operands of the same tokens; others follow the tokens if they are tables of positions."""
        value = node.meta["val"][0] if isinstance(node.meta["val"], tuple | list) else node.meta["val"]
        dims = value.dim()

        def aligned(n: fx.Node) -> Rows:
            rows = self.rows[n]
            return replace(rows, axis=rows.axis + dims - n.meta["val"].dim(), weighted=False)

        held = [n for n in dict.fromkeys(node.all_input_nodes) if n in self.rows]
        found = {aligned(n) for n in held}
        if len(found) > 1:
            return None
        (rows,) = found
        weighted = any(self.rows[n].weighted for n in held)
        if weighted and (target_name := op_name(node)) not in ("mul", "to", "_to_copy", "div"):
            raise Refused(node, f"{path_of(node)}: {target_name} of masked tokens is not followed")
        swaps: dict[fx.Node, fx.Node] = {}
        for other in dict.fromkeys(node.all_input_nodes):
            v = other.meta.get("val")
            if other in self.rows or not isinstance(v, Tensor) or v.dim() == 0:
                continue
            axis = rows.axis - (dims - v.dim())
            if axis < 0 or self.graph.size(v.shape[axis]) == 1:
                continue
            if self._is_mask(other, rows) and op_name(node) == "mul":
                swaps[other] = self._mask_of(node, other, rows, dims)
                weighted = weighted or self._only_summed(node, rows.axis)
            elif self.is_content(other) or rows.begin < 0:
                return None
            else:
                swaps[other] = self._follow(node, other, rows, dims)
        for other, new in swaps.items():
            node.replace_input_with(other, new)
        return replace(rows, weighted=weighted)

    # -- attention ------------------------------------------------------------------------------------------------------

    def _attention(self, node: fx.Node) -> Rows | bool | None:
        a = arguments(node)
        q, k, v = (self.rows.get(a[n]) for n in ("q", "k", "v"))
        if (k is None) != (v is None) or (k is not None and v is not None and (k.tokens, k.begin) != (v.tokens, v.begin)):
            return None
        layer = path_of(node)
        if a["causal"] and (q != k or (k is not None and k.tokens.places is not None)):
            raise Refused(node, f"{layer} is causal: a token merged into an earlier one would be seen before its time")
        if a["window"] is not None:
            raise Refused(node, f"{layer} looks {a['window']} tokens far: places say nothing of distances once tokens are gone")
        if a["bias"] is not None and (k is not None or self.graph.size(a["bias"].meta["val"].shape[-2]) > 1):
            raise Refused(node, f"{layer} adds a bias for every pair of places to its scores, which would have to follow the tokens")
        if k is None:
            return q if q is not None else True
        tokens, mask = k.tokens, a["key_mask"]
        if tokens.sizes is not None:
            if a["sizes"] is not None:
                raise Refused(node, f"{layer} has sizes of keys already")
            if mask is not None and not tokens.masked:
                raise Refused(node, f"{layer} has a mask of padding that the layers before have not")
            sizes = self.sizes(k, node)
            set_argument(node, "sizes", sizes if tokens.proportional else None)
            set_argument(node, "key_mask", self.insert(node, aten.gt.Scalar, sizes, 0) if tokens.masked and not tokens.proportional else None)
        elif mask is not None:
            set_argument(node, "key_mask", self.insert(node, ours.token_take.default, mask, self.numbers(k, node)))
        return q if q is not None else True

    # -- sums over tokens -------------------------------------------------------------------------------------------------

    def _reduced(self, node: fx.Node, rows: Rows) -> Rows | bool | None:
        """Sums and means over tokens count each by its size; over other axes they keep them."""
        first: Any = node.args[0]
        rank, keep = first.meta["val"].dim(), argument(node, "keepdim")
        dims = sorted(d % rank for d in argument(node, "dim") or range(rank))
        if rows.axis not in dims:
            return replace(rows, axis=rows.axis - (0 if keep else sum(d < rows.axis for d in dims)))
        if rows.weighted and node.target is aten.sum.dim_IntList:
            return True
        if rows.tokens.sizes is None:
            return True if node.target is aten.mean.dim else None  # of pruned tokens, the mean of those left
        if rows.tokens.masked:
            return None
        weights = self._shaped(self.sizes(rows, node), rows, rank, node)
        product = self.insert(node, aten.mul.Tensor, first, weights)
        if node.target is aten.mean.dim:  # the sizes add up to the tokens there were
            product = self.insert(node, aten.mul.Tensor, product, rows.count / rows.before)
        dtype = first.meta["val"].dtype
        node.replace_input_with(first, product if product.meta["val"].dtype == dtype else self.insert(node, aten._to_copy.default, product, dtype=dtype))
        return True

    def _only_summed(self, node: fx.Node, axis: int) -> bool:
        """Whether all that reads a value sums it over its tokens."""
        return bool(node.users) and all(
            u.target is aten.sum.dim_IntList and axis in [d % node.meta["val"].dim() for d in argument(u, "dim")] for u in node.users
        )

    def _is_mask(self, node: fx.Node, rows: Rows) -> bool:
        """Whether a value is the mask of padding, in any shape and dtype."""
        if not rows.tokens.masked:
            return False
        while node.op == "call_function" and (node.target in CASTS or node.target in (aten.unsqueeze.default, aten.expand.default, aten.ne.Scalar)):
            node = node.args[0]  # type: ignore[assignment]
        return node.op == "placeholder" and node.meta["val"].dim() == 2

    def _mask_of(self, node: fx.Node, mask: fx.Node, rows: Rows, dims: int) -> fx.Node:
        """What stands for the mask: the sizes where it selects what is summed, else whether a token is real."""
        weights = self._shaped(self.sizes(rows, node), rows, dims, node)
        if not self._only_summed(node, rows.axis):
            weights = self.insert(node, aten.gt.Scalar, weights, 0)
        return self.insert(node, aten._to_copy.default, weights, dtype=mask.meta["val"].dtype)

    # -- what follows the tokens ----------------------------------------------------------------------------------------

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

    def _shaped(self, values: fx.Node, rows: Rows, dims: int, before: fx.Node) -> fx.Node:
        """[B, rows] -> [B, 1, rows, 1], with the rows along their axis."""
        for axis in range(1, dims):
            if axis != rows.axis:
                values = self.insert(before, aten.unsqueeze.default, values, axis)
        return values

    def _follow(self, node: fx.Node, table: fx.Node, rows: Rows, dims: int) -> fx.Node:
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
            self._content[node] = False
            work, seen = [node], {node}
            while work:
                n = work.pop()
                layer = is_linear(n) or n.target in CONVOLUTIONS or n.target is aten.embedding.default
                if (layer and _has_input(n)) or (n.op == "placeholder" and n.meta["val"].is_floating_point()):
                    self._content[node] = True
                    break
                new = [m for m in n.all_input_nodes if m not in seen and not is_size(m)]
                seen.update(new)
                work += new
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

    def _output(self, node: fx.Node) -> None:
        for operand in dict.fromkeys(node.all_input_nodes):
            if operand in self.rows:
                node.replace_input_with(operand, self.unmerge(operand, node))
                self.unmerged.append(node)


_MOVED = (
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.select.int,
    aten.narrow.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat_interleave.self_int,
)
"""Ops that keep the token axis, if it is another than theirs."""


def _has_input(node: fx.Node) -> bool:
    """Whether an input of the program is among what a value is computed from."""
    work, seen = [node], {node}
    while work:
        n = work.pop()
        if n.op == "placeholder":
            return True
        new = [m for m in n.all_input_nodes if m not in seen]
        seen.update(new)
        work += new
    return False


def numbers_after(sweep: Sweep, rows: Rows | None, keep: fx.Node, before: fx.Node) -> fx.Node:
    """`Tokens.numbers` behind a cut that keeps these of the tokens there were."""
    return keep if rows is None else sweep.insert(before, ours.token_take.default, rows.tokens.numbers, keep)


def static_count(value: fx.Node) -> int | None:
    """How many tokens a value [B, tokens, ...] has; None: a dynamic number."""
    count = value.meta["val"].shape[1]
    return count if isinstance(count, int) else None
