"""each layer -> the rewrite that suits it best, so that all together keep a share of their bytes, FLOPs or predicted time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from ...ir.errors import RecipeError, UsageError
from ...ir.extract import extract
from ...ir.graph import Graph
from ..knapsack import exact, greedy
from ..recipe import pass_from_text
from ..rewrite import NOT_ASKED, Context, GraphPass, Pass, predicted
from ..sensitivity import Sensitivity
from ..statistics import Calibration, Moments, Order, Request, Statistics
from .layer_options import Layer, Option, all_requests, has_option, label_of, places, price_of, relative_error, requests_of, seconds_of, weights_of_influence

STEP = 0.05
"""Between the ratios every choice is tried at, where none are given."""


@dataclass(frozen=True)
class Allocate(GraphPass):
    """Choose a rewrite, and how much of it, for every layer: the least error within a budget.

    Before:  the layers as they are      After:  each rewritten by one of `choices` at one ratio, or left alone
    Every choice is any pass, at each ratio if it has an option `ratio` (the share it removes). It is tried on each layer by itself, cut out of
    the program: what it then takes and how far it is from what it was, on calibration data held out of the fit. A choice that is
    predicted to be slower than the layer is dropped. One choice a layer is then made, exactly (an integer linear program)
    or greedily, and applied in the order of the program, with moments as `calibration` says. The notes of the graph
    have what was chosen. specs/structured_ffn.md 4 and 10. Declines layers that can't be cut out, and says what each choice says where none
    applies. Layers are measured alone: what errors do together is for the budget of the recipe to watch. Lossy: as its choices are.
    """

    choices: tuple[str, ...] = ("ffn-width", "low-rank:allocation=waterfill")
    """"PASS" or "PASS:option=value,..." each; another one than the first is taken where its error is below `prefer` times that."""
    ratio: float = 0.3
    """What the layers together lose, of `budget`."""
    budget: Literal["bytes", "flops", "latency"] = "bytes"
    """bytes: of the weights; flops; latency: predicted on the target, at the example sizes."""
    scope: Literal["ffn", "all"] = "ffn"
    """ffn: feed-forward blocks; all: attention's input and output projections too."""
    weigh: Literal["error", "influence", "drift"] = "drift"
    """What is least in sum. error: squared error of the layer's output relative to its variance; influence: that, times 1 to 2 by how much
    the layer's block changes the residual stream; drift: of the program's outputs (KL for logits), with only that layer rewritten."""
    ratios: tuple[float, ...] = ()
    """At which choices are tried; none: every 0.05 as far as `floor` lets a layer go."""
    solver: Literal["exact", "greedy"] = "exact"
    floor: float = 0.5
    """No layer keeps less than this share of what all keep together."""
    ends: float | None = 1.0
    """The first and the last layer lose at most this share of what all lose together; None: as any other layer."""
    prefer: float = 0.9
    calibration: Order = "asymmetric"
    held_out: float = 0.1
    """Of the calibration batches, to measure errors on."""

    name = "allocate"
    exact = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"ratio is the share that is removed, from 0 to less than 1; got {self.ratio:g}")
        if not self.choices:
            raise RecipeError("allocate needs at least one choice, such as ffn-width")
        for step in self.steps:
            if isinstance(step, Allocate):
                raise RecipeError("allocate can't be a choice of itself")

    @property
    def steps(self) -> list[Pass]:
        """The choices as passes."""
        return [pass_from_text(choice) for choice in self.choices]

    def run(self, graph: Graph, context: Context) -> Graph:
        if not self.ratio:
            return graph
        if context.calibration is None:
            raise UsageError("allocate measures layers on calibration data and there is none; give some: calibration=Calibration(batches)")
        if graph.on_meta:
            raise UsageError("allocate runs layers and needs their weights in memory; Graph.materialize fills it")
        if self.budget == "latency" and context.predict is None:
            raise UsageError("a budget of latency needs a target whose speed is known; give one, or budget by bytes or flops")
        layers = self._layers(graph, context)
        if not layers:
            return graph
        fit, held = _split(context.calibration, self.held_out)
        streams = [layer.stream for layer in layers if layer.stream is not None and self.weigh == "influence"]
        influences = [Request(b.name, frozenset({"influence"}), block_input=a.name) for a, _, b in streams]
        statistics = fit.gather(graph, [*all_requests(graph, self.steps, layers), *influences])
        self._measure(graph, layers, context, statistics, fit, held)
        chosen = self._choose(layers)
        self._apply(graph, layers, chosen, context)
        graph.notes += self._said(layers, chosen)
        return graph

    def _layers(self, graph: Graph, context: Context) -> list[Layer]:
        """What can be cut out of the program, in its order; the rest is declined."""
        found = []
        for name, start, outputs, stream in places(graph, self.scope):
            if why := next((w for n in outputs if (w := context.ignored(n))), None):
                if why != NOT_ASKED:
                    context.decline(outputs[-1], why)
                continue
            part = extract(graph, [start], outputs)
            if isinstance(part, str):
                context.decline(outputs[-1], f"it can't be measured alone: {part}")
            else:
                found.append(Layer(name, start, outputs, stream, part, price_of(part, self.budget, context), seconds_of(part, context)))
        return found

    def _measure(self, graph: Graph, layers: list[Layer], context: Context, statistics: Statistics, fit: Calibration, held: Calibration) -> None:
        """Give every layer its options."""
        rows = held.gather(graph, [Request(layer.start.name, frozenset({"rows"})) for layer in layers])
        alone = Context(context.target, context.predict, context.seed, statistics=statistics, calibration=fit, moments=_oneshot(statistics))
        reads_at = {node: layer.start for layer in layers for node in layer.outputs}
        drifts: Any = iter(lambda: (None, None), 0)
        if self.weigh == "drift":
            drifts = Sensitivity(graph, held.batches, reads=reads_at).alone([layer.outputs[0] for layer in layers])
        weights = weights_of_influence(layers, statistics) if self.weigh == "influence" else [1.0] * len(layers)
        for i, (layer, (_, drift_of)) in enumerate(zip(layers, drifts)):
            context.progress(f"choices for {layer.name}", i, len(layers))
            x = rows[layer.start].rows
            y = layer.run(layer.part, x)
            for choice, step, ratio in self._tries(i in (0, len(layers) - 1)):
                log = dataclasses.replace(alone, applied=[], declined=[])
                after = step.run(layer.part.draft(), log)
                after.clean()
                if not log.applied:
                    layer.refusals.append(f"{label_of(choice, ratio)}: {log.declined[0].why if log.declined else 'nothing to do'}")
                    continue
                price, seconds = price_of(after, self.budget, context), seconds_of(after, context)
                if seconds is not None and layer.seconds is not None and seconds > layer.seconds:
                    layer.refusals.append(f"{label_of(choice, ratio)}: {predicted(layer.seconds, seconds)} as it is")
                    continue
                if drift_of is None:
                    error = weights[i] * relative_error(y, layer.run(after, x))
                else:
                    error = drift_of({node: (lambda v, after=after, k=k: after.run((v,))[k]) for k, node in enumerate(layer.outputs)})
                layer.options.append(Option(label_of(choice, ratio), step, price, error))

    def _tries(self, at_an_end: bool) -> Iterator[tuple[str, Pass, float | None]]:
        """The choices at the ratios that side conditions leave."""
        most = min(1 - self.floor * (1 - self.ratio), self.ends * self.ratio if at_an_end and self.ends is not None else 1.0)
        ratios = self.ratios or [i * STEP for i in range(1, round(1 / STEP))]
        for choice, step in zip(self.choices, self.steps):
            if not has_option(step, "ratio"):
                yield choice, step, None
                continue
            for ratio in ratios:
                if ratio <= most + 1e-9:
                    yield choice, dataclasses.replace(step, ratio=ratio), ratio  # type: ignore[type-var, call-arg]

    def _choose(self, layers: list[Layer]) -> list[int]:
        """The index of each layer's option; 0 is the layer as it is. Raises UsageError when no combination holds the budget."""
        limit = (1 - self.ratio) * sum(layer.price for layer in layers)
        for layer in layers:
            layer.options.insert(0, Option("as it is", None, layer.price, 0.0))
        goal = [[o.error / (1 if o.label.startswith(self.choices[0]) else self.prefer) for o in layer.options] for layer in layers]
        prices = [[o.price for o in layer.options] for layer in layers]
        chosen = (exact if self.solver == "exact" else greedy)(goal, prices, limit)
        if chosen is None:
            most = 1 - sum(map(min, prices)) / sum(layer.price for layer in layers)
            why = next((f"; {layer.name} has no choice ({layer.refusals[0]})" for layer in layers if len(layer.options) == 1 and layer.refusals), "")
            raise UsageError(f"allocate can't save {self.ratio:.0%} of the {self.budget} of {len(layers)} layers: its choices save {most:.0%} at most{why}")
        return chosen

    def _apply(self, graph: Graph, layers: list[Layer], chosen: Sequence[int], context: Context) -> None:
        assert context.calibration is not None
        steps = [layer.options[c].step for layer, c in zip(layers, chosen)]
        taken = [(step, layer) for step, layer in zip(steps, layers) if step is not None]
        requests = [r for step, layer in taken for r in requests_of(graph, step, [layer])]
        statistics = context.calibration.gather(graph, requests)
        source = dataclasses.replace(context, statistics=statistics).moments_in_order(graph, self.calibration)
        for i, (step, layer) in enumerate(zip(steps, layers)):
            if step is None:
                context.decline(layer.outputs[-1], "as it is, it is the best the budget has for it")
                continue
            context.progress(f"rewriting {layer.name}", i, len(layers))
            now = dataclasses.replace(context, only=layer.names, applied=[], declined=[], statistics=statistics, moments=source)
            if not has_option(step, "calibration"):  # it takes statistics, and of the program as it is now
                now.statistics = context.calibration.gather(graph, requests_of(graph, step, [layer]))
            step.run(graph, now)
            context.matched += 1
            context.applied.append(layer.name)

    def _said(self, layers: list[Layer], chosen: Sequence[int]) -> list[str]:
        """The choice in sentences: how much is saved, and where each option was taken."""
        options = [layer.options[c] for layer, c in zip(layers, chosen)]
        left = sum(o.price for o in options) / sum(layer.price for layer in layers)
        summed = sum(o.error for o in options)
        said = [f"allocate: {1 - left:.1%} less {self.budget} in {len(layers)} layers; {self.weigh} of each alone adds up to {summed:.3g}"]
        for label in dict.fromkeys(o.label for o in options):
            taken = [(layer.name, o.error) for layer, o in zip(layers, options) if o.label == label]
            said.append(f"allocate: {label}: {', '.join(name + (f' ({error:.2g})' if error else '') for name, error in taken)}")
        return said


def _split(calibration: Calibration, held_out: float) -> tuple[Calibration, Calibration]:
    """Calibration on most of the batches, and on the rest."""
    batches = calibration.batches
    held = min(max(1, round(held_out * len(batches))), len(batches) - 1)
    if held < 1:
        return calibration, calibration  # a single batch serves both
    return dataclasses.replace(calibration, batches=batches[:-held]), dataclasses.replace(calibration, batches=batches[-held:])


def _oneshot(statistics: Statistics) -> Callable[[fx.Node, fx.Node], Moments]:
    return lambda value, start: Moments(statistics[value].gram, statistics[value].mean)
