"""linear(x, w, b) -> a linear on codes, with more bits for the layers that the outputs depend on most, under a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

from ...ir.errors import RecipeError, UsageError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..knapsack import Table, exact, greedy, total
from ..rewrite import Context
from ..sensitivity import Drift, Sensitivity
from ..statistics import Request
from .layer import LayerQuantizer
from .linear_options import Inserter, LinearOptions
from .reduced_range import reduced_range
from .scheme import Scheme, scheme
from .stored import other_reader

KEEP = "keep"
POWERS_SAY = "mixed-precision: layers of powers of two are no faster than int8 ones, as which they run; they buy smaller weights and modelled energy, not time"
TOO_FAR = 2.0  # times the sum of what layers alone do
TIGHTENINGS = 5  # of a drift budget that the whole exceeds


@dataclass(frozen=True)
class MixedPrecision(LinearOptions):
    """Choose a pair of formats for every linear: the least drift within a budget of bytes, or the fewest bytes within one of drift.

    Before:  linear(x, w, b)      After:  the op of the layer's choice (see quantize-linear), or the linear itself for "keep"
    The drift of each layer and choice alone, on `samples` calibration inputs, is added up; the sum is minimised exactly (an integer
    linear program) or greedily (smallest drift for the bytes saved first). Then the whole is measured: where it drifts more than twice
    the sum, each layer's choices are measured once more beside what the others have, and chosen again; over a drift budget, they are
    chosen for less. The notes of the graph have the choices, the predicted and the measured drift. specs/quant_shiftadd.md 3.16.
    Bytes are those of weights, scales and zero points, not of biases. Declines what quantize-linear declines; a budget
    no combination keeps is refused. Needs the weights in memory, and while it works holds all choices' codes. Lossy: as its choices are.
    """

    choices: tuple[str, ...] = ("int4-group/none", "int8-group/none", "keep")
    """"WEIGHTS/ACTIVATIONS" as quantize-linear has them, or "keep"."""
    budget_bits: float = 6.0
    """A weight of the linears that have a choice, scales included, on average; when no other budget is given."""
    budget_bytes: int | None = None
    """Of the weights of all linears."""
    budget_drift: float | None = None
    """Of the outputs, in the unit of `drift`: the fewest bytes within it."""
    drift: Drift = "auto"
    solver: Literal["exact", "greedy"] = "exact"
    samples: int = 8
    """Calibration inputs (texts, images) to measure on; whole batches are taken until there are so many."""

    name = "mixed-precision"
    exact = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.schemes
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise RecipeError(f"mixed-precision needs two or more different choices, got {', '.join(self.choices) or 'none'}")
        if self.budget_bytes is not None and self.budget_drift is not None:
            raise RecipeError("mixed-precision keeps one budget: budget_bytes or budget_drift, not both")

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The choices that quantize."""
        found = {}
        for choice in self.choices:
            if choice != KEEP:
                weights, slash, activations = choice.partition("/")
                if not slash:
                    raise RecipeError(f'a choice is "WEIGHTS/ACTIVATIONS", such as "int8-channel/int8-dynamic", or "{KEEP}"; got {choice!r}')
                found[choice] = scheme(weights, activations)
        return found

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # what the choices need
        return frozenset().union(*(self.kinds(s) for s in self.schemes.values()))

    def requests(self, graph: Graph) -> list[Request]:
        return self.requests_for(graph, self.schemes.values())

    def run(self, graph: Graph, context: Context) -> Graph:
        if context.calibration is None:
            raise UsageError("mixed-precision measures layers on calibration data and there is none; give some: calibration=Calibration(batches)")
        if graph.on_meta:
            raise UsageError("mixed-precision runs the program and needs its weights in memory; Graph.materialize fills it")
        layers, fixed = self._layers(graph, context)
        if not layers:
            return graph
        limit = self._limit(layers, fixed)
        sensitivity = Sensitivity(graph, context.calibration.first(self.samples), self.drift)
        for i, (node, drift_of) in enumerate(sensitivity.alone([layer.node for layer in layers])):
            context.progress(f"sensitivity of {node.meta.get('path') or node.name}", i, len(layers))
            for option in layers[i].options:
                option.drift = drift_of({node: option.run}) if option.quantizer else 0.0
        if self.budget_drift is not None:
            chosen, measured = self._within_drift(layers, self.budget_drift, sensitivity)
        else:
            chosen, measured = self._within_bytes(layers, limit, sensitivity)
        inserter = Inserter(graph, context)
        for layer, c in zip(layers, chosen):
            option = layer.options[c]
            if option.quantizer is None:
                context.decline(layer.node, f'"{KEEP}" is the best the budget has for it')
            else:
                inserter.insert(layer.node, option.quantizer, option.made)
        graph.notes.append(_report(layers, fixed, chosen, measured))
        if any((q := layer.options[c].quantizer) is not None and q.scheme.op == "shift_linear" for layer, c in zip(layers, chosen)):
            graph.notes.append(POWERS_SAY)
        return graph

    def _layers(self, graph: Graph, context: Context) -> tuple[list[_Layer], int]:
        """The linears that have a choice, in graph order, and the bytes of the weights of those that have none."""
        layers, fixed = [], 0
        schemes = {choice: reduced_range(s, context.target) for choice, s in self.schemes.items()}
        for node in self.linears(graph):
            whys = {choice: self.why_not(graph, node, s) or context.ignored(node) for choice, s in schemes.items()}
            options = [self._option(graph, node, choice, s, context) for choice, s in schemes.items() if not whys[choice]]
            weight: Any = node.args[1]
            kept = 0 if other_reader(node, weight) else weight.meta["val"].nbytes  # a tied weight is there for the other reader anyway
            if options:
                layers.append(_Layer(node, [*options, _Option(KEEP, kept)] if KEEP in self.choices else options))
            else:
                fixed += kept
                context.decline(node, next(why for why in whys.values() if why))
        return layers, fixed

    def _option(self, graph: Graph, node: fx.Node, choice: str, s: Scheme, context: Context) -> _Option:
        quantizer = self.quantizer(node, s, context.statistics)
        b = argument(node, "bias")
        tensors = quantizer(graph.weight(node.args[1]).detach(), None if b is None else graph.weight(b).detach())  # type: ignore[arg-type]
        return _Option(choice, sum(t.nbytes for name, t in tensors.items() if name != "b"), quantizer, tensors)

    def _limit(self, layers: list[_Layer], fixed: int) -> int:
        """Bytes for these layers. Raises UsageError when no combination is within them."""
        limit = int(self.budget_bits * sum(layer.weights for layer in layers) / 8) if self.budget_bytes is None else self.budget_bytes - fixed
        least = sum(map(min, _bytes_table(layers)))
        if self.budget_drift is None and least > limit:
            raise UsageError(
                f"the budget leaves {limit:,} bytes for {len(layers)} linears, and no combination is below {least:,.0f}; raise it, or add a choice"
            )
        return limit

    def _within_bytes(self, layers: list[_Layer], limit: int, sensitivity: Sensitivity) -> tuple[list[int], float]:
        """The option of each layer with the least sum of drifts, and the drift of them together."""
        chosen = self._solve(_drift_table(layers), _bytes_table(layers), limit)
        assert chosen is not None  # the smallest combination is within it
        measured = _together(sensitivity, layers, chosen)
        if measured > TOO_FAR * total(_drift_table(layers), chosen):
            again = self._solve(_beside_the_others(sensitivity, layers, chosen, measured), _bytes_table(layers), limit)
            if again is not None and (drift := _together(sensitivity, layers, again)) < measured:
                return again, drift
        return chosen, measured

    def _within_drift(self, layers: list[_Layer], budget: float, sensitivity: Sensitivity) -> tuple[list[int], float]:
        """The option of each layer with the fewest bytes, and the drift of them together."""
        limit = budget
        for _ in range(TIGHTENINGS):
            chosen = self._solve(_bytes_table(layers), _drift_table(layers), limit)
            if chosen is None:
                break
            measured = _together(sensitivity, layers, chosen)
            if measured <= budget:
                return chosen, measured
            limit *= 0.9 * budget / measured
        least = sum(map(min, _drift_table(layers)))
        raise UsageError(f'no combination found within budget_drift = {budget:g}: layers alone add up to {least:.3g} at least; raise it, or add "{KEEP}"')

    def _solve(self, goal: Table, price: Table, limit: float) -> list[int] | None:
        return (exact if self.solver == "exact" else greedy)(goal, price, limit)


