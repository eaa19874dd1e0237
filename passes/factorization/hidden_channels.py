"""Keep some hidden channels of a feed-forward block: where they are stored and counted between its projections, and the edit."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks import FFNBlock
from ...ir.blocks.axes import kept_axis
from ...ir.blocks.channel_constants import why_not_edited
from ...ir.blocks.channel_tracer import ChannelTracer
from ...ir.blocks.vocabulary import LAYOUT, MOVES, expert_weight, input_axis, is_grouped_product, is_pointwise, path_of, reads, without_floats
from ...ir.evaluate import is_size
from ...ir.graph import Graph
from ...ir.nodes import argument, is_looked_through, same_shape, schema, set_argument

aten = torch.ops.aten

BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)


@dataclass(frozen=True, eq=False)
class Take:
    """w -> w with only what stands at `index` of one axis: int64 [kept], or [experts, kept] with a choice for each expert of w [experts, ...]."""

    axis: int
    index: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        index = self.index.to(w.device)
        if index.dim() == 1:
            return w.index_select(self.axis, index)
        shape = list(w.shape)
        shape[self.axis] = index.shape[1]
        return w.gather(self.axis, index.view(len(index), *[-1 if d == self.axis else 1 for d in range(1, w.dim())]).expand(shape))


@dataclass(frozen=True)
class Stored:
    """A stored tensor that counts the hidden channels along `axis`: the operand `name` of a call. rows: int64 [hidden] each, which
    entries they are; two for a fused projection, whose first comes first."""

    call: fx.Node
    name: str
    axis: int
    rows: tuple[Tensor, ...]


@dataclass(eq=False)
class HiddenChannels:
    """What changes with the number of hidden channels, besides the down projection's columns.

    stored: weights, biases and constants.   sizes: (reshape, place in its shape) where the number itself stands.
    stem, halves: for a fused projection, the value whose halves are told apart behind it, and the values that are the first and the second half.
    changed: calls whose results have another shape, in graph order.
    """

    block: FFNBlock
    stored: list[Stored] = field(default_factory=list)
    sizes: list[tuple[fx.Node, int]] = field(default_factory=list)
    stem: fx.Node | None = None
    halves: tuple[tuple[fx.Node, ...], ...] = ()
    changed: list[fx.Node] = field(default_factory=list)

    @property
    def value(self) -> fx.Node:
        """The hidden channels as the down projection reads them, along the last axis."""
        return reads(self.block.down)

    @property
    def start(self) -> fx.Node:
        """What the block reads."""
        return reads(self.block.up)

    @property
    def matrices(self) -> tuple[fx.Node, ...]:
        """The weights of its projections, each once."""
        calls = (self.block.up, self.block.gate, self.block.down)
        return tuple(dict.fromkeys(c.args[1] for c in calls if c is not None))  # type: ignore[misc]

    @property
    def unit(self) -> int:
        """Weights one hidden channel takes in them."""
        return sum(int(w.meta["val"].numel()) for w in self.matrices) // self.block.hidden

    def keep(self, graph: Graph, index: Tensor) -> None:
        """Leave only the hidden channels of `index` (int64 [kept], or [experts, kept]), in that order. The down projection is up to the caller."""
        for stored in self.stored:
            old: Any = argument(stored.call, stored.name)
            holder = _constant(old)
            rows = torch.cat([r[index] for r in stored.rows], -1)
            new = graph.add_weight(f"{holder.target}_kept", Take(stored.axis, rows), str(holder.target), like=stored.call)
            if holder is not old:  # a bias of experts, picked for each token
                old.replace_input_with(holder, new)
                graph.infer(old)
            else:
                set_argument(stored.call, stored.name, new)
        for call, place in self.sizes:
            shape = list(call.args[1])  # type: ignore[arg-type]
            shape[place] = index.shape[-1]
            call.update_arg(1, shape)
        for call in self.changed:
            graph.infer(call)
            if call is self.stem:
                self._split(graph, index.shape[-1])

    def _split(self, graph: Graph, width: int) -> None:
        assert self.stem is not None
        parts = graph.insert(aten.split.Tensor, self.stem, width, -1, before=self.stem.next, like=self.stem)
        after = parts
        for i, heads in enumerate(self.halves):
            after = graph.insert(operator.getitem, parts, i, before=after.next, like=self.stem)
            for head in heads:
                head.replace_all_uses_with(after, propagate_meta=False)
                _erase_unread(graph, head)


def hidden_channels(graph: Graph, block: FFNBlock) -> HiddenChannels | str:
    """Where a block's hidden channels are, or why they can't be taken away.

    1. the block says so itself   2. a projection's weights are not stored as floats   3. something between the projections mixes channels,
    rearranges them or depends on them in another way   4. something else reads them.
    """
    if block.why:  # 1
        return block.why[0]
    for call in (block.up, block.gate, block.down):
        if call is not None and (why := _why_not_stored(call)):  # 2
            return why
    found = HiddenChannels(block)
    axes = _starts(graph, found)
    if isinstance(axes, str):
        return axes
    pending = {u for n in axes for u in n.users}
    while pending:
        node = min(pending)
        pending.remove(node)
        if is_size(node):
            continue
        if node is block.down and reads(node) in axes:
            if axes[reads(node)] != reads(node).meta["val"].dim() - 1:
                return "its hidden channels stand along another axis than the down projection reads"
            continue
        axis = _after(found, node, axes)
        if isinstance(axis, str):  # 3, 4
            return axis
        axes[node] = axis
        found.changed.append(node)
        pending |= node.users.keys()
    return found


def _why_not_stored(call: fx.Node) -> str | None:
    if call.target is aten.linear.default:
        bias = argument(call, "bias")
        return why_not_edited(call.args[1], call) or (None if bias is None else why_not_edited(bias, call))
    if is_grouped_product(call):
        if call.args[1] is not expert_weight(call) or input_axis(call) != -1:
            return f"the experts' weights of {path_of(call)} are picked for each token, or stand on the left of the product"
        return why_not_edited(call.args[1], call)
    if input_axis(call) == 1:
        return "its projections are 1x1 convolutions"
    return without_floats(call)


def weight_name(call: fx.Node) -> str:
    """What a projection calls its weight."""
    return schema(call.target)[1][0]


def _starts(graph: Graph, found: HiddenChannels) -> dict[fx.Node, int] | str:
    """The first values that are the hidden channels, whole and in order -> their axis; what makes them goes into `found`."""
    block = found.block
    assert block.up_rows is not None
    makers = [(block.up, (block.up_rows,))] if block.gate_rows is None else [(block.gate, (block.gate_rows,)), (block.up, (block.up_rows,))]
    if block.gate is block.up:
        assert block.gate_rows is not None
        makers = [(block.up, tuple(sorted((block.gate_rows, block.up_rows), key=lambda r: int(r[0]))))]
    for call, rows in makers:
        assert call is not None
        if sum(map(len, rows)) != int(call.meta["val"].shape[-1]):
            return f"{path_of(call)} makes other channels than the {block.hidden} hidden ones too"
        found.stored.append(Stored(call, weight_name(call), 2 if is_grouped_product(call) else 0, rows))
        if not is_grouped_product(call) and argument(call, "bias") is not None:
            found.stored.append(Stored(call, "bias", 0, rows))
        found.changed.append(call)
    if block.gate is not block.up:
        if any(not torch.equal(rows[0], torch.arange(block.hidden)) for _, rows in makers):
            return "its hidden channels are rearranged between the projections"
        return {call: call.meta["val"].dim() - 1 for call, _ in makers if call is not None}
    why = _halve(graph, found, makers[0][1])
    return why or {head: head.meta["val"].dim() - 1 for heads in found.halves for head in heads}


def _halve(graph: Graph, found: HiddenChannels, rows: tuple[Tensor, ...]) -> str | None:
    """Where the two halves of a fused projection are told apart: past additions of constants, then moves to the halves."""
    stem = found.block.up
    while len(users := [u for u in stem.users if not is_size(u)]) == 1 and is_pointwise(users[0]) and users[0].target not in MOVES:
        for name, other in _others(users[0], {stem}):
            if (place := _counts(other, users[0], users[0].meta["val"].dim() - 1)) is None:
                continue
            if isinstance(place, str):
                return place
            found.stored.append(Stored(users[0], name, place, rows))
        stem = users[0]
        found.changed.append(stem)
    tracer, halves = ChannelTracer(graph, found.block.up), ([], [])
    work = list(users)
    for node in work:
        if node.target not in MOVES and node.target is not operator.getitem and not is_looked_through(node):
            return f"{path_of(stem)} is read by {node.name} before its halves are told apart"
        origin = tracer.origin(node) if isinstance(node.meta["val"], Tensor) else ""
        which = None if isinstance(origin, str) else next((i for i, r in enumerate(rows) if torch.equal(origin.channel, r)), None)
        if which is None:
            work += [u for u in node.users if not is_size(u) and u not in work]
        elif not same_shape([*stem.meta["val"].shape[:-1], found.block.hidden], node.meta["val"].shape):
            return f"{node.name} rearranges the tokens while it tells the halves apart"
        else:
            halves[which].append(node)
    found.stem, found.halves = stem, tuple(map(tuple, halves))
    return None


def _after(found: HiddenChannels, node: fx.Node, axes: dict[fx.Node, int]) -> int | str:
    """The axis of a call's result that counts the hidden channels its operands count."""
    if node.op == "output":
        return "its hidden channels are also an output of the model"
    source = next((a for a in node.args if isinstance(a, fx.Node) and a in axes), None)
    elsewhere = f"its hidden channels are also read by {node.name} of {node.meta.get('path') or 'the model itself'}"
    if source is None:
        return elsewhere
    axis = axes[source]
    if node.target is operator.getitem and source.target in BATCH_NORMS:
        return axis if node.args[1] == 0 else elsewhere
    if node.target in BATCH_NORMS:
        if axis != 1 or not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args[1:5]):
            return f"the batch norm {node.name} counts other channels, or its statistics are computed"
        found.stored += [Stored(node, name, 0, (torch.arange(found.block.hidden),)) for name, *_ in schema(node.target)[1:5]]
        return axis
    if node.target in LAYOUT or is_looked_through(node):
        kept = kept_axis(node, axis)
        if kept is None:
            return f"{node.name} rearranges its hidden channels"
        if node.target is aten.reshape.default and list(node.args[1])[kept] != -1:  # type: ignore[arg-type, call-overload]
            found.sizes.append((node, kept))
        return kept
    if not is_pointwise(node) or not isinstance(node.target, torch._ops.OpOverload):
        return elsewhere
    result = node.meta["val"].dim()
    places = {axes[n] + result - n.meta["val"].dim() for n in node.all_input_nodes if n in axes}
    if len(places) != 1:
        return f"{node.name} combines its hidden channels along different axes"
    (place,) = places
    for name, other in _others(node, axes):
        own = _counts(other, node, place)
        if isinstance(own, str):
            return own
        if own is not None:
            found.stored.append(Stored(node, name, own, (torch.arange(found.block.hidden),)))
    return place


