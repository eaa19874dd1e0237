"""What upstream of a value can take a factor 1/s and a shift -z of its channels: norms, rows of linears, embedding columns, constants."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..evaluate import is_size, op_name
from ..graph import Graph
from ..nodes import argument, arguments, is_looked_through, number, schema
from .axes import source_axis
from .channel_constants import ChannelConstants, Constant, channel_constants, is_batch_norm, why_not_edited
from .channel_tracer import ChannelTracer
from .channels import channel_map
from .vocabulary import (
    ACTIVATIONS,
    MOVES,
    aten,
    ours,
    path_of,
)

Want = Literal["scale", "shift"]

_HOMOGENEOUS = {"relu", "leaky_relu", "abs"}
"""f(x / s) = f(x) / s for s > 0."""
_MAXIMA = {"max_pool1d", "max_pool2d", "max_pool3d", "amax"}
"""max(x / s - z) = max(x) / s - z, too."""
_MEANS = {"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"}
"""Weights that sum to 1."""
_SUMS = {"sum", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
"""Weights that do not, or not at a padded border."""
WRITTEN_OUT = {"matmul", "bmm", "baddbmm"}
"""Products of two computed values: an attention that is not one node."""
_ATTENTIONS = (ours.attention.default, ours.multi_head_attention.default)
_FAR = 64  # nodes of one walk


@dataclass(frozen=True)
class Absorber:
    """A node whose constants take a factor or a shift.

    kind: as in ChannelConstants, or "constant" of a product or sum.
    index: int64 [channels of the edge's value], the channel of `node` each one is, out of `channels`.
    scaled: the constants a factor 1/s multiplies.   shifted: the constant -z is added to; None: it takes no shift.
    factors: what multiplies the channels between here and the value: numbers and vectors of all channels a shift is divided by.
    """

    node: fx.Node
    kind: str
    index: Tensor
    channels: int
    scaled: tuple[Constant, ...]
    shifted: Constant | None
    factors: tuple[float | fx.Node, ...] = ()
    negative: bool = False
    """Whether the constant is subtracted."""


def absorbers(graph: Graph, value: fx.Node, axis: int, want: Want) -> tuple[Absorber, ...] | str:
    """Who takes a factor (or a shift) of each of the channels of `value` along `axis` (from 0), or why nobody can.

    Together they change the value and nothing else: a reader of a changed channel on the way is a reason to say no.
    """
    walk = _Walk(graph, want)
    why = walk.up(value, axis, value, axis)
    if why is not None:
        return why
    width = int(value.meta["val"].shape[axis])
    for found in walk.found:
        if len(found.index) != width or bool((found.index < 0).any()):
            return f"some of its {width} channels do not come from {path_of(found.node)}"
    return walk.foreign(value) or tuple({a.node: a for a in walk.found}.values())  # two terms of a sum may come from one linear


@dataclass
class _Walk:
    """A walk up from a value. links: (operand, reader) of all it went along, None before the value itself; holders: whose results the absorbers make."""

    graph: Graph
    want: Want
    found: list[Absorber] = field(default_factory=list)
    holders: list[fx.Node] = field(default_factory=list)
    links: dict[tuple[fx.Node, fx.Node | None], None] = field(default_factory=dict)

    def up(self, node: Any, axis: int | None, root: fx.Node, root_axis: int, factors: tuple = (), reader: fx.Node | None = None) -> str | None:
        """Why nothing above `node` can take it. axis: where the channels are, whole and in order; None: look them up from `root`."""
        for _ in range(_FAR):
            if not isinstance(node, fx.Node) or node.op != "call_function":
                return f"it comes from {node.target if isinstance(node, fx.Node) else node}, which is given"
            self.links[node, reader] = None
            if (constants := channel_constants(node)) is not None:
                return self._take(node, constants, axis, root, root_axis, factors)
            if op_name(node) in ("mul", "div"):
                return self._product(node, axis, root, root_axis, factors)
            if op_name(node) in ("add", "sub"):
                return self._sum(node, axis, root, root_axis, factors)
            passed = self._pass(node, axis)
            if isinstance(passed, str):
                return passed
            reader, (node, axis) = node, passed
        return f"nothing within {_FAR} nodes takes it"

    def _pass(self, node: fx.Node, axis: int | None) -> tuple[Any, int | None] | str:
        """(operand, its axis) of an op that what is wanted passes through unchanged, or why it does not."""
        name, source, shift = op_name(node), node.args[0], self.want == "shift"
        if node.target in _ATTENTIONS:
            why = _why_no_sum_to_one(node) if shift else None
            return why or (node.args[2], None)
        if node.target is operator.getitem:
            return source, None
        if node.target in (aten.pad.default, aten.constant_pad_nd.default):
            amounts: Any = node.args[1]
            if shift and any(amounts) or argument(node, "value"):
                return f"{node.name} pads with {argument(node, 'value') or 0}, which would have to move along"
            first = 0 if axis is None else 2 * (node.meta["val"].dim() - 1 - axis)  # amounts come in pairs, those of the last axis first
            return source, None if any(amounts[first : first + 2]) else axis
        if is_looked_through(node) or node.target in MOVES:
            if not isinstance(source, fx.Node):
                return f"{name} joins it from several values"
            return source, source_axis(node, axis) if axis is not None else None
        if name in _HOMOGENEOUS:
            return f"a shift does not pass {name}" if shift else (source, axis)
        if name in _MAXIMA | _MEANS | _SUMS:
            if shift and name in _SUMS:
                return f"a shift does not pass {name}"
            return source, _pooled_axis(node, axis)
        if name in WRITTEN_OUT:
            return f"{node.name} weighs values by hand, perhaps beside attention sinks: its weights are not known to sum to 1, nor whose channels it keeps"
        if node.target in ACTIVATIONS or "softmax" in name:
            return f"neither a factor nor a shift passes {ACTIVATIONS.get(node.target, name)}"  # type: ignore[arg-type]
        return f"it is made by {name or node.name} ({path_of(node)}), which has no constants to take a {'shift' if shift else 'factor'}"

    def _take(self, node: fx.Node, found: ChannelConstants | str, axis: int | None, root: fx.Node, root_axis: int, factors: tuple) -> str | None:
        if isinstance(found, str):
            return found
        if self.want == "shift" and found.shifted is None:
            return found.no_shift
        width = int(node.meta["val"].shape[found.axis])
        if axis is not None and axis != found.axis:
            return f"{path_of(node)} counts its channels along another axis"
        if axis is not None:
            index = torch.arange(width)
        elif is_batch_norm(node):
            return f"the channels are rearranged after {path_of(node)}"
        elif isinstance(traced := channel_map(self.graph, node, root, root_axis), str):
            return traced
        else:
            index = traced.index
        self._add(Absorber(found.node, found.kind, index, width, found.scaled, found.shifted, factors), node)
        return None

    def _add(self, absorber: Absorber, holder: fx.Node) -> None:
        self.found.append(absorber)
        self.holders.append(holder)

    def _try(self, operand: fx.Node, axis: int | None, root: fx.Node, root_axis: int, factors: tuple, reader: fx.Node) -> str | None:
        """As `up`, leaving no trace when it fails."""
        before = list(self.found), list(self.holders), dict(self.links)
        why = self.up(operand, axis, root, root_axis, factors, reader)
        if why is not None:
            self.found, self.holders, self.links = before
        return why

    def _product(self, node: fx.Node, axis: int | None, root: fx.Node, root_axis: int, factors: tuple) -> str | None:
        """One factor takes 1/s: a constant vector, else what is computed, the activated side last. A shift passes constants only."""
        operands: Any = node.args[:2]
        left, right = operands
        vector = next((a for a in (left, right) if _is_vector(a, node, axis)), None)
        if op_name(node) == "mul" and isinstance(vector, fx.Node) and self.want == "scale":
            width = int(vector.meta["val"].numel())
            own = Constant(schema(node.target)[0 if vector is left else 1][0], _own_axis(vector))
            self._add(Absorber(node, "constant", torch.arange(width), width, (own,), None, factors), node)
            return None
        if self.want == "shift":
            return self._shift_product(node, axis, root, root_axis, factors, vector)
        sides = [a for a in ((left, right) if op_name(node) == "mul" else (left,)) if _is_activation(a)]
        sides.sort(key=lambda a: a.target in ACTIVATIONS)
        whys: list[str] = []
        for side in sides:
            side_axis = _operand_axis(side, node, axis)
            if len(sides) > 1 and side_axis is None:
                whys.append(f"the channels are rearranged after {node.name}")
                continue
            start = (side, side_axis) if side_axis is not None else (root, root_axis)
            why = self._try(side, side_axis, *start, factors, node)
            if why is None:
                return None
            whys.append(why)
        return whys[0] if whys else f"{node.name} has no computed factor"

    def _shift_product(self, node: fx.Node, axis: int | None, root: fx.Node, root_axis: int, factors: tuple, vector: fx.Node | None) -> str | None:
        operands: Any = node.args[:2]
        left, right = operands
        constant, other = (left, right) if left is vector or number(self.graph, left) is not None else (right, left)
        value = number(self.graph, constant)
        factor: Any = vector
        if value is not None:
            factor = value if op_name(node) == "mul" else 1 / value if value and constant is right else None
        elif op_name(node) == "div":
            factor = None
        if factor is None:
            return f"a shift does not pass the product {node.name}"
        weight = self.graph.weight(factor) if isinstance(factor, fx.Node) else torch.tensor(float(factor))
        if not weight.is_meta and bool((weight == 0).any()):
            return f"a shift does not pass {node.name}, which multiplies some channels by 0"
        return self.up(other, axis, root, root_axis, (*factors, factor), node)

    def _sum(self, node: fx.Node, axis: int | None, root: fx.Node, root_axis: int, factors: tuple) -> str | None:
        """A factor goes into all terms; a shift into a constant if there is one, else into any one term."""
        if argument(node, "alpha") != 1:
            return f"{node.name} adds a multiple"
        operands: Any = node.args[:2]
        left, right = operands
        terms = [a for a in (left, right) if _is_activation(a)]
        constants = [a for a in (left, right) if not _is_activation(a)]
        if not constants:
            return self._joined(node, axis, terms, factors)
        constant, negative = constants[0], op_name(node) == "sub" and constants[0] is right
        if op_name(node) == "sub" and not negative:
            return f"{node.name} subtracts it from a constant"
        place = _place(constant, node, axis)
        if place is not None:
            own = Constant(schema(node.target)[0 if constant is left else 1][0], place)
            width = int(constant.meta["val"].shape[place])
            self._add(Absorber(node, "constant", torch.arange(width), width, (own,), own, factors, negative), node)
            if self.want == "shift":
                return None
        elif self.want == "scale":
            return f"{node.name} adds {constant if isinstance(constant, int | float) else 'a constant'} to all channels alike"
        return self.up(terms[0], _operand_axis(terms[0], node, axis), root, root_axis, factors, node)

    def _joined(self, node: fx.Node, axis: int | None, terms: list[Any], factors: tuple) -> str | None:
        whys = []
        for term in terms[: 1 if self.want == "shift" and op_name(node) == "sub" else 2]:
            term_axis = _operand_axis(term, node, axis)
            if term_axis is None:
                return f"the channels are rearranged after {node.name}"
            why = self._try(term, term_axis, term, term_axis, factors, node)
            if self.want == "shift" and why is None or self.want == "scale" and why is not None:
                return why
            whys += [why] if why is not None else []
        return whys[0] if whys else None

    # -- who else reads what would change ------------------------------------------------------------------------------

    def foreign(self, value: fx.Node) -> str | None:
        """Why the change would reach somebody else: a reader off the path of a changed channel."""
        tracers = [(ChannelTracer(self.graph, holder), absorber) for holder, absorber in zip(self.holders, self.found)]
        for node, _ in self.links:
            for user in node.users if node is not value else ():
                if is_size(user) or (node, user) in self.links and _times(node, user) == 1:
                    continue
                for tracer, absorber in tracers:
                    if (reader := _reader(tracer, absorber, node, user)) is not None:
                        return f"{path_of(node)} is also read by {path_of(reader) if reader.op != 'output' else 'the output of the model'}"
        return None


def _times(operand: fx.Node, user: fx.Node) -> int:
    """How often a call reads a value: x * x reads x twice."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(operand)


def _reader(tracer: ChannelTracer, absorber: Absorber, operand: fx.Node, user: fx.Node) -> fx.Node | None:
    """Who below `user` (or itself) computes with one of the absorber's changed channels."""
    moves = user.target in MOVES or user.target is operator.getitem or user.op == "call_function" and is_looked_through(user)
    if tracer.producer is None or operand < tracer.producer:
        return None  # above this absorber
    codes = tracer.trace(user if moves else operand).codes
    if codes is None:
        return user
    edited = absorber.index.unique()
    if not any(bool(torch.isin(c, edited).any()) for c in _distinct(codes)):
        return None
    if not moves:
        return user
    return next((r for u in user.users if not is_size(u) and (r := _reader(tracer, absorber, user, u)) is not None), None)


def _distinct(codes: Any) -> Iterator[Tensor]:
    for c in codes if isinstance(codes, list | tuple) else (codes,):
        for d in range(c.dim()):
            c = c.narrow(d, 0, 1) if c.stride(d) == 0 else c
        yield c


def _why_no_sum_to_one(node: fx.Node) -> str | None:
    """A row of weights that sums to 1 passes a shift on; one of a query that sees no key is zero.

    Hidden keys are no reason: the op leaves a row without any open, and no valid output depends on it.
    """
    if not argument(node, "causal") and argument(node, "window") is None:
        return None
    tokens = 1 if node.target is ours.multi_head_attention.default else 2
    queries, keys = (a.meta["val"].shape[tokens] for a in node.args[:2])  # type: ignore[union-attr]
    if statically_known_true(keys >= queries):
        return None
    return f"{node.name} has {queries} queries and {keys} keys: the first may see none, their weights do not sum to 1, and a shift would be lost there"


def _pooled_axis(node: fx.Node, axis: int | None) -> int | None:
    given = arguments(node)
    if axis is None or "dim" not in given or node.meta["val"].dim() == node.args[0].meta["val"].dim():  # type: ignore[union-attr]
        return axis
    dims = given["dim"]
    if dims is None:
        return None
    before = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    gone = {d % before for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return [d for d in range(before) if d not in gone][axis]


def _is_activation(operand: Any) -> bool:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) and operand.op != "get_attr" else None
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _operand_axis(operand: fx.Node, node: fx.Node, axis: int | None) -> int | None:
    """The axis of an operand that broadcasts to `axis` of the result, where it counts all channels."""
    if axis is None:
        return None
    value, result = operand.meta["val"], node.meta["val"]
    own = axis - (result.dim() - value.dim())
    return own if own >= 0 and value.shape[own] == result.shape[axis] else None


def _place(constant: Any, node: fx.Node, axis: int | None) -> int | None:
    """The axis along which a stored constant counts the channels of the result."""
    if not isinstance(constant, fx.Node) or constant.op != "get_attr" or why_not_edited(constant, node) is not None:
        return None
    return _operand_axis(constant, node, axis)


def _is_vector(constant: Any, node: fx.Node, axis: int | None) -> bool:
    """Whether a stored constant is one number a channel of the result."""
    place = _place(constant, node, axis)
    return place is not None and constant.meta["val"].numel() == constant.meta["val"].shape[place]


def _own_axis(vector: fx.Node) -> int:
    return next(d for d, size in enumerate(vector.meta["val"].shape) if size == vector.meta["val"].numel())
