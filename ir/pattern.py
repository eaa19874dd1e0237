"""Find small patterns in a Graph: operand order, spellings, casts and shape arguments don't matter; misses have reasons."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from .graph import Graph
from .nodes import CASTS, arguments, no_op_source, number, schema

aten = torch.ops.aten

COMMUTATIVE = {"add", "mul", "eq", "ne", "__and__", "__or__", "bitwise_and", "bitwise_or", "logical_and", "logical_or", "maximum", "minimum"}
IMMATERIAL = {"cudnn_enable", "memory_format", "pin_memory", "layout", "device", "generator", "implicit", "non_blocking"}
"""Schema arguments that don't change values; a pattern never mentions them."""


# -- the pattern language -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Var:
    """Matches any value and binds it; the same Var twice must bind the same value."""

    name: str


@dataclass(frozen=True, eq=False)
class Anything:
    """Matches any value, binds nothing: shape arguments."""


@dataclass(frozen=True, eq=False)
class Call:
    """Matches a call of any overload of `name` whose operands match; what it leaves out must have its default."""

    name: str
    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Call:
        return Call("getitem", (operator.getitem,), (self, index))


@dataclass(frozen=True, eq=False)
class Either:
    """Matches the first alternative that fits."""

    options: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class MaybeCast:
    """Looks through a dtype conversion when there is one."""

    inner: Any


@dataclass(frozen=True, eq=False)
class WeightOnly:
    """Matches `inner` if the value is a weight or constant of the graph."""

    inner: Any


class Op:
    """`op.add(x, y)` in a pattern stands for any overload of rewright's or ATen's `add`."""

    anything = Anything()

    def __getattr__(self, name: str) -> Callable[..., Call]:
        targets = overloads(name)
        return lambda *args, **kwargs: Call(name, targets, args, kwargs)

    def either(self, *options: Any) -> Either:
        """One of several spellings."""
        return Either(options)

    def maybe_cast(self, inner: Any) -> MaybeCast:
        """`inner`, or a dtype conversion of it."""
        return MaybeCast(inner)

    def weight(self, inner: Any) -> WeightOnly:
        """`inner`, when it is a weight."""
        return WeightOnly(inner)


@cache
def overloads(name: str) -> tuple[Any, ...]:
    """All overloads of an op by its short name: ours first, then ATen's."""
    for namespace in (torch.ops.rewright, aten):
        packet = getattr(namespace, name, None)
        if packet is not None:
            return tuple(getattr(packet, o) for o in packet.overloads() if "out" not in o.split("_") and not o.endswith("out"))
    raise AttributeError(f"no op named {name!r} in torch.ops.rewright or torch.ops.aten")


# -- matching -------------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """One occurrence: bound values by name (`m.x`), the matched calls, and where in the model they are."""

    values: dict[str, Any]
    nodes: list[fx.Node]
    """Every matched call, in graph order."""
    outputs: tuple[fx.Node, ...]
    """The nodes of the pattern's returned values."""
    graph: Graph

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"the pattern binds no {name!r}; it binds {', '.join(self.values)}") from None

    @property
    def anchor(self) -> fx.Node:
        """The node of the first returned value."""
        return self.outputs[0]

    @property
    def path(self) -> str:
        """Module path of the anchor in the original model."""
        return self.anchor.meta.get("path", "")

    def weight(self, node: fx.Node) -> torch.Tensor:
        """The tensor of a bound weight node."""
        return self.graph.weight(node)


@dataclass(frozen=True)
class Miss:
    """Why a candidate is no match: how many calls fitted before `node` did not, and why."""

    anchor: fx.Node
    fitted: int
    node: fx.Node | None
    why: str

    def __str__(self) -> str:
        where = f" ({self.anchor.meta['path']})" if self.anchor.meta.get("path") else ""
        return f"{self.anchor.name}{where}: {self.why} ({self.fitted} call{'s' * (self.fitted != 1)} fitted)"


@dataclass(frozen=True)
class _State:
    values: dict[str, Any]
    calls: dict[int, fx.Node]  # id(pattern Call) -> node


class Pattern:
    """A compiled pattern: `Pattern(rewrite.pattern)`; its parameters after `op` are the wildcards."""

    def __init__(self, function: Callable[..., Any]) -> None:
        import inspect

        names = list(inspect.signature(function).parameters)[1:]
        returned = function(Op(), *(Var(n) for n in names))
        self.outputs: tuple[Any, ...] = returned if isinstance(returned, tuple) else (returned,)
        self.anchors = tuple(_anchor_targets(self.outputs[0]))

    def candidates(self, graph: Graph) -> list[fx.Node]:
        """Every node the pattern's first output could be."""
        return graph.find(*self.anchors)

    def match(self, graph: Graph, node: fx.Node) -> Match | Miss:
        """The pattern with `node` as its first output, or the nearest miss."""
        search = _Search(graph, node)
        for state in search.value(self.outputs[0], node, _State({}, {})):
            outputs = [node]
            for out in self.outputs[1:]:
                found = state.calls.get(id(out)) if isinstance(out, Call) else None
                if found is None:
                    raise AssertionError("a pattern's further outputs must be calls its first output is computed from")
                outputs.append(found)
            return Match(state.values, sorted(set(state.calls.values())), tuple(outputs), graph)
        return Miss(node, search.fitted, search.where, search.why)


