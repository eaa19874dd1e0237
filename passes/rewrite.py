"""The pass contract: `Rewrite` for local patterns, `GraphPass` for whole-graph edits, and the driver that applies them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..ir.errors import PromiseBroken, UsageError
from ..ir.graph import Graph
from ..ir.nodes import is_looked_through, same_shape
from ..ir.pattern import Match, Miss, Pattern, overloads
from ..ir.walk import load_weight
from .statistics import Calibration, Order, Request, Source, Statistics, linear_inputs, moments_in_order

NOT_ASKED = "not asked for here"
"""Why a pass that was given `Context.only` leaves the rest alone."""


@dataclass(frozen=True)
class Declined:
    """A place a pass left alone, and why."""

    node: str
    layer: str
    why: str


@dataclass(frozen=True)
class Recovered:
    """A graph behind a training run."""

    graph: Graph
    sentence: str
    """What came back and how long it took."""
    trained: int = 0
    """How many weights (tensors) were."""
    better: tuple[str, ...] = ()
    """Their names; none where no weights were better than the first, which the graph then has."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The curve and its conditions, as plain data."""


@dataclass
class Context:
    """What a pass may know besides the graph, and the log it fills. Made by the pipeline, one a pass."""

    target: Any = None
    """backends.target.Target, or None when nothing is known about the hardware."""
    predict: Callable[..., float] | None = None
    """Predicted seconds of a graph on the target, at its example sizes or at given ones (dim name -> size); None without a target."""
    seed: int = 0
    ignore: tuple[str, ...] = ()
    """Module paths (prefixes) no lossy pass may touch."""
    only: frozenset[str] | None = None
    """Names of the nodes a pass is to look at; None: all."""
    moments: Source | None = None
    """Where a pass gets the moments of layers from that it rewrites in order; None: it asks for its own (see `moments_in_order`)."""
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    statistics: Statistics | None = None
    """What the pass requires, of the graph it is given."""
    calibration: Calibration | None = None
    """The calibration inputs (`batches`), and `gather` for statistics of a graph the pass is in the middle of editing."""
    trained_later: bool = False
    """Whether a pass to come trains the program, so that its loss may come back."""
    finetune: Callable[[Graph, Mapping[str, Any]], Recovered] | None = None
    """Trains a graph to give what the original gives; options by name. None in a dry run, which does not train."""
    applied: list[str] = field(default_factory=list)
    """Module path of every application, in order."""
    declined: list[Declined] = field(default_factory=list)
    matched: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    """What a pass found on its way, as plain data: the curve of a training run."""

    @property
    def target_name(self) -> str:
        """What sentences call the target."""
        return getattr(self.target, "name", "the target")

    def apply(self, node: fx.Node) -> None:
        """Log one match that was rewritten."""
        self.matched += 1
        self.applied.append(node.meta.get("path", "") or node.name)

    def decline(self, node: fx.Node, why: str) -> None:
        """Log one match that was left alone."""
        self.matched += 1
        self.declined.append(Declined(node.name, node.meta.get("path", ""), why))

    def weight(self, graph: Graph, node: Any) -> Tensor:
        """A weight's tensor; where the graph is on meta, from calibration's weights. Raises UsageError when there are none."""
        held = graph.weight(node).detach()
        if not held.is_meta:
            return held
        if self.calibration is None or self.calibration.weights is None:
            raise UsageError(
                f"the graph has no weights and the numbers of {node.target} are needed; give calibration a WeightStore of them, Graph.materialize the graph, "
                "or choose options that look at no weights (allocation = uniform, shared = packed)"
            )
        return load_weight(graph, str(node.target), self.calibration.weights)

    def moments_in_order(self, graph: Graph, order: Order) -> Source:
        """Where to get each layer's moments from; to be called before the first edit of `graph`."""
        return self.moments or moments_in_order(graph, order, self.statistics, self.calibration)

    def ignored(self, node: fx.Node) -> str | None:
        """The sentence for a node the user asked to leave alone."""
        if self.only is not None and node.name not in self.only:
            return NOT_ASKED
        path = node.meta.get("path", "")
        hit = next((i for i in self.ignore if path == i or path.startswith(i + ".")), None)
        return f"the user asked to leave {hit} alone" if hit else None


def predicted(before: float, after: float) -> str:
    """Predicted seconds in words, of a program or of a part, before and after a rewrite."""
    return f"predicted {1e6 * after:,.0f} us against {1e6 * before:,.0f} us"


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program. Its dataclass fields are its options in Python, recipes and the CLI."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    """True promises the same function: bit-equal, or within the fp tolerance of ir.verify."""
    shortens_outputs: ClassVar[bool] = False
    """True: outputs may have fewer rows than before (cached keys and values of dropped tokens); those are not compared with the original's."""
    trains: ClassVar[bool] = False
    """True: it trains the program's weights by `context.finetune`; what passes before it lost may come back (see Pipeline)."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Kinds of statistics (passes.statistics.KINDS) the pass reads from `context.statistics`."""

    def requests(self, graph: Graph) -> Sequence[Request]:
        """Which values it requires them of: by default the inputs of all linears."""
        return linear_inputs(graph, self.requires) if self.requires else []

    def run(self, graph: Graph, context: Context) -> Graph:
        """Edit the graph in place, log in `context`, return it."""
        raise NotImplementedError


class GraphPass(Pass):
    """A pass that sees the whole graph: overrides `run`."""


