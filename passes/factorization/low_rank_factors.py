"""The two factors of one linear, or of several with the first in common, from their weights: the recipe of a low-rank rewrite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..statistics import Moments
from .whitening import Inputs, Outputs, balanced, basis, refitted, spectrum


@dataclass(frozen=True)
class Data:
    """What is known of linears that read the same value.

    moments: of the value, where any are needed.   inputs: what the score says of it.   outputs: what it says of each linear's result.
    """

    moments: Moments | None
    inputs: Inputs
    outputs: tuple[Outputs, ...]

    def fit(self, affine: bool, shrink: float) -> Inputs:
        """The value's own second moments, about its mean where a bias takes up the rest."""
        assert self.moments is not None
        return Inputs(self.moments.gram, self.moments.mean if affine else None, shrink)


@dataclass(frozen=True)
class Factors:
    """weights..., biases... of linears -> "first" [rank, n] and, for each, "second0" [m, rank] and "bias0" [m] where it is affine.

    with_bias: which of the linears have one.   refit: the share of ridge, or None.
    Several linears are factorised as one stacked matrix, each weighted so that its error counts relative to what it makes.
    """

    rank: int
    data: Data
    with_bias: tuple[bool, ...]
    affine: bool
    balanced: bool
    ridge: float
    shrink: float
    refit: bool

    def __call__(self, *sources: Tensor) -> dict[str, Tensor]:
        weights = sources[: len(self.with_bias)]
        if weights[0].is_meta:
            found = {"first": weights[0].new_empty(self.rank, weights[0].shape[1])}
            for i, w in enumerate(weights):
                found |= {f"second{i}": w.new_empty(len(w), self.rank), f"bias{i}": w.new_empty(len(w))}
            return found
        biases = iter(sources[len(weights) :])
        targets = [self._target(w, next(biases) if has else None) for w, has in zip(weights, self.with_bias)]
        first, seconds = self._factored([w for w, _ in targets])
        first, seconds = first.to(weights[0].dtype), [second.to(weights[0].dtype) for second in seconds]
        found = {"first": first}
        for i, ((w, b), second) in enumerate(zip(targets, seconds)):
            found[f"second{i}"] = second
            if self.affine and self.data.moments is not None:  # what rounding does to the mean is made up for too
                mean = self.data.moments.mean
                found[f"bias{i}"] = (b + w @ mean - second.double() @ (first.double() @ mean)).to(second.dtype)
        return found

    def _target(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is factorised in place of w, b: float64."""
        b = w.new_zeros(len(w)) if b is None else b
        moments = self.data.moments
        return (w.double(), b.double()) if moments is None else moments.target(w, b, self.affine, self.ridge)

    def _factored(self, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        scales = scales_of(weights, self.data)
        stack = stacked(weights, self.data, scales)
        u = basis(stack, self.rank, self.data.inputs)
        first = u.T @ stack
        parts = u.split([len(w) for w in weights])
        seconds = [o.unweigh(part) * s for part, o, s in zip(parts, self.data.outputs, scales)]
        if self.refit:
            fit = self.data.fit(self.affine, self.shrink)
            seconds = [refitted(w, first, second, fit, self.ridge) for w, second in zip(weights, seconds)]
        if self.balanced:
            first, whole = balanced(first, torch.cat(seconds))
            seconds = list(whole.split([len(w) for w in weights]))
        return first, seconds


def scales_of(weights: list[Tensor], data: Data) -> list[float]:
    """The root of what each linear's outputs cost in all, so that errors of several count relative to it; 1 for a single one."""
    if len(weights) == 1:
        return [1.0]
    weighted = [o.weigh(w) for w, o in zip(weights, data.outputs)]
    return [float((data.inputs.times(w) * w).sum().clamp(min=0).sqrt()) or 1.0 for w in weighted]


def stacked(weights: list[Tensor], data: Data, scales: list[float]) -> Tensor:
    """[sum of m, n], weighted by K's roots and scaled."""
    rows = [o.weigh(w) if s == 1 else o.weigh(w) / s for w, o, s in zip(weights, data.outputs, scales)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def joint_is_better(weights: list[Tensor], data: Data, ranks: list[int], joint_rank: int) -> bool:
    """Whether one basis of `joint_rank` for all leaves less error than one of each's own rank; errors relative, summed."""
    scales = scales_of(weights, data)
    apart = 0.0
    for w, o, s, k in zip(weights, data.outputs, scales, ranks):
        apart += float(spectrum(o.weigh(w) / s, data.inputs)[k:].sum())
    return float(spectrum(stacked(weights, data, scales), data.inputs)[joint_rank:].sum()) < apart
