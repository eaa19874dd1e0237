"""From a bad end result to the pass, then to the layer: prefixes of the pipeline, re-run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.graph import Graph
from ..ir.verify import compare, example_inputs, first_divergence, shorter_outputs, tolerance
from .pipeline import Flat
from .rewrite import Context, Pass


@dataclass(frozen=True)
class Culprit:
    """What bisect found: the pass, and the first value it made wrong."""

    name: str
    index: int
    """Position among the pipeline's passes, canonical ones included."""
    node: str
    layer: str
    error: float

    def __str__(self) -> str:
        return f"{self.name} (pass {self.index + 1}) broke {self.layer or 'the model itself'}: {self.node} is off by {self.error:.2g} (relative)"


def bisect(original: Graph, passes: Sequence[Pass], inputs: Sequence[Flat], limit: float | None = None, **context: Any) -> Culprit | None:
    """From a bad end result to the pass, then to the layer, by re-running prefixes (a binary search).

    limit: relative error that counts as bad; default the tolerance of exact passes. None is returned if the end is good.
    """
    limit = tolerance(original) if limit is None else limit
    flats = [*example_inputs(original, inputs[0]), *inputs[1:]]
    wanted = [original.run(flat) for flat in flats]
    reference = {id(flat): out for flat, out in zip(flats, wanted)}

    def prefix(n: int) -> Graph:
        graph = original.clone()
        for step in passes[:n]:
            graph = step.run(graph, _context(graph, step, context))
            graph.clean()
        return graph

    def bad(n: int) -> bool:
        graph = prefix(n)
        return compare(lambda flat: reference[id(flat)], graph.run, flats, without=shorter_outputs(original, graph)).relative_error > limit

    if not bad(len(passes)):
        return None
    low, high = 0, len(passes)  # prefix(low) is good, prefix(high) is bad
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bad(middle) else (middle, high)
    before, after = prefix(low), prefix(high)
    for flat in flats:
        if found := first_divergence(before, after, flat, limit):
            return Culprit(passes[low].name, low, *found)
    return Culprit(passes[low].name, low, "the outputs", "", float("nan"))


def _context(graph: Graph, step: Pass, given: dict[str, Any]) -> Context:
    context = Context(**given)
    if step.requires and context.calibration is not None:
        context.statistics = context.calibration.gather(graph, step.requests(graph))
    return context
