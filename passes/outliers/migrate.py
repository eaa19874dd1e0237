"""X -> X~ = (X - z) / s on one edge, undone by the linears that read it: the exact edit behind every method of outlier migration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks.absorbers import Absorber
from ...ir.blocks.channel_constants import ChannelConstants, Constant, channel_constants
from ...ir.blocks.edges import Edge, Fork
from ...ir.errors import UsageError
from ...ir.graph import Graph
from ...ir.nodes import argument, same_shape, schema

aten, ours = torch.ops.aten, torch.ops.rewright

Explicit = Literal["never", "linear", "restore"]
"""What to do where X can't change for its linears alone: nothing; subtract and multiply on their edges; or change it and restore it for the other readers."""

LOWEST, HIGHEST = 1e-4, 1e4  # of s
_DONE = "_migrated"  # ends the names of the weights an edit makes


@dataclass(frozen=True)
class Road:
    """How an edge's X becomes X~. scale, shift: who takes 1/s and -z; () for an op at run time; a sentence where it can't be done at all."""

    scale: tuple[Absorber, ...] | str
    shift: tuple[Absorber, ...] | str
    restored: bool = False
    """Whether the other readers get s X~ + z."""

    @property
    def tied(self) -> bool:
        """Whether s and z have to be equal for channels that come from the same channel upstream."""
        return any(not isinstance(into, str) and into for into in (self.scale, self.shift))


def road(edge: Edge, explicit: Explicit) -> Road:
    """What `migrate` would do to an edge."""
    if edge.fixed is not None:
        return Road(edge.fixed, edge.fixed)
    scale, shift = edge.scale_into, edge.shift_into
    if edge.others and explicit != "restore":
        if explicit == "never":
            names = ", ".join("the output of the model" if o.op == "output" else o.name for o in edge.others)
            scale = shift = f"{edge.value.name} is also read by {names}; explicit = 'linear' or 'restore' would take care of them"
        else:
            scale = shift = ()
    elif explicit == "linear":
        scale, shift = (() if isinstance(into, str) else into for into in (scale, shift))
    return Road(scale, edge.no_shift or shift, bool(edge.others) and explicit == "restore")


def migrate(graph: Graph, edge: Edge, scale: Tensor | None = None, shift: Tensor | None = None, explicit: Explicit = "never") -> None:
    """Divide an edge's value by `scale` > 0 and subtract `shift`, both [channels], and undo it in the linears that read it: the function stays.

    (X - z) / s, W s, b + W z (SmoothQuant, Xiao et al. 2023; Outlier Suppression+, Wei et al. 2023). Weights are folded in float64 and
    cast once; with powers of two for s and no shift all outputs are bit-equal. s is clamped to 1e-4 .. 1e4.
    Raises UsageError where `road` says it can't be done, and for unequal numbers on channels that are tied (`edge.ties`).
    """
    way = road(edge, explicit)
    for what, vector, into in (("scale", scale, way.scale), ("shift", shift, way.shift)):
        if vector is not None and isinstance(into, str):
            raise UsageError(f"no {what} on the edge of {edge.value.name}: {into}")
        if vector is not None and into and not torch.equal(vector, tied(vector, edge.ties, "amax")):
            raise UsageError(f"the {what} of {edge.value.name} differs between channels that come from the same channel; take the largest of each of edge.ties")
    s = None if scale is None else scale.detach().double().cpu().clamp(LOWEST, HIGHEST)
    z = None if shift is None else shift.detach().double().cpu()
    for node in edge.linears:
        _undo(graph, node, s, z)
    _absorb(graph, way, s, z)
    _insert(graph, edge, way, s, z)
    if way.restored:
        _restore(graph, edge, s, z)


def tied(vector: Tensor, classes: Tensor, how: Literal["amax", "amin", "sum"]) -> Tensor:
    """[channels] -> [channels]: what each class of channels has in common."""
    start = torch.zeros(int(classes.max()) + 1, dtype=vector.dtype)
    return start.scatter_reduce(0, classes, vector.cpu(), how, include_self=False)[classes]


# -- the edits --------------------------------------------------------------------------------------------------------


