"""A recovered model and how the recovery went: its curve, what came back, where it is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..ir.graph import Graph
from . import ablation
from .optimize import Result
from .training import Row, Trained

DRIFT = "drift"
"""The column of the curve by which weights are chosen: held-out distance from the original, 0 where they are equal."""


@dataclass(frozen=True)
class Metric:
    """The model's own metric in the curve."""

    name: str
    original: float
    """What the original has."""
    on: str = ""
    """What it is measured on along the way."""


@dataclass(frozen=True)
class Finetuned:
    """A model that was trained to give what its original gives."""

    result: Result
    """The student with its best weights; its records end with one of this run."""
    trained: Trained
    terms: tuple[str, ...]
    """What was learned, such as "kl of logits"."""
    drift: str
    """What `drift` is."""
    data: str
    """What it was trained on and chosen by."""
    weights: tuple[int, int]
    """Elements that were trained, and of all float weights."""
    metric: Metric | None = None
    conditions: str = ""
    """Precision, threads, versions."""
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Where `drift` is a mean over layers: of each before and after."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a program with linear attention: drift and metric whole and with one part switched off (tools.ablation)."""

    @property
    def graph(self) -> Graph:
        """The program."""
        return self.result.graph

    @property
    def curve(self) -> list[Row]:
        """A row a judging: step, seconds, rows (tokens, texts or images seen), loss, drift, and the metric where there is one."""
        return self.trained.curve

    @property
    def seconds(self) -> float:
        """Wall time of the run, judgings included, over all its parts."""
        return self.trained.seconds

    @property
    def improved(self) -> bool:
        """Whether what is given back differs from the start."""
        return self.trained.best > 0

    def drift_back(self) -> float:
        """How much of the drift is gone: 1 all of it, 0 nothing."""
        first, best = self._ends(DRIFT)
        return 1 - best / first if first else 0.0

    def metric_back(self) -> float | None:
        """How much of what the metric had lost came back; None without a metric, or where nothing was lost."""
        if self.metric is None:
            return None
        first, best = self._ends(self.metric.name)
        return (best - first) / (self.metric.original - first) if self.metric.original != first else None

    def _ends(self, key: str) -> tuple[float, float]:
        first, best = self.curve[0][key], self.curve[self.trained.best][key]
        assert first is not None and best is not None  # every judging has them
        return first, best

    def sentence(self) -> str:
        """What came back and how long it took, in one line."""
        minutes = f"{self.seconds / 60:.1f} minutes"
        early = f" ({self.trained.stopped})" if self.trained.stopped else ""
        key = DRIFT if self.metric is None else self.metric.name
        parts = f"; ablation: {ablation.sentence(self.parts, key, DRIFT)}" if self.parts else ""
        if not self.improved:
            return f"nothing came back in {minutes}: no weights were better than the first on held-out data, which are given back{early}{parts}"
        first, best = self._ends(DRIFT)
        found = f"{100 * self.drift_back():.0f} % of the loss came back in {minutes}{early}: {self.drift} {first:.4g} -> {best:.4g}"
        if self.metric is not None:
            before, after = self._ends(self.metric.name)
            back = self.metric_back()
            share = f", {100 * back:.0f} % of what it had lost" if back is not None else ""
            found += f"; {self.metric.name} {before:.4g} -> {after:.4g} (original {self.metric.original:.4g}){share}"
        return found + parts

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {k: v for k, v in vars(self).items() if k not in ("result", "trained", "metric")}
        metric = None if self.metric is None else {**vars(self.metric), "came_back": self.metric_back()}
        return {**vars(self.trained), "improved": self.improved, "drift_came_back": self.drift_back(), "metric": metric, **facts, "sentence": self.sentence()}
