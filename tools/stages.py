"""Fine-tuning as a step of a recipe: what `Context.finetune` calls, a checkpoint a stage, and how an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..ir.errors import Interrupted, UsageError
from ..ir.files import check_writable
from ..ir.graph import Graph
from ..passes.pipeline import Pipeline
from ..passes.rewrite import Recovered
from .finetune import finetune
from .models import Loaded
from .optimize import Progress, batches_of, silent


class Stages:
    """Trains one graph after the other to give what the original gives.

    batches: as `optimize(calibration=...)` takes them; without any the training data of a zoo model, or what the model brings. Raises UsageError
    when there are none at all.
    checkpoint: stage n keeps `checkpoint-n` and goes on from it; a finished stage's answers at once. `remove` removes them all.
    """

    def __init__(
        self,
        original: Loaded,
        batches: Iterable[Any] | str | Path = (),
        metric: Callable[[nn.Module], float] | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self._batches = batches if isinstance(batches, str | Path) else list(batches)
        if original.zoo is None and not batches_of(original, self._batches):
            give = "--calibration FILE on the command line, calibration=batches in rewright.optimize, two batches at least"
            raise UsageError(f"the recipe fine-tunes and there is no data to learn from; give some: {give}")
        canonical = original.graph if original.graph.canonical else Pipeline([], verify=False).run(original.graph).graph
        self._original, self._metric, self._progress = replace(original, graph=canonical), metric, progress
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._done = 0
        if self._checkpoint is not None:
            check_writable(self._file(1))

    def __call__(self, graph: Graph, options: Mapping[str, Any]) -> Recovered:
        """The graph with its best weights. Neither it nor a clone of it is changed."""
        self._done += 1
        student, stage = graph.clone(), self._done
        student.canonical = True
        checkpoint = None if self._checkpoint is None else self._file(stage)

        def progress(what: str, done: int, total: int) -> None:
            self._progress(f"stage {stage}: {what}", done, total)

        found = finetune(student, self._original, self._batches, metric=self._metric, checkpoint=checkpoint, progress=progress, **options)
        record = found.result.records[-1]
        return Recovered(found.graph, found.sentence(), record.matched, tuple(record.layers), found.as_dict())

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A Ctrl-C behind the first judging becomes Interrupted, which says how to go on."""
        try:
            yield
        except KeyboardInterrupt as stopped:
            if not (files := self._files()):
                raise
            held = f"{files[-1]} holds the fine-tuning up to its last judging" if len(files) == 1 else f"{files[0]} to {files[-1].name} hold the stages so far"
            raise Interrupted(f"interrupted; {held}, and the same command goes on from there") from stopped

    def _file(self, stage: int) -> Path:
        assert self._checkpoint is not None
        return self._checkpoint.with_name(f"{self._checkpoint.name}-{stage}")

    def _files(self) -> list[Path]:
        return [] if self._checkpoint is None else checkpoints(self._checkpoint)


def checkpoints(checkpoint: str | Path) -> list[Path]:
    """The files of an unfinished run, in the order of its stages."""
    checkpoint = Path(checkpoint)
    stem = f"{checkpoint.name}-"
    there = checkpoint.parent.iterdir() if checkpoint.parent.is_dir() else ()
    found = [f for f in there if f.name.startswith(stem) and f.name.removeprefix(stem).isdigit()]
    return sorted(found, key=lambda f: int(f.name.removeprefix(stem)))


def remove_checkpoints(checkpoint: str | Path) -> None:
    """Behind a result that is written they are of no more use."""
    for file in checkpoints(checkpoint):
        file.unlink(missing_ok=True)
