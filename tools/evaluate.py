"""One way to score anything that runs: on its zoo model's own metric, a metric of the user's, or agreement with another model."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.lower import BACKENDS as LOWERINGS
from ..backends.lower import lower
from ..backends.onnx.session import Session
from ..backends.target import Target
from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.sizes import token_count
from .calibration import calibration
from .models import Loaded, at_length, check_onnx, load_model, runner_of
from .optimize import Result, load
from .score import Run, Score, ratio
from .zoo import load_zoo

Judge = Callable[[Run], float | list[Score]]

BACKENDS = ("torch", "compile", "onnx")


@dataclass(frozen=True)
class Evaluation:
    """What a judge found."""

    model: str
    on: str
    """Whose metric: "zoo:minilm", "agreement with zoo:minilm", "py:module:function"."""
    backend: str
    scores: list[Score]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "scores": [s.as_dict() for s in self.scores]}


def evaluate(
    model: nn.Module | Graph | Result | Loaded | str | Path,
    on: str | Judge | None = None,
    against: Any = None,
    data: Any = None,
    backend: str = "torch",
    most: int | None = None,
) -> Evaluation:
    """Score a model, each metric with its 95 % confidence interval.

    model: a module, a graph, a result, or MODEL as on the command line; an .onnx file runs in onnxruntime.
    on: "zoo:NAME" for that zoo model's metric on held-out data, "py:module:function" or a callable for one's own:
      `judge(run) -> float or [Score]` with `run({input name: tensor}) -> the first output`. Default: the zoo model it came from.
    against, data: another model and inputs (as for `calibration`): cosine of the outputs and agreement of the likeliest entries.
    backend: "torch", "compile" (torch.compile), "onnx" (exported, then onnxruntime), "tvm", or a target such as "h200" to lower for.
    most: only so many held-out items.
    Raises UsageError when there is nothing to judge by.
    """
    begin = time.perf_counter()
    name, runnable = _resolve(model)
    with tempfile.TemporaryDirectory() as scratch:
        run, used = _runner(runnable, backend, Path(scratch))
        if against is not None:
            other, reference = _resolve(against)
            if data is None:
                raise UsageError(f"agreement with {other} is measured on data: give batches of inputs or a file of them")
            where, scores = f"agreement with {other}", _agreement(run, _runner(reference, "torch", Path(scratch))[0], calibration(data, most=most))
        else:
            where, scores = _judged(run, on if on is not None else name, most)
    return Evaluation(name, where, used, scores, time.perf_counter() - begin)


def _judged(run: Run, on: str | Judge, most: int | None) -> tuple[str, list[Score]]:
    if isinstance(on, str):
        kind, _, rest = on.partition(":")
        if kind == "zoo":
            return on, load_zoo(rest).judge(run, most)
        if kind != "py":
            raise UsageError(f"{on} has no metric of its own: judge it with on=zoo:NAME, on=py:module:function, or against another model on data")
        judge, where = _from_python(rest), on
    else:
        judge, where = on, getattr(on, "__name__", "metric")
    found = judge(run)
    return where, found if isinstance(found, list) else [Score(where, float(found), float("nan"), float("nan"), "the user's own metric")]


def _from_python(place: str) -> Judge:
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"py:{place}: {error}; expected py:module:function") from error


def _resolve(model: Any) -> tuple[str, nn.Module | Graph | Path]:
    """The name of the model it came from, and what to run."""
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix == ".onnx":
            return check_onnx(path).metadata_props.get("rewright.model", str(path)), path
        model = load(path) if (path / "manifest.json").exists() else load_model(str(model))
    if isinstance(model, Result):
        return model.name, model.graph
    if isinstance(model, Loaded):
        return model.name, model.graph
    return type(model).__name__, model


def _runner(model: nn.Module | Graph | Path, backend: str, scratch: Path) -> tuple[Run, str]:
    """What runs a batch of named inputs, and the backend's name."""
    if isinstance(model, nn.Module) and backend in BACKENDS[:2]:
        return _in_torch(model, backend)
    if isinstance(model, nn.Module):
        raise UsageError(f"a module is scored on torch or compile, not {backend!r}; capture it first (rewright.capture)")
    if isinstance(model, Path) or backend == "onnx":
        return _session_run(model, scratch), "onnxruntime"
    if backend not in BACKENDS:
        known = backend in LOWERINGS
        lowered = lower(model, Target.load("cpu" if known else backend), backend=backend if known else "kernels")
        return at_length(runner_of(lowered.module), token_count(model)), backend
    run, used = _in_torch(model.module, backend)
    return at_length(run, token_count(model)), used


def _in_torch(module: nn.Module, backend: str) -> tuple[Run, str]:
    if backend == "compile":
        return runner_of(torch.compile(module, dynamic=True)), "torch.compile"
    return runner_of(module), "torch"


def _session_run(model: Graph | Path, scratch: Path) -> Run:
    from ..backends.onnx.export import export

    if isinstance(model, Graph):
        model = export(model, scratch / "model.onnx").path
    session = Session(model, torch.get_num_threads())

    def run(batch: dict[str, Tensor]) -> Tensor:
        if missing := [name for name in session.inputs if name not in batch]:
            raise UsageError(f"the ONNX model reads {', '.join(missing)}, which the batch lacks; it has {', '.join(batch)}")
        return session([batch[name] for name in session.inputs])[0]

    return at_length(run, session.token_count)


def _agreement(run: Run, reference: Run, batches: Iterable[Any]) -> list[Score]:
    """Over rows of the first output (its last axis); rows an attention_mask calls padding are left out. Intervals are over examples."""
    cosines, agreed, examples = [], [], []
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise UsageError(f"data to compare on is batches of inputs by name; got a {type(batch).__name__}")
        a, b = (r(dict(batch)).float() for r in (reference, run))
        mask = batch.get("attention_mask")
        valid = mask != 0 if mask is not None and a.dim() == 3 and a.shape[:2] == mask.shape else torch.ones(a.shape[:-1], dtype=torch.bool)
        cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=-1)[valid])
        agreed.append((a.argmax(-1) == b.argmax(-1))[valid])
        examples.append(valid.nonzero()[:, 0] + number * 1_000_000)
    if not cosines:
        raise UsageError("the data to compare on is empty")
    rows, hits, groups = torch.cat(cosines), torch.cat(agreed), torch.cat(examples)
    on = f"{len(rows):,} rows of {len(groups.unique())} examples"
    return [ratio("cosine", rows, torch.ones(len(rows)), on, groups), ratio("agreement", hits, torch.ones(len(rows)), on, groups)]