class Rewrite(Pass):
    """A local rewrite: `pattern`, `why_not`, `rewrite`. Its cost is read off the ops before and after (ir/cost)."""

    once: ClassVar[bool] = False
    """True: results are not matched again (default: to a fixpoint)."""

    def pattern(self, op: Any, *wildcards: Any) -> Any:
        """What to find, in Python: parameters after `op` are wildcards, every returned value may have users outside."""
        raise NotImplementedError

    def why_not(self, m: Match) -> str | None:
        """One sentence why this occurrence must stay, or None."""
        return None

    def rewrite(self, op: Builder, m: Match) -> Any:
        """The replacement for each value the pattern returns, in the same order."""
        raise NotImplementedError

    def run(self, graph: Graph, context: Context) -> Graph:
        """Apply to every occurrence, in time linear in the nodes."""
        pattern = Pattern(self.pattern)
        work, seen = pattern.candidates(graph), set()
        for node in work:  # grows while we walk
            if node in seen or node._erased:
                continue
            seen.add(node)
            m = pattern.match(graph, node)
            if isinstance(m, Miss):
                continue
            why = _escapes(m) or self.why_not(m) or (None if self.exact else context.ignored(node))
            if why:
                context.decline(node, why)
                continue
            context.apply(node)
            new = _replace(self, graph, m)
            if not self.once:
                work += [n for n in new if n.target in pattern.anchors]
                work += [user for n in new for user in n.users if user.target in pattern.anchors and user not in seen]
        return graph


def near_misses(graph: Graph, rewrite: Rewrite, most: int = 5) -> list[Miss]:
    """The candidates that came closest without matching, closest first."""
    pattern = Pattern(rewrite.pattern)
    misses = [m for n in pattern.candidates(graph) if isinstance(m := pattern.match(graph, n), Miss)]
    return sorted(misses, key=lambda m: -m.fitted)[:most]


class Builder:
    """`op.linear(x, w, b)` in a rewrite adds that call to the graph; several outputs come back as a tuple."""

    def __init__(self, graph: Graph, before: fx.Node, like: fx.Node) -> None:
        self._graph, self._before, self._like, self.made = graph, before, like, []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.call(resolve(name, args, kwargs), *args, **kwargs)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of one particular overload."""
        node = self._graph.insert(target, *args, before=self._before, like=self._like, **kwargs)
        self.made.append(node)
        if isinstance(node.meta["val"], tuple | list):
            items = tuple(self._graph.insert(operator.getitem, node, i, before=self._before, like=self._like) for i in range(len(node.meta["val"])))
            self.made += items
            return items
        return node

    def weight(self, name: str, function: Callable[..., Tensor], *sources: fx.Node) -> fx.Node:
        """A new weight computed from others; remembered as a recipe for graphs captured without weights."""
        return self._graph.add_weight(name, function, *(str(s.target) for s in sources), like=self._like)


def resolve(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The overload of `name` that takes these arguments, by torch's own rules."""
    found = overloads(name)
    if len(found) == 1:
        return found[0]
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[misc, assignment]
    overload = torch._C._jit_resolve_packet(found[0]._schema.name, *args, **kwargs)
    return next(f for f in found if f._overloadname == overload)


def _escapes(m: Match) -> str | None:
    """A matched value that is not returned must have no other user."""
    inside = set(m.nodes) | set(m.outputs)
    for node in m.nodes:
        if node in m.outputs:
            continue
        for user in node.users:
            if user not in inside and not _leads_inside(user, inside):
                return f"{node.name} is also read by {user.name}" if user.op != "output" else f"{node.name} is also an output of the model"
    return None


def _leads_inside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node the matcher looked through (a no-op or a cast) is read by the match alone."""
    return bool(node.users) and node.op == "call_function" and all(u in inside or _leads_inside(u, inside) for u in node.users) and is_looked_through(node)


def _replace(rewrite: Rewrite, graph: Graph, m: Match) -> list[fx.Node]:
    before = min(m.outputs)
    inputs = [v for v in _nodes_in(m.values.values()) if not graph.is_weight(v)]
    if any(not v < before for v in inputs):
        before = max(m.outputs)  # an input is made between two outputs: then no outside user may stand there (checked below)
    op = Builder(graph, before, m.anchor)
    replaced = rewrite.rewrite(op, m)
    replaced = replaced if isinstance(replaced, tuple) else (replaced,)
    if len(replaced) != len(m.outputs):
        raise PromiseBroken(f"{rewrite.name}: the pattern returns {len(m.outputs)} values, the rewrite {len(replaced)}")
    for old, new in zip(m.outputs, replaced):
        if not _same_value(old, new):
            raise PromiseBroken(f"{rewrite.name} at {m.path or old.name}: {old.name} was {_kind(old)}, its replacement is {_kind(new)}")
        for user in list(old.users):
            if user not in op.made and not before <= user:
                raise PromiseBroken(f"{rewrite.name} at {m.path or old.name}: {user.name} reads {old.name} before its replacement can be computed")
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in op.made, propagate_meta=False)
    for node in sorted(set(m.nodes) | set(m.outputs), reverse=True):
        _erase_dead(graph, node)
    return [n for n in op.made if not n._erased]


def _erase_dead(graph: Graph, node: fx.Node) -> None:
    """Erase a node nobody reads, and the looked-through nodes above it that this leaves dead."""
    if node._erased or node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    graph.fx.erase_node(node)
    for operand in operands:
        if operand.op == "call_function" and is_looked_through(operand):
            _erase_dead(graph, operand)


def _nodes_in(values: Iterable[Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return found


def _same_value(old: fx.Node, new: Any) -> bool:
    a, b = old.meta.get("val"), new.meta.get("val") if isinstance(new, fx.Node) else None
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _kind(value: Any) -> str:
    val = value.meta.get("val") if isinstance(value, fx.Node) else value
    return f"{val.dtype}{list(val.shape)}" if isinstance(val, Tensor) else repr(val)