def _undo(graph: Graph, node: fx.Node, s: Tensor | None, z: Tensor | None) -> None:
    """Columns times s; W z into the bias, with W as it was."""
    weight: Any = node.args[1]
    if z is not None:
        bias: Any = argument(node, "bias")
        sources = [str(w.target) for w in (weight, bias) if w is not None]
        name = str(bias.target) if bias is not None else f"{str(weight.target).removesuffix('weight')}bias"
        _set(graph, node, "bias", _new(graph, name, _ShiftedBias(z), sources, node))
    if s is not None:
        place = "w" if node.target is ours.grouped_linear.default else "weight"
        _set(graph, node, place, _new(graph, str(weight.target), _PerChannel(1, divide=1 / s), [str(weight.target)], node))


def _absorb(graph: Graph, way: Road, s: Tensor | None, z: Tensor | None) -> None:
    """1/s and -z into the constants upstream; one that takes both is shifted first."""
    takes: dict[fx.Node, tuple[Absorber, bool, bool]] = {}
    for into, vector, which in ((way.scale, s, 0), (way.shift, z, 1)):
        for found in into if vector is not None and not isinstance(into, str) else ():
            _, scaled, shifted = takes.get(found.node, (found, False, False))
            takes[found.node] = found, scaled or which == 0, shifted or which == 1
    for node, (found, scaled, shifted) in takes.items():
        divide = _upstream(s, found, 1.0) if scaled and s is not None else None
        subtract = _upstream(-z if found.negative else z, found, 0.0) if shifted and z is not None else None
        factors = [f for f in found.factors if isinstance(f, fx.Node)]
        if subtract is not None:
            subtract = subtract / math.prod(f for f in found.factors if not isinstance(f, fx.Node))
        constants = list(found.scaled) if scaled else []
        constants += [found.shifted] if shifted and found.shifted is not None and found.shifted not in constants else []
        for constant in constants:
            if constant == found.shifted and subtract is not None:
                _change(graph, node, constant, _PerChannel(constant.axis, divide, subtract), factors)
            elif constant.neutral != 0 or argument(node, constant.argument) is not None:  # a bias that isn't there needs no factor
                _change(graph, node, constant, _PerChannel(constant.axis, divide), [])


def _change(graph: Graph, node: fx.Node, constant: Constant, change: _PerChannel, factors: list[fx.Node]) -> None:
    """Change one argument as it is now: another edge may have changed or made it."""
    weight: Any = argument(node, constant.argument)
    if weight is None:
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        name, function = f"{_owner(node)}.{constant.argument}", _Made(constant.neutral, value, change)
    else:
        name, function = str(weight.target), change
    sources = [str(w.target) for w in (weight, *factors) if w is not None]
    _set(graph, node, constant.argument, _new(graph, name, function, sources, node))


def _insert(graph: Graph, edge: Edge, way: Road, s: Tensor | None, z: Tensor | None) -> None:
    """The ops at run time, once a fork, shared by all its linears: X - z, then times 1/s."""
    by_op = [(aten.sub.Tensor, z, "shift", way.shift), (aten.mul.Tensor, None if s is None else 1 / s, "scale", way.scale)]
    if s is not None and z is not None and way.scale and not way.shift:
        by_op[0] = (aten.sub.Tensor, z / s, "shift", way.shift)  # the factor comes before it
    steps = [(op, vector, what) for op, vector, what, into in by_op if vector is not None and into == ()]
    for fork in edge.forks if steps else ():
        if fork.to_linears:
            _redirect(graph, edge, fork.value, fork.axis, fork.to_linears, steps)


def _restore(graph: Graph, edge: Edge, s: Tensor | None, z: Tensor | None) -> None:
    """X = s X~ + z for everybody else; where that is a sum with what a linear makes, z goes into its bias."""
    unscale, unshift = [(aten.mul.Tensor, s, "unscale")] if s is not None else [], [(aten.add.Tensor, z, "unshift")] if z is not None else []
    for fork in edge.forks:
        folded = []
        for user in fork.to_others:
            if z is not None and (linear := _addend(user, fork)) is not None:
                _change(graph, linear, Constant("bias", 0, 0.0), _PerChannel(0, subtract=-z), [])
                folded.append(user)
        for users, steps in ((tuple(folded), unscale), (tuple(u for u in fork.to_others if u not in folded), [*unscale, *unshift])):
            if users and steps:
                _redirect(graph, edge, fork.value, fork.axis, users, steps)


