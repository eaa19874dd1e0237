"""The engine: requests -> statistics, in as few runs over the calibration inputs as memory allows, none for what is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.errors import ResourceError, UsageError
from ...ir.graph import Graph
from ...ir.stream import default_limit
from ...ir.walk import Visit, Walk
from .accumulators import Channels
from .gradients import Loss, WeightGradient, gradients, samples
from .jobs import GRADIENTS, Job, Wanted, accumulator, checked, gradient_accumulator
from .keys import data_key, function_key, hashed, value_keys
from .own_loss import own_loss
from .requests import Request, merged
from .results import Results, Statistics
from .rows import Flat, RowSelection

_VERSION = 1  # of what the accumulators compute: part of every key


@dataclass
class Calibration:
    """Calibration inputs and how to gather statistics on them.

    batches: flat inputs, in a fixed order (an iterator is read once, here).
    weights: the data of graphs captured on the meta device, such as a WeightStore.
    memory_limit: bytes for accumulators, values that wait for the next part of the run, and streamed weights; what one
      batch computes within a part, and of its rows in float32, comes on top. Over it the run is cut into parts, each done for all batches before the
      next, so that every layer still runs once; results go to files.
    cache: a folder in which results are kept under a hash of what they depend on. A run that was interrupted, or another
      one on the same values, takes what is there.
    exclude_positions: tokens left out of every text, counted from its first real one: (0,) for the BOS token, whose
      activations can be a thousand times those of all others.
    loss: (flat outputs, flat inputs) -> scalar, for gradients; without one they are of the model's own likelihood (own_loss).
    """

    batches: Sequence[Flat]
    weights: Mapping[str, Tensor] | None = None
    memory_limit: int | None = None
    cache: Path | str | None = None
    exclude_positions: tuple[int, ...] = ()
    seed: int = 0
    reservoir: int = 2048
    """Rows of "rows"."""
    loss: Loss | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    runs: int = field(default=0, init=False)
    """Runs over the calibration inputs so far."""

    def __post_init__(self) -> None:
        self.batches = [tuple(flat) for flat in self.batches]
        if not self.batches:
            raise UsageError("calibration needs at least one batch of inputs")
        self._results = Results(None if self.cache is None else Path(self.cache), on_disk=self.memory_limit is not None)
        self._latest: Statistics | None = None  # keeps what it found for the next gather

    def first(self, samples: int) -> list[Flat]:
        """Whole batches until there are so many inputs (texts, images), or all."""
        taken: list[Flat] = []
        for flat in self.batches:
            if sum(len(f[0]) for f in taken) >= samples:
                break
            taken.append(flat)
        return taken

    def gather(self, graph: Graph, requests: Iterable[Request]) -> Statistics:
        """The statistics asked for. Values that depend on what they did before are not gathered again.

        Raises UsageError for a value the graph lacks or that is not finite, ResourceError when the memory limit can't be kept.
        """
        nodes = {n.name: n for n in graph.fx.nodes}
        wanted = [Wanted(r, nodes) for r in merged(requests)]
        keys = self._keys(graph, wanted)
        missing = [(w, f, k) for w, f, k in keys if k not in self._results]
        if graph.on_meta and self.weights is None and missing:
            raise UsageError("the graph has no weights to run with; give calibration a WeightStore of them")
        if forward := [m for m in missing if m[1] not in GRADIENTS]:
            self._run(graph, forward)
        if backward := [m for m in missing if m[1] in GRADIENTS]:
            self._run_backward(graph, backward)
        by_value: dict[tuple[str, int], dict[str, str]] = {}
        for w, family, key in keys:
            by_value.setdefault((w.request.value, w.request.axis), {})[family] = key
        self._latest = Statistics(self._results, by_value)
        return self._latest

    def _keys(self, graph: Graph, wanted: list[Wanted]) -> list[tuple[Wanted, str, str]]:
        """(what, family, key) of all that is wanted."""
        differentiated = any(f in GRADIENTS for w in wanted for f in w.families)
        outputs = graph.output.all_input_nodes if differentiated else []  # gradients depend on the whole program
        cones = value_keys(graph, [n for w in wanted for n in w.reads] + outputs, self.weights)
        data = hashed(_VERSION, data_key(graph, self.batches), self.exclude_positions)
        found = []
        for w in wanted:
            for family in w.families:
                parts: list[Any] = [cones[w.node], family, w.request.axis]
                if family == "rows":
                    parts += [self.seed, self.reservoir]
                elif family == "influence":
                    parts.append(cones[w.reads[1]])
                elif family in GRADIENTS:
                    parts += [w.node.name, function_key(self.loss) if self.loss else self.seed, *(cones[n] for n in outputs)]
                found.append((w, family, hashed(data, *parts)))
        return found

    def _run(self, graph: Graph, missing: list[tuple[Wanted, str, str]]) -> None:
        selection = RowSelection(graph, self.batches, self.exclude_positions)
        jobs: dict[Wanted, Job] = {}
        for w, family, key in missing:
            jobs.setdefault(w, Job(w, selection)).take(family, key, accumulator(family, w.width, self.reservoir, self.seed))
        for walk, parts, jobs_at in self._plan(graph, list(jobs.values())):
            self.runs += 1

            def finish(i: int, parts: list[range] = parts, jobs_at: dict[int, list[Job]] = jobs_at) -> None:
                for place in [p for p in jobs_at if p < parts[i].stop]:
                    for job in jobs_at.pop(place):
                        job.finish(self._results)
                self.progress("calibration", i + 1, len(parts))

            walk.run(self.weights, parts, after=finish)

    def _plan(self, graph: Graph, jobs: list[Job]) -> list[tuple[Walk, list[range], dict[int, list[Job]]]]:
        """Runs over the data: one, part by part; or, where the values that wait between parts are too large themselves and the
        weights are in memory, one from the start for each group of values.
        """
        walk, jobs_at = self._walk(graph, jobs)
        limit = self.memory_limit
        if limit is None and graph.on_meta:
            limit = default_limit(walk) + max((j.nbytes for j in jobs), default=0)
        costs: Counter[fx.Node] = Counter()
        for i, at in jobs_at.items():
            if walk.nodes:
                costs[walk.nodes[max(i, 0)]] += sum(j.nbytes for j in at)
        try:
            return [(walk, walk.parts(limit, costs.__getitem__, weights=graph.on_meta), jobs_at)]
        except ResourceError:
            if graph.on_meta or limit is None or max(j.nbytes for j in jobs) > limit:
                raise
        groups: list[list[Job]] = [[]]
        for job in jobs:
            if groups[-1] and sum(j.nbytes for j in groups[-1]) + job.nbytes > limit:
                groups.append([])
            groups[-1].append(job)
        walks = [self._walk(graph, group) for group in groups]
        return [(walk, walk.parts(None), jobs_at) for walk, jobs_at in walks]

    def _walk(self, graph: Graph, jobs: list[Job]) -> tuple[Walk, dict[int, list[Job]]]:
        walk = Walk(graph, self.batches, [Visit(job.reads, job.see) for job in jobs])
        jobs_at: dict[int, list[Job]] = {}
        for job in jobs:
            jobs_at.setdefault(max(walk.position.get(n, -1) for n in job.reads), []).append(job)
        return walk, jobs_at

    def _run_backward(self, graph: Graph, missing: list[tuple[Wanted, str, str]]) -> None:
        if graph.on_meta:
            raise UsageError("gradients need all weights in memory, and the graph has none; Graph.materialize fills it")
        parts = samples(graph, self.batches)
        selection = RowSelection(graph, parts, self.exclude_positions)
        found: list[tuple[Wanted, str, str, Any]] = [(w, f, key, gradient_accumulator(graph, w, f)) for w, f, key in missing]
        values = list(dict.fromkeys(w.node for w, _, _ in missing))
        self.runs += 1
        for i, by_node in enumerate(gradients(graph, parts, values, self.loss or own_loss(graph, self.seed))):
            for w, _, _, sums in found:
                if isinstance(sums, WeightGradient):
                    sums.add(by_node[w.node])
                else:
                    sums.add(i, selection.rows(i, by_node[w.node], selection.token_axis(w.node, w.request.axis), w.request.axis))
            self.progress("gradients", i + 1, len(parts))
        for w, _, key, sums in found:
            tensors = sums.result()
            if isinstance(sums, Channels):
                tensors = {"rows": torch.empty(0, dtype=torch.float64), "columns": tensors["mean_square"], "count": tensors["count"]}
            self._results.put(key, checked(w.node.name, tensors))