def _others(node: fx.Node, inside: Any) -> list[tuple[str, fx.Node]]:
    """(name, operand) of a pointwise call's operands that are not hidden channels."""
    given = [(schema(node.target)[i][0], a) for i, a in enumerate(node.args)]
    return [(name, a) for name, a in (*given, *node.kwargs.items()) if isinstance(a, fx.Node) and a not in inside and isinstance(a.meta.get("val"), Tensor)]


def _constant(operand: fx.Node) -> fx.Node:
    """The stored tensor behind a constant; behind a pick of rows by tokens, the table it picks from."""
    picks = operand.target is aten.index.Tensor and operand.meta["val"].dim() == 2 and len(argument(operand, "indices")) == 1
    return operand.args[0] if picks else operand  # type: ignore[return-value]


def _counts(operand: fx.Node, node: fx.Node, axis: int) -> int | str | None:
    """The axis along which what stands behind an operand counts the channels `node` has along `axis`; None: it is the same for all; or why it can't be cut."""
    value, result = operand.meta["val"], node.meta["val"]
    own = axis - (result.dim() - value.dim())
    if own < 0 or value.shape[own] != result.shape[axis]:
        return None
    holder = _constant(operand)
    if holder.op != "get_attr" or holder is not operand and len(operand.users) > 1:
        return f"{operand.name}, which is computed, differs by hidden channel"
    return why_not_edited(holder, node if holder is operand else operand) or own


def _erase_unread(graph: Graph, node: fx.Node) -> None:
    """Erase a value nobody reads and the moves above it that this leaves unread."""
    while not node.users and node.op == "call_function" and (node.target in MOVES or node.target is operator.getitem or is_looked_through(node)):
        source: Any = node.args[0]
        graph.fx.erase_node(node)
        node = source