def _addend(node: fx.Node, fork: Fork) -> fx.Node | None:
    """The linear, with a bias of its own or none, whose output a sum (and nothing else) adds to a fork's value of the same shape."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2 or fork.axis != fork.value.meta["val"].dim() - 1:
        return None
    other: Any = node.args[1] if node.args[0] is fork.value else node.args[0]
    if not isinstance(other, fx.Node) or other.target is not aten.linear.default or len(other.users) != 1:
        return None
    found = channel_constants(other)
    return other if isinstance(found, ChannelConstants) and same_shape(other.meta["val"].shape, fork.value.meta["val"].shape) else None


def _redirect(graph: Graph, edge: Edge, value: fx.Node, axis: int, users: tuple[fx.Node, ...], steps: list[tuple[Any, Tensor, str]]) -> None:
    """The users read what the steps make of a value."""
    kept = value.meta["val"]
    made = value
    for op, vector, what in steps:
        constant = vector.to(kept.dtype).to(kept.device).view(-1, *[1] * (kept.dim() - 1 - axis))
        made = graph.insert(op, made, _new(graph, f"{_owner(edge.linears[0])}.input_{what}", _Given(constant), [], value), before=min(users), like=value)
    for user in users:
        user.replace_input_with(value, made)


def _upstream(vector: Tensor, found: Absorber, rest: float) -> Tensor:
    """A vector over the value's channels as one over the absorber's; `rest` for channels that are not the value's."""
    upstream = torch.full((found.channels,), rest, dtype=torch.float64)
    upstream[found.index] = vector
    return upstream


def _new(graph: Graph, name: str, function: Any, sources: list[str], like: fx.Node) -> fx.Node:
    head, done, number = name.rpartition(_DONE)
    base = head if done and (not number or number[1:].isdigit()) else name
    return graph.add_weight(f"{base}{_DONE}", function, *sources, like=like)


def _set(graph: Graph, node: fx.Node, name: str, weight: fx.Node) -> None:
    """Set one argument of a call by its schema name."""
    names = [n for n, *_ in schema(node.target)]
    place, inferred = names.index(name), graph.is_inferred(node)
    if place < len(node.args):
        node.update_arg(place, weight)
    elif place == len(node.args) and not node.kwargs:
        node.args = (*node.args, weight)
    else:
        node.update_kwarg(name, weight)
    if inferred and not graph.is_inferred(node):  # it has a bias now
        graph.infer(node)


def _owner(node: fx.Node) -> str:
    return node.meta.get("path") or node.name


# -- what the new weights are made by ----------------------------------------------------------------------------------


class _PerChannel:
    """(w - subtract / factors) / divide along one axis, in float64."""

    def __init__(self, axis: int, divide: Tensor | None = None, subtract: Tensor | None = None) -> None:
        self.axis, self.divide, self.subtract = axis, divide, subtract

    def __call__(self, w: Tensor, *factors: Tensor) -> Tensor:
        made = w.double()
        shape = [-1 if d == self.axis else 1 for d in range(w.dim())]
        if self.subtract is not None:
            subtract = self.subtract.to(w.device)
            for factor in factors:
                subtract = subtract.to(factor.device) / factor.double().flatten()
            made = made.to(subtract.device) - subtract.view(shape)
        if self.divide is not None:
            made = made / self.divide.to(made.device).view(shape)
        return made.to(w.dtype)


class _Made:
    """A constant a layer did not have: zeros or ones of its output's type, changed."""

    def __init__(self, neutral: float | None, like: Tensor, change: _PerChannel) -> None:
        channels = len(next(v for v in (change.divide, change.subtract) if v is not None))
        self.neutral, self.change = torch.full((channels,), neutral or 0.0, dtype=like.dtype, device=like.device), change

    def __call__(self, *factors: Tensor) -> Tensor:
        return self.change(self.neutral, *factors)


class _ShiftedBias:
    """b + W z for W [out, in, ...]; b is 0 where there is none."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def __call__(self, w: Tensor, b: Tensor | None = None) -> Tensor:
        moved = w.double().flatten(2).sum(2) if w.dim() > 2 else w.double()
        made = moved @ self.z.to(w.device)
        return (made if b is None else b.double() + made).to(w.dtype)


class _Given:
    """A constant as it is."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> Tensor:
        return self.value
