"""The public functions behind both the Python API and the CLI (DESIGN 7)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import __version__
from ..backends.onnx.export import Exported, Profile, export
from ..backends.target import Target
from ..ir.capture import capture as _capture
from ..ir.cost import NodeCost, node_costs
from ..ir.diff import Diff
from ..ir.diff import diff as _diff
from ..ir.errors import InputFileError, UsageError
from ..ir.files import check_writable, digest, replacing
from ..ir.graph import Graph, quiet
from ..ir.pattern import Miss, Pattern
from ..ir.reexport import re_export
from ..ir.save import load_graph, save_graph
from ..ir.sizes import in_batches
from ..ir.verify import Drift, compare, example_inputs, shorter_outputs
from ..passes import find_pass
from ..passes.bisect import Culprit
from ..passes.bisect import bisect as _bisect
from ..passes.pipeline import Outcome, Pipeline, Record
from ..passes.recipe import Recipe, make_pass
from ..passes.rewrite import Declined, Pass, Rewrite, near_misses
from ..passes.statistics import Calibration
from .calibration import calibration as _calibration
from .models import Flat, Loaded, as_flat, at_sizes, load_model, own_metric, random_inputs

if TYPE_CHECKING:
    from .lowering import Lowering

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass
class Result:
    """An optimized model: the program now, what was done to it, and ways out."""

    outcome: Outcome
    recipe: Recipe
    inputs: list[Flat] = field(default_factory=list)
    name: str = ""
    """What it was made of, such as "zoo:minilm"; `evaluate` takes its metric from there."""
    calibration: Calibration | None = field(default=None, repr=False)
    """The data of the passes' statistics, for `bisect`."""

    @property
    def module(self) -> torch.fx.GraphModule:
        """An ordinary trainable nn.Module with the original's signature and output structure."""
        return self.outcome.graph.module

    @property
    def graph(self) -> Graph:
        """The program."""
        return self.outcome.graph

    @property
    def records(self) -> list[Record]:
        """One a pass: matched, applied, declined, predicted, measured, seconds, undone."""
        return self.outcome.records

    @property
    def verification(self) -> dict[str, Any]:
        """The end result against the original, over every input tried."""
        total = self.outcome.total
        return total.as_dict() if total else {"note": "nothing was run: no inputs, or no weights"}

    def save(self, folder: str | Path) -> Path:
        """Write a folder: weights.safetensors, graph.json, recipe.resolved.toml, manifest.json. No pickle.

        Raises ResourceError when it can't be written; what was there before then stays.
        """
        folder = Path(folder)
        check_writable(folder)
        with replacing(folder) as temporary:
            temporary.mkdir()
            save_graph(self.graph, temporary)
            (temporary / "recipe.resolved.toml").write_text(self.recipe.to_toml(), encoding="utf8")
            manifest = {
                "rewright": __version__,
                "torch": torch.__version__,
                "model": self.name,
                "verification": self.verification,
                "passes": [r.as_dict() for r in self.records],
            }
            manifest["files"] = {f.name: digest(f) for f in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str), encoding="utf8")
        return folder

    def export_pt2(self, path: str | Path) -> Path:
        """Write a torch.export archive; loading it needs `import rewright` for our ops."""
        path = Path(path)
        check_writable(path)
        flat = self.inputs[0] if self.inputs else random_inputs(self.graph)
        with quiet(), replacing(path) as temporary:
            torch.export.save(re_export(self.graph, flat), temporary)
        return path

    def export(self, path: str | Path, profile: Profile = "ort", opset: int | None = None) -> Exported:
        """Write an ONNX file, checked in onnxruntime at several shapes before it gets its name."""
        check_writable(Path(path))
        metadata = {"rewright.model": self.name} if self.name else {}
        return export(self.graph, path, self.inputs[:1], profile, opset, metadata=metadata, tidied=self.recipe.tidy)

    def lower(self, backend: str = "auto", target: str | None = None) -> Lowering:
        """The program as a backend runs it: `.lowered.module` is called like the original, `.lowered.choices` say what runs every node and why.

        backend: torch, onnx (onnxruntime), tvm, triton, kernels (the best of the table for each op), or auto: the fastest here, measured.
        target: default the recipe's. Raises UsageError where the backend can't run there.
        """
        from .lowering import lower_for

        return lower_for(self.graph, Target.load(target or self.recipe.target), backend, self.inputs[0] if self.inputs else None)