@dataclass
class _Option:
    """A choice for one layer: its bytes, what its drift alone was, and (but for "keep") how to compute with it."""

    choice: str
    nbytes: int
    quantizer: LayerQuantizer | None = None
    tensors: dict[str, Tensor] | None = None
    drift: float = 0.0

    def run(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        assert self.quantizer is not None and self.tensors is not None
        return self.quantizer.run(x, self.tensors)

    def made(self, *sources: Tensor) -> dict[str, Tensor]:
        """Its tensors, made before."""
        assert self.tensors is not None
        return self.tensors


@dataclass
class _Layer:
    node: fx.Node
    options: list[_Option]

    @property
    def weights(self) -> int:
        return self.node.args[1].meta["val"].numel()  # type: ignore[union-attr]


def _bytes_table(layers: list[_Layer]) -> Table:
    return [[o.nbytes for o in layer.options] for layer in layers]


def _drift_table(layers: list[_Layer]) -> Table:
    return [[o.drift for o in layer.options] for layer in layers]


def _together(sensitivity: Sensitivity, layers: list[_Layer], chosen: Sequence[int]) -> float:
    options = {layer.node: layer.options[c] for layer, c in zip(layers, chosen)}
    return sensitivity.together({node: o.run for node, o in options.items() if o.quantizer})


def _beside_the_others(sensitivity: Sensitivity, layers: list[_Layer], chosen: Sequence[int], measured: float) -> Table:
    """The drift of the whole with each layer's option in the place of its present one."""
    return [
        [measured if c == chosen[i] else _together(sensitivity, layers, [*chosen[:i], c, *chosen[i + 1 :]]) for c in range(len(layer.options))]
        for i, layer in enumerate(layers)
    ]


def _report(layers: list[_Layer], fixed: int, chosen: Sequence[int], measured: float) -> str:
    counts = Counter(layer.options[c].choice for layer, c in zip(layers, chosen))
    size = fixed + total(_bytes_table(layers), chosen)
    predicted = total(_drift_table(layers), chosen)
    said = ", ".join(f"{n} x {choice}" for choice, n in counts.most_common())
    return f"mixed-precision: {said}; {size:,.0f} bytes of weights in linears; drift {measured:.3g} measured, {predicted:.3g} as the sum of layers alone"
