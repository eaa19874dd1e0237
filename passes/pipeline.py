"""The pass manager: runs passes one by one, verifies each, undoes and names what breaks its promise, keeps a record of all."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir.cost import Cost, cost
from ..ir.energy import energy, total
from ..ir.errors import PromiseBroken, RewrightError, UsageError
from ..ir.graph import Flat, Graph
from ..ir.verify import Drift, check_structure, compare, example_inputs, first_divergence, has_steps, local_error, padding_mask, shorter_outputs, tolerance
from .cleanup import CANONICAL
from .rewrite import Context, Declined, Pass, Recovered
from .statistics import Calibration, Statistics


@dataclass(frozen=True)
class Budget:
    """What a lossy pass may cost, measured against the original on held-out inputs. None: no limit."""

    min_cosine: float | None = None
    """Lowest mean cosine over output rows."""
    min_agreement: float | None = None
    """Lowest share of rows with the same argmax."""
    max_drift: float | None = None
    """Highest relative error, max |a - b| / max |a|."""
    max_metric_drop: float | None = None
    """Most the user's own metric may fall."""

    def why_not(self, drift: Drift, metric_drop: float | None = None) -> str | None:
        """The first limit that is broken, in words."""
        for what, value, limit, ok in (
            ("cosine", drift.cosine, self.min_cosine, lambda v, b: v >= b),
            ("top-1 agreement", drift.agreement, self.min_agreement, lambda v, b: v >= b),
            ("relative error", drift.relative_error, self.max_drift, lambda v, b: v <= b),
            ("metric drop", metric_drop, self.max_metric_drop, lambda v, b: v <= b),
        ):
            if limit is not None and value is not None and not ok(value, limit):
                return f"{what} {value:.4g} against a budget of {limit:g}"
        return None