def capture(model: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Mapping[str, Any] | None = None) -> Graph:
    """Capture a model as a Graph in canonical form. See ir.capture.capture for the arguments."""
    return Pipeline([], verify=False).run(_capture(model, args, kwargs, dynamic_shapes)).graph


def optimize(
    model: nn.Module | Graph | Loaded | str | Path,
    example_inputs: Any = None,
    recipe: str | Path | Recipe | Sequence[Pass] = "encoder-int8",
    calibration: Iterable[Any] | str | Path = (),
    target: str | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    verify: bool = True,
    ignore: Sequence[str] = (),
    latency: Callable[[Graph], float] | None = None,
    checkpoint: str | Path | None = None,
    train: bool = True,
    sizes: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> Result:
    """Rewrite a model by a recipe, every pass verified.

    example_inputs: dict of keyword arguments, tuple of positional ones, or one tensor (not needed for zoo: and files).
    recipe: shipped name, TOML path, Recipe, or a list of passes; one that only tidies takes any .onnx file (tools.onnx_file).
    calibration: batches like example_inputs, or a file (see `calibration` for what else); statistics are gathered on the first three
    quarters, lossy passes judged on the last.
    target: overrides the recipe's.
    metric: module -> number, higher is better (a zoo model has its own, on its calibration data).
    ignore: module paths no lossy pass touches. latency: graph -> milliseconds, recorded after every pass that changed something.
    checkpoint: the n-th `finetune` of the recipe keeps a file `checkpoint-n`, from which the same call goes on, also when the process was
    killed; the caller removes them (tools.stages.remove_checkpoints). train: False leaves such passes out.
    sizes: dynamic dims to fix, name -> size, beside the recipe's: passes that need to know the number of tokens then do. Shorter texts are filled up.
    Raises RecipeError, InputFileError, CaptureError, PromiseBroken (a required pass matched nothing), UsageError (no data to train on).
    Raises Interrupted for a Ctrl-C that leaves a checkpoint.
    """
    plan = as_recipe(recipe)
    plan = dataclasses.replace(plan, sizes={**plan.sizes, **(sizes or {})})
    if plan.only_tidies and isinstance(model, str | Path) and str(model).endswith(".onnx"):
        from .onnx_file import tidied_file

        return tidied_file(model, plan)
    loaded = at_sizes(loaded_from(model, example_inputs), plan.sizes)
    calibration = calibration if isinstance(calibration, str | Path) else list(calibration)
    batches = batches_of(loaded, calibration)
    held = max(1, len(batches) // 4) if batches else 0
    fit, held_out = batches[: len(batches) - held] or batches, batches[len(batches) - held :]
    machine = Target.load(target or plan.target)
    stages = None
    if train and any(p.trains for p in plan.passes):
        from .stages import Stages

        stages = Stages(loaded, calibration, metric, checkpoint, progress)
    if plan.budget.max_metric_drop is not None and metric is None and (metric := own_metric(loaded)) is None:
        raise UsageError("the budget max_metric_drop needs metric=, a function of the module (higher is better): only zoo models have one of their own")
    statistics = Calibration(fit, progress=progress) if fit else None
    pipeline = Pipeline(
        plan.passes,
        machine,
        plan.budget,
        plan.require_match,
        (*plan.ignore, *ignore),
        verify,
        predict=lambda g, sizes=None: predicted_seconds(g, machine, sizes),
        latency=latency,
        metric=metric,
        calibration=statistics,
        finetune=stages,
        progress=progress,
    )
    inputs = [*(held_out[:1] if loaded.made_up and held_out else loaded.inputs[:1]), *held_out[:4]]  # no budget should hang on random inputs
    with stages.interruptible() if stages is not None else contextlib.nullcontext():
        outcome = pipeline.run(loaded.graph, inputs)
    if verify and loaded.made_up and not batches and any(r.applied and not r.exact for r in outcome.records):
        outcome.graph.notes.append("lossy passes were judged on random inputs, for want of any: what they cost on yours, --calibration or --inputs will tell")
    return Result(outcome, plan, inputs, loaded.name, statistics)


def plan(model: Any, example_inputs: Any = None, recipe: Any = "encoder-int8", target: str | None = None) -> Result:
    """A dry run: what would match, be applied and declined, and what it is predicted to buy. Nothing is measured or written."""
    return optimize(model, example_inputs, recipe, target=target, verify=False, train=False)


def as_recipe(recipe: str | Path | Recipe | Sequence[Pass]) -> Recipe:
    """A recipe from any of the forms `optimize` takes."""
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, str | Path) else Recipe(tuple(recipe))


def loaded_from(model: Any, given: Any) -> Loaded:
    """A model in any of the forms `optimize` takes, with the inputs given for it or those it brings."""
    if isinstance(model, Loaded):
        return model
    if isinstance(model, str | Path):
        loaded = load_model(str(model), example=given)
        return loaded if given is None else Loaded(loaded.name, loaded.graph, [as_flat(loaded.graph, given)], loaded.module)
    if isinstance(model, Graph):
        return Loaded("graph", model, [as_flat(model, given)] if given is not None else [])
    if given is None:
        raise UsageError("a module needs example_inputs: a dict of keyword arguments, a tuple of positional ones, or one tensor")
    args, kwargs = ((), given) if isinstance(given, Mapping) else (tuple(given) if isinstance(given, list | tuple) else (given,), {})
    graph = _capture(model, args, kwargs)
    return Loaded(type(model).__name__, graph, [graph.flat_inputs(args, kwargs)], model)


def batches_of(loaded: Loaded, calibration: Iterable[Any] | str | Path) -> list[Flat]:
    """The calibration data that was given, or what the model brings."""
    return list(in_batches(loaded.graph, (as_flat(loaded.graph, b) for b in _calibration(calibration)))) or loaded.inputs[1:]


def load(folder: str | Path) -> Result:
    """A saved result, checked against its manifest. Raises InputFileError if the folder is incomplete or was altered."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf8"))
        recipe = Recipe.parse((folder / "recipe.resolved.toml").read_text(encoding="utf8"), str(folder / "recipe.resolved.toml"))
        for name, known in manifest["files"].items():
            if digest(folder / Path(name).name) != known:
                raise InputFileError(f"{folder / name} was changed after it was saved (its hash differs from the manifest)")
    except (OSError, ValueError, KeyError) as error:
        raise InputFileError(f"{folder} is not a saved result: {error}") from error
    graph = load_graph(folder)
    records = [Record(**{**r, "declined": [Declined(**d) for d in r["declined"]]}) for r in manifest["passes"]]
    return Result(Outcome(graph, graph, records, recipe.passes, []), recipe, name=str(manifest.get("model", "")))


def cost(graph: Graph, target: str | Target = "cpu", sizes: Mapping[str, int] | None = None) -> list[tuple[NodeCost, float, str]]:
    """Every call with its predicted roofline seconds on the target and what bounds it. No device is needed."""
    machine = target if isinstance(target, Target) else Target.load(target)
    return [(c, *_seconds(c, machine)) for c in node_costs(graph, sizes)]


def predicted_seconds(graph: Graph, machine: Target, sizes: Mapping[str, int] | None = None) -> float:
    """Sum of the roofline times of all calls: a prediction."""
    return sum(_seconds(c, machine)[0] for c in node_costs(graph, sizes))


def _seconds(c: NodeCost, machine: Target) -> tuple[float, str]:
    from ..backends.target import NAMES

    name = NAMES.get(c.dtype, "fp32")
    return machine.seconds(c.cost.flops, c.cost.bytes, c.cost.launches, name if name in machine.peak else "fp32", c.kind)


def verify(a: nn.Module | Graph, b: nn.Module | Graph, inputs: Any) -> Drift:
    """How far `b` is from `a` on inputs (one batch or a list), for a Graph also at batch 1 and other sizes."""
    batches = inputs if isinstance(inputs, list) else [inputs]
    if isinstance(a, Graph) and isinstance(b, Graph):
        flats = [as_flat(a, x) for x in batches]
        return compare(a.run, b.run, [*example_inputs(a, flats[0]), *flats[1:]], without=shorter_outputs(a, b))
    total = Drift()
    for batch in batches:
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch if isinstance(batch, tuple) else (batch,), {})
        with torch.no_grad():
            one, other = (pytree.tree_leaves(m(*args, **kwargs)) for m in (a, b))
        total = total & compare(lambda _, one=one: one, lambda _, other=other: other, [()])
    return total


def diff(a: Graph, b: Graph) -> Diff:
    """What changed between two graphs: ops, weights, cost, text."""
    return _diff(a, b)


def bisect(result: Result, limit: float | None = None) -> Culprit | None:
    """From a bad end result to the pass, then to the layer. None when the end is within `limit` of the original."""
    if not result.inputs:
        raise UsageError("bisect re-runs the passes and needs the inputs: use the Result of `optimize`, not a loaded one")
    if trainer := next((p for p in result.outcome.passes if p.trains), None):
        raise UsageError(f"bisect re-runs the passes, and {trainer.name} would train again at every step; bisect a recipe without it")
    return _bisect(result.outcome.original, result.outcome.passes, result.inputs, limit, calibration=result.calibration)


@dataclass(frozen=True)
class Explanation:
    """What a pass would do to a graph and why not elsewhere."""

    name: str
    applied: list[str]
    declined: list[Declined]
    misses: list[Miss]
    """Nearest misses, closest first."""
    ends_with: str = ""
    """The ops its pattern ends with."""

    def lines(self) -> list[str]:
        """For a person."""
        found = [f"{self.name}: applies to {len(self.applied)}, declines {len(self.declined)}, misses narrowly {len(self.misses)}"]
        if not (self.applied or self.declined or self.misses):
            found.append(f"  nothing in the model ends like its pattern{f' (no {self.ends_with})' if self.ends_with else ''}")
        found += [f"  applies   {a}" for a in self.applied]
        found += [f"  declines  {d.layer or d.node}: {d.why}" for d in self.declined]
        found += [f"  misses    {m}" for m in self.misses]
        return found


def explain(model: Graph | Loaded, name: str, most: int = 5, calibration: Iterable[Any] | str | Path = (), **options: Any) -> Explanation:
    """What the pass `name` matches in a model, what it declines and why, and what came closest to matching.

    calibration: as `optimize` takes it, for a pass that requires statistics.
    """
    loaded = loaded_from(model, None)
    graph, batches = loaded.graph, batches_of(loaded, calibration)
    step = make_pass(name, options)
    if not graph.canonical:
        graph = Pipeline([], verify=False).run(graph).graph
    misses = near_misses(graph, step, most) if isinstance(step, Rewrite) else []
    record = Pipeline([step], verify=False, calibration=Calibration(batches) if batches else None).run(graph).records[-1]
    ends_with = " or ".join(sorted({t._schema.name.split("::")[1] for t in Pattern(step.pattern).anchors})) if isinstance(step, Rewrite) else ""
    return Explanation(find_pass(name).name, record.layers, record.declined, misses, ends_with)
