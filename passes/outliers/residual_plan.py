"""What has to change so that a residual stream runs in another basis: found, or refused in one sentence, before anything is edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

from ...ir.blocks import Stream, Streams
from ...ir.blocks.axes import source_axis
from ...ir.blocks.vocabulary import CHANNEL_NORMS, CONVOLUTIONS, FUSED_NORMS, LAST_AXIS_NORMS, LAYOUT, is_sum, path_of
from ...ir.graph import Graph
from ...ir.nodes import argument, is_looked_through
from .residual_writers import IN_AXIS, Turn, TurnConstant, Unscaled, Writes, affine, computing
from .token_ops import axis_after, keeps_constants

aten, ours = torch.ops.aten, torch.ops.rewright


@dataclass(frozen=True)
class AddToBias:
    """W beta into the bias of the call that reads a norm with bias beta."""

    call: fx.Node
    beta: fx.Node


@dataclass(frozen=True)
class Product:
    """One more linear layer between a value and some of its readers. back: from the stream's basis to the model's, with the norm's affine."""

    value: fx.Node
    readers: tuple[fx.Node, ...]
    back: bool
    scale: fx.Node | None = None
    beta: fx.Node | None = None


@dataclass
class Plan:
    """All edits of one stream. centre: its norms take the mean away, so its writers do (LayerNorm)."""

    stream: Stream
    centre: bool
    shifts: list[AddToBias] = field(default_factory=list)
    reads: list[Turn] = field(default_factory=list)
    writes: list[Turn | TurnConstant] = field(default_factory=list)
    norms: list[Unscaled] = field(default_factory=list)
    scales: list[fx.Node] = field(default_factory=list)
    """Multiplications by constants that go into the weights behind them."""
    products: list[Product] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    """Weights that serve several calls and become several weights."""

    def snapshot(self) -> Plan:
        """A plan that later additions to this one leave as it is."""
        return replace(self, **{f.name: list(value) for f in fields(self) if isinstance(value := getattr(self, f.name), list)})


def plan_rotation(graph: Graph, streams: Streams, stream: Stream, explicit: bool, untie: bool) -> Plan | str:
    """What rotating the stream takes, or why it can't be."""
    return _Planner(graph, streams, stream, explicit).plan(untie)


@dataclass(frozen=True)
class _Reading:
    """How a value read from the stream differs from the stream: nothing, or what a norm did to it."""

    norm: fx.Node | None = None
    scale: fx.Node | None = None
    beta: fx.Node | None = None


