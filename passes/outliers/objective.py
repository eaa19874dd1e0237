"""The objective of the searches: how far the consumers' outputs move when X~ and W~ are quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.formats import ACTIVATIONS, WEIGHTS, fake_quantize, grid_between
from .observed import Observed

Candidate = tuple[Tensor, Tensor | None]
"""(s, z), [channels] each; z None: no shift."""


@dataclass(frozen=True)
class Objective:
    """Mean squared error of the consumers' outputs on the sampled rows, relative to their mean square.

    weights, activations: names of ir.formats. The range of "int8-static" is that of the whole calibration, of other formats that of
    the sample or of each row. The bias W z is kept exactly, as the linear keeps it.
    """

    seen: Observed
    weights: str
    activations: str
    group_size: int = 128
    most_rows: int = 512

    def __post_init__(self) -> None:
        assert self.seen.rows is not None and self.seen.weights is not None
        n = len(self.seen.rows)
        step = max(-(-n // self.most_rows), 1)
        object.__setattr__(self, "_x", self.seen.rows[::step])
        object.__setattr__(self, "_y", self._x @ self.seen.weights.T)

    _x: Tensor = None  # type: ignore[assignment]
    _y: Tensor = None  # type: ignore[assignment]

    def loss(self, s: Tensor, z: Tensor | None = None) -> float:
        """The error after migration by s and z."""
        assert self.seen.weights is not None
        form, weights = ACTIVATIONS[self.activations], self.seen.weights
        x, y = self._x, self._y
        low, high = self.seen.low, self.seen.high
        if z is not None:
            x, y = x - z.float(), y - weights @ z.float()
            low, high = low - z, high - z
        on = None
        if form is not None and self.activations.endswith("-static"):
            on = grid_between((low / s).amin().float(), (high / s).amax().float(), form)
        x = fake_quantize(x / s.float(), form, self.group_size, on)
        w = fake_quantize(weights * s.float(), WEIGHTS[self.weights], self.group_size)
        return float((x @ w.T - y).square().mean() / self._y.square().mean().clamp_min(1e-30))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The candidate with the least error; the first of equals."""
        with torch.no_grad():
            return min(candidates, key=lambda c: self.loss(*c))
