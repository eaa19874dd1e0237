"""Numbers with a confidence interval: what a judge says of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

Run = Callable[[dict[str, Tensor]], Tensor]
"""What is judged: a batch of named inputs -> the model's first output."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """One metric, its 95 % confidence interval, and what it was measured on."""

    name: str
    value: float
    low: float
    high: float
    on: str
    """Such as "599 held-out digits"."""
    higher_is_better: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def proportion(name: str, hits: Tensor, on: str) -> Score:
    """Share of true values in `hits` [n], with Wilson's score interval (Wilson 1927), which is honest near 0 and 1 too."""
    from scipy.stats import binomtest

    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(CONFIDENCE, "wilson")
    return Score(name, hits.double().mean().item(), found.low, found.high, on)


def mean(name: str, values: Tensor, on: str) -> Score:
    """Mean of `values` [n], with a bootstrap interval over the n items."""
    return ratio(name, values, torch.ones(len(values)), on)


def ratio(
    name: str, amounts: Tensor, counts: Tensor, on: str, groups: Tensor | None = None, of: Callable[[Any], Any] = lambda x: x, better: bool = True
) -> Score:
    """`of(sum(amounts) / sum(counts))` of items [n], with a percentile bootstrap interval over the items.

    groups [n]: numbers of what is independent, where items are not, such as the file a window comes from; whole groups are drawn.
    """
    labels = torch.arange(len(amounts)) if groups is None else groups.unique(return_inverse=True)[1]
    size = int(labels.max()) + 1
    sums = torch.zeros(2, size, dtype=torch.float64).index_add_(1, labels, torch.stack([amounts.double(), counts.double()])).numpy()
    draws = min(10_000, 20_000_000 // size)  # of `size` groups each; memory bounds them
    drawn = numpy.random.default_rng(0).integers(size, size=(draws, size), dtype=numpy.int32)
    resampled = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    low, high = sorted(of(q) for q in numpy.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return Score(name, float(of(sums[0].sum() / sums[1].sum())), float(low), float(high), on, better)