class _Planner:
    def __init__(self, graph: Graph, streams: Streams, stream: Stream, explicit: bool) -> None:
        self.graph, self.stream, self.explicit = graph, stream, explicit
        self.members = dict.fromkeys(n for n in graph.fx.nodes if streams.of(n) is stream)  # in graph order
        self.axis: dict[fx.Node, int] = {}
        self.made = Plan(stream, centre=any(n.target is aten.layer_norm.default for n in stream.norms))

    def plan(self, untie: bool) -> Plan | str:
        if why := self._why_not_stream() or self._place_channels():
            return why
        for member in self.members:
            if self._is_leaf(member) and (why := self._leaf(member)):
                return why
        for member in self.members:
            if why := self._read(member, self.axis[member], _Reading(), self._is_last(member)):
                return why
        return self._why_tied(untie) or self.made

    # -- the stream itself ------------------------------------------------------------------------------------------

    def _why_not_stream(self) -> str | None:
        stream = self.stream
        if stream.is_post_norm:
            return f"post-norm: the affine of {path_of(stream.norms[0])} lies inside the residual path, between one sum and the next"
        if any(s.target in FUSED_NORMS for s in stream.values):
            return "its sums are already fused with norms; rotate before fuse-add-rms-norm and fuse-add-layer-norm"
        if strange := next((n for n in stream.norms if n.target in CHANNEL_NORMS), None):
            return f"{path_of(strange)} normalises every channel by itself, which no rotation commutes with"
        for node in stream.norms:
            if (node.target is aten.layer_norm.default) != self.made.centre:
                return f"{path_of(node)} keeps the mean of the stream and {path_of(stream.norms[0])} takes it away"
        return None

    def _place_channels(self) -> str | None:
        """The axis that counts the channels, for every value of the stream: the last of all sums."""
        for member in self.members:
            if is_sum(member):
                if member.meta["val"].shape[-1] != self.stream.width:
                    return f"the channels of {member.name} are not its last axis"
                self.axis[member] = member.meta["val"].dim() - 1
        for member in reversed(self.members):
            for user in member.users:
                if user in self.axis and user in self.members and (axis := self._axis_in(member, user)) is not None:
                    self.axis.setdefault(member, axis)
        for member in self.members:
            if member in self.axis:
                continue
            source: Any = member.args[0] if member.args else None
            axis = axis_after(member, self.axis[source]) if source in self.axis else None
            if axis is None:
                return f"the channels can't be followed through {member.name}"
            self.axis[member] = axis
        for member, axis in self.axis.items():
            if member.meta["val"].shape[axis] != self.stream.width:
                return f"{member.name} is one number for all channels"
        return None

    def _axis_in(self, operand: fx.Node, user: fx.Node) -> int | None:
        if is_sum(user):
            return operand.meta["val"].dim() - 1
        return source_axis(user, self.axis[user], axis_after)

    def _is_leaf(self, member: fx.Node) -> bool:
        moved = member.op == "call_function" and (member.target in (*LAYOUT, aten.roll.default) or is_looked_through(member))
        return not is_sum(member) and not (moved and member.args[0] in self.members)

    def _is_last(self, member: fx.Node) -> bool:
        """Whether no sum comes after: what is added here is paid once."""
        while not is_sum(member) and not self._is_leaf(member):
            member = member.args[0]  # type: ignore[assignment]
        return member is self.stream.last

    # -- who writes -------------------------------------------------------------------------------------------------

    def _leaf(self, leaf: fx.Node) -> str | None:
        readers = computing(leaf)
        found = Writes(self.graph)
        why = found.push(leaf, self.axis[leaf], (), readers, self.made.centre)
        if why is None:
            self.made.writes += found.writes
            self.made.norms += found.norms
            self.made.scales += found.scales
            return None
        if writer := next((w for w in self.stream.writers if w.value is leaf), None):
            return f"{path_of(writer.node)} writes to the stream, and {why}"
        if not self.explicit:
            return f"{path_of(leaf)} starts the stream, and {why}; explicit=True would rotate it by one more linear layer"
        value = leaf
        while self.axis[value] != value.meta["val"].dim() - 1 and len(readers) == 1 and readers[0] in self.members and not is_sum(readers[0]):
            value = readers[0]
            readers = computing(value)
        if self.axis[value] != value.meta["val"].dim() - 1:
            return f"the channels of {leaf.name}, which starts the stream, are not its last axis"
        self.made.products.append(Product(value, tuple(readers), back=False))
        return None

    # -- who reads --------------------------------------------------------------------------------------------------

    def _read(self, value: fx.Node, axis: int, reading: _Reading, last: bool) -> str | None:
        """Down from a value of the stream, or of a norm that reads it, to the weights that take it."""
        users = [u for u in computing(value) if reading.norm is not None or u not in self.members]
        ends, passing, whys = [], [], []
        for user in users:
            if reading.norm is None and self._is_norm(value, axis, user):
                if why := self._norm(user, last):
                    return why
            elif self._takes(user, value, axis, reading):
                if reading.beta is not None:
                    self.made.shifts.append(AddToBias(user, reading.beta))
                self.made.reads.append(Turn(user, 1, IN_AXIS[user.target], _given(reading.scale), self.made.centre))  # type: ignore[index]
            else:
                (passing if self._passes(user, value, axis, reading) else ends).append(user)
        for user in passing:
            before = self.made.snapshot()
            why = self._read(user, axis_after(user, axis), reading, last)  # type: ignore[arg-type]
            if why or ends and self.made.products != before.products:  # what turns back here, or could, serves this reader too
                self.made, whys = before, [*whys, *([why] if why else [])]
                ends.append(user)
        why = self._end(value, axis, reading, last, ends) if ends else None
        return why and (whys or [why])[0]

    def _is_norm(self, value: fx.Node, axis: int, user: fx.Node) -> bool:
        return user.target in LAST_AXIS_NORMS and user.args[0] is value and axis == value.meta["val"].dim() - 1 and _width(user) == self.stream.width

    def _norm(self, norm: fx.Node, last: bool) -> str | None:
        facts = affine(self.graph, norm)
        if isinstance(facts, str):
            return facts
        scale, beta, eps = facts
        if (norm.target is aten.layer_norm.default) != self.made.centre:
            return f"{path_of(norm)} keeps the mean of the stream and others take it away"
        self.made.norms.append(Unscaled(norm, eps))
        return self._read(norm, norm.meta["val"].dim() - 1, _Reading(norm, scale, beta), last)

    def _takes(self, user: fx.Node, value: fx.Node, axis: int, reading: _Reading) -> bool:
        """Whether a call's weight can take the rotation."""
        if reading.norm is None and self.made.centre:
            return False  # it sees the mean, which the stream loses
        if user.target not in IN_AXIS or user.args[0] is not value or not self.graph.is_weight(user.args[1]):
            return False
        if user.target in CONVOLUTIONS:
            padded = isinstance(argument(user, "padding"), str) or any(p != 0 for p in argument(user, "padding"))
            return axis == 1 and argument(user, "groups") == 1 and (reading.beta is None or not padded)
        if user.target is ours.grouped_linear.default and reading.beta is not None:
            return False
        return axis == value.meta["val"].dim() - 1

    def _passes(self, user: fx.Node, value: fx.Node, axis: int, reading: _Reading) -> bool:
        if user.op != "call_function" or user.args[0] is not value:
            return False
        return axis_after(user, axis) is not None and (reading.beta is None or keeps_constants(user))

    def _end(self, value: fx.Node, axis: int, reading: _Reading, last: bool, readers: Sequence[fx.Node]) -> str | None:
        """Readers that need the model's own basis."""
        what = "is an output of the model" if readers[0].op == "output" else f"reads {_name(value, reading)}"
        who = _name(value, reading) if readers[0].op == "output" else path_of(readers[0])
        if reading.norm is None and self.made.centre:
            return f"{who} {what} without a norm, so it would miss the mean that LayerNorm takes away"
        if axis != value.meta["val"].dim() - 1 or not last:
            return f"{who} {what} and is no linear layer" if readers[0].op != "output" else f"{who} {what} before the stream ends"
        if not self.explicit:
            return f"{who} {what} and takes no rotation; explicit=True would turn it back by one more linear layer"
        self.made.products.append(Product(value, tuple(readers), True, reading.scale, reading.beta))
        return None

    # -- shared weights ---------------------------------------------------------------------------------------------

    def _why_tied(self, untie: bool) -> str | None:
        """A weight that serves several calls must change alike for all of them, or become several."""
        holders: dict[int, list[fx.Node]] = {}
        for node in self.graph.fx.find_nodes(op="get_attr"):
            holders.setdefault(id(self.graph.weight(node)), []).append(node)
        edits: dict[fx.Node, dict[fx.Node, list[tuple]]] = {}
        for e in [*self.made.reads, *self.made.writes]:
            weight = e.weight if isinstance(e, Turn) else e.constant
            edits.setdefault(weight, {}).setdefault(e.call, []).append((e.axis, tuple(str(s.target) for s in e.scales), e.centre))
        for weight, by_call in edits.items():
            first, edit = next(iter(by_call.items()))
            calls = [u for node in holders[id(self.graph.weight(weight))] for u in node.users]
            other = next((u for u in calls if edits.get(weight, {}).get(u) != edit), None)
            if other is None:
                continue
            if not untie:
                return f"{weight.target} serves {path_of(first)} and {path_of(other)}, which need it rotated differently; untie=True gives each its own"
            self.made.untied.append(str(weight.target))
        return None


def _width(norm: fx.Node) -> int:
    if norm.target is ours.rms_norm.default:
        return int(norm.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]
    sizes: Any = argument(norm, "normalized_shape")
    return int(sizes[0]) if len(sizes) == 1 else -1


def _given(node: fx.Node | None) -> tuple[fx.Node, ...]:
    return () if node is None else (node,)


def _name(value: fx.Node, reading: _Reading) -> str:
    if reading.norm is None:
        return "the stream" if reading.norm is None and value.op == "call_function" else value.name
    return f"the output of {path_of(reading.norm)}"
