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
    FUSED_NORMS,
    LAST_AXIS_NORMS,
    LAYOUT,
    is_linear,
    is_pointwise,
    path_of,
)
from ...ir.evaluate import op_name
from ...ir.graph import Graph
from ...ir.nodes import CASTS, argument, arguments, set_argument
from .following import Following, Refused, Rows, Tokens

aten = torch.ops.aten
ours = torch.ops.rewright

_SUMS = (aten.mean.dim, aten.sum.dim_IntList)
_MOVED = (
    *LAYOUT,
    aten.select.int,
    aten.narrow.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat_interleave.self_int,
)
"""Ops that keep the token axis, if it is another than theirs; reshapes are adapted before."""

Make = Callable[["Sweep", fx.Node, Rows | None, fx.Node], tuple[fx.Node, Tokens]]
"""(sweep, value [B, tokens, ...], its rows if it has fewer already, the node to insert before) -> the value with fewer tokens, and which."""


@dataclass(frozen=True)
class Cut:
    """Where tokens go. readers: which users of the value get the one with fewer tokens; None: all."""

    make: Make
    readers: frozenset[fx.Node] | None = None


class Sweep(Following):
    """One run over a graph, which it edits; raises Refused in the middle, so give it a draft."""

    def __init__(self, graph: Graph, cuts: Mapping[fx.Node, Cut]) -> None:
        super().__init__(graph)
        self.cuts = cuts
        self.unmerged: list[fx.Node] = []
        """Nodes in front of which tokens were copied back, in order."""

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
                swaps[other] = self.follow(node, other, rows, dims)
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
        weights = self.shaped(self.sizes(rows, node), rows, rank, node)
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
        weights = self.shaped(self.sizes(rows, node), rows, dims, node)
        if not self._only_summed(node, rows.axis):
            weights = self.insert(node, aten.gt.Scalar, weights, 0)
        return self.insert(node, aten._to_copy.default, weights, dtype=mask.meta["val"].dtype)

    def _output(self, node: fx.Node) -> None:
        for operand in dict.fromkeys(node.all_input_nodes):
            if operand in self.rows:
                node.replace_input_with(operand, self.unmerge(operand, node))
                self.unmerged.append(node)


def numbers_after(sweep: Sweep, rows: Rows | None, keep: fx.Node, before: fx.Node) -> fx.Node:
    """`Tokens.numbers` behind a cut that keeps these of the tokens there were."""
    return keep if rows is None else sweep.insert(before, ours.token_take.default, rows.tokens.numbers, keep)