def _anchor_targets(pattern: Any) -> Iterator[Any]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _anchor_targets(option)
    elif isinstance(pattern, MaybeCast):
        yield from _anchor_targets(pattern.inner)
    elif isinstance(pattern, Call):
        yield from pattern.targets
    else:
        raise AssertionError("a pattern must return a call")


class _Search:
    """One attempt at one anchor; remembers the failure that came after the most fitted calls."""

    def __init__(self, graph: Graph, anchor: fx.Node) -> None:
        self.graph, self.fitted, self.where, self.why = graph, -1, anchor, "nothing fitted"

    def miss(self, state: _State, node: Any, why: str) -> None:
        if len(state.calls) > self.fitted:
            self.fitted, self.why = len(state.calls), why
            self.where = node if isinstance(node, fx.Node) else self.where

    def value(self, pattern: Any, value: Any, state: _State) -> Iterator[_State]:
        if isinstance(pattern, Anything):
            yield state
        elif isinstance(pattern, Var):
            if pattern.name not in state.values:
                yield _State({**state.values, pattern.name: value}, state.calls)
            elif _equal(state.values[pattern.name], value):
                yield state
            else:
                self.miss(state, value, f"{pattern.name} is {_say(state.values[pattern.name])} in one place and {_say(value)} in another")
        elif isinstance(pattern, Either):
            for option in pattern.options:
                yield from self.value(option, value, state)
        elif isinstance(pattern, MaybeCast):
            yield from self.value(pattern.inner, value, state)
            if isinstance(value, fx.Node) and value.target in CASTS:
                yield from self.value(pattern.inner, value.args[0], state)
        elif isinstance(pattern, WeightOnly):
            if self.graph.is_weight(value):
                yield from self.value(pattern.inner, value, state)
            else:
                self.miss(state, value, f"{_say(value)} stands where a weight was expected")
        elif isinstance(pattern, Call):
            yield from self.call(pattern, value, state)
        elif isinstance(pattern, list | tuple):
            yield from self.sequence(pattern, value, state)
        elif self.literal(pattern, value):
            yield state
        else:
            self.miss(state, value, f"{_say(value)} stands where {pattern!r} was expected")

    def call(self, pattern: Call, value: Any, state: _State) -> Iterator[_State]:
        if id(pattern) in state.calls:
            if state.calls[id(pattern)] is value:
                yield state
            else:
                self.miss(state, value, f"{_say(value)} is not the {pattern.name} matched before ({state.calls[id(pattern)].name})")
            return
        node = value
        while isinstance(node, fx.Node) and node.op == "call_function" and node.target not in pattern.targets and (source := no_op_source(node)) is not None:
            node = source
        if not isinstance(node, fx.Node) or node.target not in pattern.targets:
            self.miss(state, value, f"{_say(value)} stands where {pattern.name} was expected")
            return
        given = arguments(node)
        positions = list(given)
        if len(pattern.args) > len(positions):
            self.miss(state, node, f"{node.name} takes {len(positions)} arguments, the pattern gives {len(pattern.args)}")
            return
        mentioned = {**dict(zip(positions, pattern.args)), **pattern.kwargs}
        if unknown := [name for name in mentioned if name not in given]:
            self.miss(state, node, f"{node.name} is an overload without {', '.join(unknown)}")
            return
        for name, actual in given.items():
            if name not in mentioned and name not in IMMATERIAL and actual != _default(node, name):
                self.miss(state, node, f"{node.name} has {name}={_say(actual)}, the pattern has the default")
                return
        entered = _State(state.values, {**state.calls, id(pattern): node})
        orders = [mentioned]
        if pattern.name in COMMUTATIVE and len(pattern.args) >= 2:
            first, second = positions[:2]
            orders.append({**mentioned, first: mentioned[second], second: mentioned[first]})
        for order in orders:
            yield from self.all([(p, given[name]) for name, p in order.items()], entered)

    def sequence(self, pattern: list | tuple, value: Any, state: _State) -> Iterator[_State]:
        if not isinstance(value, list | tuple) or len(value) != len(pattern):
            self.miss(state, value, f"{_say(value)} stands where a list of {len(pattern)} was expected")
            return
        yield from self.all(list(zip(pattern, value)), state)

    def all(self, pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        for after in self.value(*pairs[0], state):
            yield from self.all(pairs[1:], after)

    def literal(self, expected: Any, value: Any) -> bool:
        if isinstance(value, fx.Node):
            value = value if (one := number(self.graph, value)) is None else one
        if isinstance(expected, float) and isinstance(value, float | int) and not isinstance(value, bool):
            return abs(expected - value) <= 1e-6 * abs(expected)  # constants are spelt with 7 to 17 digits
        return type(expected) is type(value) and bool(expected == value) or isinstance(expected, int) and isinstance(value, float) and expected == value


def _default(node: fx.Node, name: str) -> Any:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    return next((default for n, _, default in schema(node.target) if n == name), None)


def _equal(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, fx.Node) or isinstance(b, fx.Node) else bool(a == b)


def _say(value: Any) -> str:
    if isinstance(value, fx.Node):
        kind = {"placeholder": "the input", "get_attr": "the weight"}.get(value.op)
        return f"{kind} {value.target}" if kind else f"{value.name} ({str(value.target).removeprefix('aten.').removeprefix('rewright.').split('.')[0]})"
    return repr(value)