@dataclass
class Record:
    """What one pass did: the same on every surface (Python, CLI, JSON, report)."""

    name: str
    options: dict[str, Any]
    exact: bool
    matched: int = 0
    applied: int = 0
    declined: list[Declined] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    """Change of bytes, flops, launches, weight_bytes, modelled_energy_uj (ir.energy: never measured; and seconds on the target), after minus before."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Against the captured original: see ir.verify.Drift; `step_error` of an exact pass is against the program before it, `local_error`
    is its largest for a value given those before it (ir.verify.local_error), where ties made step_error large; metric and latency_ms when asked."""
    seconds: float = 0.0
    undone: str | None = None
    """Why the pass was taken back, with the layer; None if it stands."""
    layers: list[str] = field(default_factory=list)
    """Module path of every application."""
    canonical: bool = False
    """Part of the canonical form every graph is brought to first."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the pass found on its way, as plain data: of `finetune` its curve and conditions (tools.finetuned.Finetuned.as_dict)."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "options": dict(self.options)}


@dataclass
class Outcome:
    """A pipeline's result: the original as captured, the program now, a record a pass."""

    original: Graph
    graph: Graph
    records: list[Record]
    passes: tuple[Pass, ...]
    inputs: list[Flat]
    total: Drift | None = None
    """The end result against the original; None when nothing could be run."""

    @property
    def undone(self) -> list[Record]:
        """Passes that broke their promise and were taken back."""
        return [r for r in self.records if r.undone]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, under one contract.

    target: a backends.target.Target handed to the passes; predict: seconds of a graph on it.
    require_match: names of passes for which matching nothing is an error.
    latency: milliseconds of a graph, measured; recorded after every pass that changed something.
    calibration: inputs for the passes that require statistics. Those are gathered for all passes to come in one run, and
      again for values that a pass in between has changed.
    finetune: what passes that train (`Pass.trains`) train by; None with verify=False is a dry run, which does not train.

    Passes up to one that trains are a stage: what a lossy one of them costs is measured at once, but judged against the budget only behind the
    training (the last one, of several in a row). If the budget is broken then, all from the first lossy pass that changed something to
    the training are undone, and their records say so: no layer is left out alone, for each trial would be a training run.
    """

    passes: Sequence[Pass]
    target: Any = None
    budget: Budget = Budget()
    require_match: frozenset[str] = frozenset()
    ignore: tuple[str, ...] = ()
    verify: bool = True
    seed: int = 0
    predict: Callable[..., float] | None = None
    latency: Callable[[Graph], float] | None = None
    metric: Callable[[torch.nn.Module], float] | None = None
    calibration: Calibration | None = None
    finetune: Callable[[Graph, Mapping[str, Any]], Recovered] | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def run(self, graph: Graph, inputs: Sequence[Flat] = ()) -> Outcome:
        """Optimize a clone of `graph`, never `graph` itself.

        inputs: flat inputs to verify on; the first also at batch 1 and other sizes. Without any, or with weights on the
        meta device, only structure is verified and every record says so.
        Raises PromiseBroken when a required pass matches nothing; a broken promise is undone and recorded, not raised.
        Raises UsageError when a pass needs statistics and there is no calibration, or trains and there is nothing to train by;
        also whatever `finetune` raises.
        """
        with _old_objects_kept():
            return self._run(graph, inputs)

    def _run(self, graph: Graph, inputs: Sequence[Flat]) -> Outcome:
        run = _Run(self, graph.clone(), list(inputs))
        steps: list[tuple[Pass, bool]] = [] if graph.canonical else [(p(), True) for p in CANONICAL]
        steps += [(p, False) for p in self.passes]
        if self.calibration is None and (needy := next((p for p, _ in steps if p.requires), None)):
            kinds = ", ".join(sorted(needy.requires))
            give = "--calibration FILE on the command line, calibration=batches in rewright.optimize, calibration=Calibration(batches) in a Pipeline"
            raise UsageError(f"{needy.name} needs statistics ({kinds}) and there is no calibration data; give some: {give}")
        if self.finetune is None and self.verify and (trainer := next((p for p, _ in steps if p.trains), None)):
            raise UsageError(f"{trainer.name} needs the original and data to learn from: rewright.optimize hands it both, Pipeline takes finetune=")
        for i, (step, canonical) in enumerate(steps):
            self.progress(step.name, i, len(steps))
            run.step(step, canonical, [p for p, _ in steps[i + 1 :]])
        self.progress("done", len(steps), len(steps))
        total = compare(run.reference, run.graph.run, run.inputs, run.valid, shorter_outputs(run.original, run.graph)) if run.inputs else None
        run.graph.canonical = True
        return Outcome(run.original, run.graph, run.records, tuple(p for p, _ in steps), run.inputs, total)


class _Run:
    """The state of one pipeline run: the program so far and its reference outputs."""

    def __init__(self, pipeline: Pipeline, graph: Graph, inputs: list[Flat]) -> None:
        self.pipeline, self.graph, self.original = pipeline, graph, graph.clone()
        runnable = pipeline.verify and not graph.on_meta and inputs
        self.inputs = [*example_inputs(graph, inputs[0], pipeline.seed), *inputs[1:]] if runnable else []
        self.references = {id(flat): self.original.run(flat) for flat in self.inputs}
        self.outputs = dict(self.references)  # of the program so far
        self.valid = padding_mask(graph)
        self.statistics: Statistics | None = None
        self.fingerprint = _fingerprint(graph)
        unmeasured = "structure only: no inputs or no weights to run on" if pipeline.verify else "not run"
        self.measured = Drift(inputs=len(self.inputs)).as_dict() if self.inputs else {"note": unmeasured}
        self.records: list[Record] = []
        self.metric = pipeline.metric(self.original.module) if pipeline.metric and runnable else None
        self.stage: _Stage | None = None

    def reference(self, flat: Flat) -> tuple:
        return self.references[id(flat)]

    def step(self, step: Pass, canonical: bool, later: Sequence[Pass] = ()) -> None:
        """Run one pass. later: those to come; one run of the program gathers the statistics of all up to one that trains."""
        record = Record(step.name, options_of(step), step.exact, canonical=canonical)
        self.records.append(record)
        before, begin = self.graph, time.perf_counter()
        self.trained_later = any(p.trains for p in later)
        self.judged_later = self.trained_later if not step.trains else bool(later) and later[0].trains
        if step.requires:
            self._gather([p for p in (step, *itertools.takewhile(lambda p: not p.trains, later)) if p.requires])
        after, context = self._attempt(step, record, self.pipeline.ignore)
        if after is before:
            record.measured = {k: v for k, v in self.measured.items() if k not in ("step_error", "local_error")}
        elif after is not None:
            trouble = self._promise_broken(step, before, after, record)
            if trouble and not step.exact and not step.trains:
                after, context, trouble = self._shrink(step, before, context, record, trouble)
            if trouble:
                record.undone = trouble
        if record.undone is None and after is not None:
            self.graph = after
            if after is not before:
                if self.stage is None and self.judged_later and not step.exact:
                    self.stage = _Stage(before, self.fingerprint, self.measured, self.outputs, len(self.records) - 1)
                self.fingerprint = _fingerprint(after)
                record.predicted = _difference(before, after, self.pipeline.predict)
                self.measured = dict(record.measured)
                if self.inputs:
                    self.outputs = self._new_outputs
        record.matched, record.applied = context.matched, 0 if record.undone else len(context.applied)
        record.declined, record.layers = context.declined, [] if record.undone else context.applied
        record.details = context.details
        if step.trains and not self.judged_later:
            self._end_stage(record)
        record.seconds = time.perf_counter() - begin
        if self.pipeline.latency is not None and self.graph is not before and not canonical:
            record.measured["latency_ms"] = self.pipeline.latency(self.graph)
        if step.name in self.pipeline.require_match and not record.applied and not record.undone and not step.trains:
            raise PromiseBroken(_nothing_matched(step, context))

    def _end_stage(self, trained: Record) -> None:
        """Behind the training a stage stands or falls as a whole."""
        stage, self.stage = self.stage, None
        if stage is None or trained.undone is None:
            return
        self.graph, self.fingerprint, self.measured, self.outputs = stage.before, stage.fingerprint, stage.measured, stage.outputs
        for record in self.records[stage.first : -1]:
            if record.applied:
                record.undone, record.applied, record.layers = f"undone with its stage, behind {trained.name}: {trained.undone}", 0, []

    def _gather(self, need_statistics: Sequence[Pass]) -> None:
        assert self.pipeline.calibration is not None  # run() checked it
        self.statistics = self.pipeline.calibration.gather(self.graph, [r for p in need_statistics for r in p.requests(self.graph)])

    def _attempt(self, step: Pass, record: Record, ignore: tuple[str, ...]) -> tuple[Graph | None, Context]:
        """Run a pass on a clone; one that raises or leaves a malformed graph is undone, one that changed nothing gives the graph back."""
        p = self.pipeline
        context = Context(p.target, p.predict, p.seed, ignore, statistics=self.statistics if step.requires else None, calibration=p.calibration)
        context.trained_later, context.finetune = self.trained_later, p.finetune
        try:
            after = step.run(self.graph.draft(), context)
            if _fingerprint(after) == self.fingerprint and not (step.trains and p.finetune):  # training changes no call, and is judged in any case
                return self.graph, context
            after.clean()
            check_structure(after, self.graph, step.shortens_outputs)
        except RewrightError as error:
            if step.trains:  # no data, a checkpoint of another run: the user's to put right, and the stages so far are kept
                raise
            record.undone = str(error)
            return None, context
        except Exception as error:  # a bug in the pass must not cost the user the model
            record.undone = f"{step.name} raised {type(error).__name__}: {error}"
            return None, context
        return after, context

    def _promise_broken(self, step: Pass, before: Graph, after: Graph, record: Record) -> str | None:
        """Measure, and say in words what is wrong; None if the promise holds."""
        if not self.inputs:
            record.measured = dict(self.measured)
            return None
        try:
            self._new_outputs = {id(flat): out for flat, out in zip(self.inputs, _run_all(after, self.inputs))}
            without = shorter_outputs(self.original, after)
            from_original = compare(self.reference, lambda flat: self._new_outputs[id(flat)], self.inputs, self.valid, without)
        except PromiseBroken as error:
            return str(error)
        record.measured = from_original.as_dict()
        metric_drop = None
        if not step.exact and self.metric is not None and self.pipeline.metric is not None:
            record.measured["metric"] = self.pipeline.metric(after.module)
            record.measured["metric_before"] = self.metric
            metric_drop = self.metric - record.measured["metric"]
        if not step.exact:
            return None if self.judged_later else self.pipeline.budget.why_not(from_original, metric_drop)
        here = compare(lambda flat: self.outputs[id(flat)], lambda flat: self._new_outputs[id(flat)], self.inputs, self.valid)
        record.measured["step_error"] = 0.0 if here.bit_equal else here.relative_error
        limit = tolerance(before)
        if here.relative_error <= limit:
            return None
        if has_steps(before) and (local := max(local_error(before, after, flat) for flat in self.inputs)) <= limit:
            record.measured["local_error"] = local  # ties of its roundings fell to the other side, and later layers multiplied that
            return None
        return f"promised exact, but the outputs moved by {here.relative_error:.2g} (relative; allowed {limit:.2g}){self._blame(before, after, limit)}"

    def _blame(self, before: Graph, after: Graph, limit: float) -> str:
        for flat in self.inputs:
            if found := first_divergence(before, after, flat, limit):
                name, path, error = found
                return f"; first wrong value: {name} in {path or 'the model itself'} (error {error:.2g})"
        return "; every value both programs share agrees, so the last rewritten call is at fault"

    def _shrink(self, step: Pass, before: Graph, context: Context, record: Record, trouble: str) -> tuple[Graph | None, Context, str | None]:
        """Over budget: leave out the most harmful layers, as few as possible (each layer's harm is measured alone)."""
        layers = sorted(set(context.applied))
        if len(layers) < 2 or self.pipeline.budget.max_metric_drop is not None:
            return None, context, trouble
        harm: dict[str, float] = {}
        for i, layer in enumerate(layers):
            self.pipeline.progress(f"{step.name}: measuring {layer}", i, len(layers))
            alone, _ = self._attempt(step, record, (*self.pipeline.ignore, *(x for x in layers if x != layer)))
            if alone is None:
                return None, context, trouble
            try:
                harm[layer] = self._harm(alone)
            except PromiseBroken:
                return None, context, trouble
        worst_first = sorted(layers, key=lambda x: -harm[x])
        low, high = 1, len(layers)  # smallest number of layers to leave out that holds the budget
        best: tuple[Graph, Context] | None = None
        while low <= high:
            left_out = worst_first[: (low + high) // 2]
            if len(left_out) == len(layers):
                break
            fewer, fewer_context = self._attempt(step, record, (*self.pipeline.ignore, *left_out))
            if fewer is not None and self._promise_broken(step, before, fewer, record) is None:
                best, high = (fewer, fewer_context), len(left_out) - 1
            else:
                low = len(left_out) + 1
        if best is None:
            return None, context, f"{trouble}; no subset of its {len(layers)} layers holds the budget"
        self._promise_broken(step, before, best[0], record)
        kept = set(best[1].applied)
        note = f"over budget with every layer ({trouble}); left out, most harmful first"
        best[1].declined = [Declined(d.node, d.layer, note if d.layer in harm and d.layer not in kept else d.why) for d in best[1].declined]
        record.undone = None  # a subset that failed on the way is no matter now
        return *best, None

    def _harm(self, graph: Graph) -> float:
        """How far a program strays from the original on the first inputs. Raises PromiseBroken when it does not run."""
        found = compare(self.reference, lambda flat: _run_all(graph, [flat])[0], self.inputs[:2], self.valid, shorter_outputs(self.original, graph))
        return 1 - found.cosine + found.relative_error * 1e-3


@dataclass(frozen=True)
class _Stage:
    """The state of a run before the first lossy pass whose cost is judged behind a training."""

    before: Graph
    fingerprint: list[tuple[str, Any, str, str]]
    measured: dict[str, Any]
    outputs: dict[int, tuple]
    first: int
    """Which record that pass has."""


def _run_all(graph: Graph, inputs: Sequence[Flat]) -> list[tuple]:
    """Outputs for all inputs. Raises PromiseBroken when the graph is well formed and fails all the same."""
    try:
        return [graph.run(flat) for flat in inputs]
    except Exception as error:
        raise PromiseBroken(f"the result does not run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def _fingerprint(graph: Graph) -> list[tuple[str, Any, str, str]]:
    """Equal exactly when two versions of a graph make the same calls."""
    return [(n.name, n.target, str(n.args), str(n.kwargs)) for n in graph.fx.nodes]


@contextlib.contextmanager
def _old_objects_kept() -> Iterator[None]:
    """What exists before the run is kept anyway: the garbage collector need not walk it (a third of the time at 80 layers)."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def options_of(step: Pass) -> dict[str, Any]:
    """A pass's options as plain data, ready for a recipe."""
    options = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)} if dataclasses.is_dataclass(step) else {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _difference(before: Graph, after: Graph, predict: Callable[[Graph], float] | None) -> dict[str, float]:
    change: Cost = cost(after) - cost(before)
    found: dict[str, float] = {**dataclasses.asdict(change), "weight_bytes": after.weight_bytes() - before.weight_bytes()}
    found["modelled_energy_uj"] = (total(energy(after)).total - total(energy(before)).total) / 1e6
    if predict is not None:
        found["seconds"] = predict(after) - predict(before)
    return found


def _nothing_matched(step: Pass, context: Context) -> str:
    if context.declined:
        first = context.declined[0]
        return f"{step.name} applied nowhere: all {len(context.declined)} matches were declined, the first ({first.layer or first.node}) because {first.why}"
    look = f"`rewright explain MODEL {step.name}` shows the nearest misses, `require_match = false` in the recipe lets it pass"
    return f"{step.name} matched nothing in this model; {look}"
