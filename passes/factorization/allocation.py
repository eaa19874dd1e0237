"""How much of each layer to keep, so that all together keep a given share of their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ...ir.errors import UsageError

Method = Literal["uniform", "waterfill", "waterfill-influence", "block-influence", "welore"]
"""uniform: the same share everywhere.   waterfill: the least sum of relative errors, exactly.   waterfill-influence: that with errors
weighted by 1 + how much the layer's block changes the residual stream (0 to 1 over layers).   block-influence: shares from influence
alone (MoDeGPT).   welore: one threshold for all normalised singular values (WeLore). specs/structured_ffn.md 4."""

TEMPERATURE = 0.1  # of block-influence: how unequal shares may get
MOST_REMOVED = 0.8  # of a layer, by block-influence


@dataclass(frozen=True)
class Layer:
    """A layer of which `kept` components (ranks of a matrix, hidden channels of a feed-forward layer) stay.

    errors: float64 [components + 1], the error with 0, 1, ... components relative to that with 0: from 1 down, never rising.
    unit: parameters one component takes.   dense: parameters of the layer as it is.
    least: components it keeps at least, whatever the budget.
    influence: 1 - cos(block input, block output) of its block; for the two methods that use it.
    spectrum: float64 [components], singular values from largest to smallest scaled to [0, 1]; for welore.
    """

    errors: Tensor
    unit: int
    dense: int
    least: int = 1
    influence: float | None = None
    spectrum: Tensor | None = None

    @property
    def components(self) -> int:
        """How many there are."""
        return len(self.errors) - 1


def allocate(layers: Sequence[Layer], keep: float, method: Method = "waterfill", floor: float = 0.5, round_to: int = 1) -> list[int | None]:
    """Components to keep of each layer; None: it stays dense, since the components it would keep take as many parameters.

    keep: share of the parameters of all layers together.   floor: no layer keeps less than this share of what uniform would give it.
    round_to: kept components are multiples of it (or all of them); what rounding leaves over goes where it helps most.
    The parameters of the result never exceed the budget, but where `least` asks for more.
    Raises UsageError where a method lacks what it needs.
    """
    if not layers or keep >= 1:
        return [None] * len(layers)
    budget = keep * sum(layer.dense for layer in layers)
    wanted = _METHODS[method](layers, keep)
    low = [min(layer.components, math.ceil(max(layer.least, floor * keep * layer.dense / layer.unit) / round_to) * round_to) for layer in layers]
    dense: set[int] = set()
    while True:  # layers that reach break-even become dense, what that takes or gives back changes the others' share
        free = [i for i in range(len(layers)) if i not in dense]
        left = budget - sum(layers[i].dense for i in dense)
        kept = dict(zip(free, wanted([layers[i] for i in free], [low[i] for i in free], left))) if free else {}
        full = {i for i, k in kept.items() if k * layers[i].unit >= layers[i].dense}
        if not full:
            break
        dense |= full
    rounded = _rounded([layers[i] for i in kept], list(kept.values()), [low[i] for i in kept], round_to, budget - sum(layers[i].dense for i in dense))
    found = dict(zip(kept, rounded))
    return [found.get(i) for i in range(len(layers))]


Filler = Callable[[Sequence[Layer], Sequence[int], float], list[int]]
"""(layers, least components of each, parameters for all) -> components."""


def _threshold(fill: Callable[[Layer, float], int], high: float) -> Filler:
    """The lowest threshold whose components fit: fill(layer, threshold) -> components, falling with the threshold."""

    def filler(layers: Sequence[Layer], low: Sequence[int], budget: float) -> list[int]:
        def at(t: float) -> list[int]:
            return [max(least, fill(layer, t)) for layer, least in zip(layers, low, strict=True)]

        below, above = 0.0, high
        if _parameters(layers, at(below)) <= budget:
            return at(below)
        for _ in range(200):
            middle = (below + above) / 2
            if _parameters(layers, at(middle)) <= budget:
                above = middle
            else:
                below = middle
        return at(above)

    return filler


def _uniform(layers: Sequence[Layer], keep: float) -> Filler:
    return _threshold(lambda layer, t: min(layer.components, _whole((1 - t) * layer.dense / layer.unit)), 1.0)


def _waterfill(layers: Sequence[Layer], keep: float) -> Filler:
    return _filled([1.0] * len(layers), layers)


def _waterfill_influence(layers: Sequence[Layer], keep: float) -> Filler:
    influence = _influences(layers, "waterfill-influence")
    spread = influence.max() - influence.min()
    return _filled((1 + (influence - influence.min()) / (spread if spread > 0 else 1)).tolist(), layers)


def _filled(weights: Sequence[float], layers: Sequence[Layer]) -> Filler:
    """Components in order of error taken away for a parameter. Errors are made convex first, so that the order is that of the layer."""
    gains = {id(layer): -_convex(layer.errors).diff() * w / layer.unit for layer, w in zip(layers, weights, strict=True)}
    high = max((float(g[0]) for g in gains.values() if len(g)), default=0.0) * 2 + 1e-300
    return _threshold(lambda layer, t: int((gains[id(layer)] > t).sum()), high)


def _convex(errors: Tensor) -> Tensor:
    """The largest convex function below a falling curve: greedy steps along it are optimal."""
    points: list[int] = []
    values = errors.tolist()
    for i, y in enumerate(values):
        while len(points) > 1 and (values[points[-1]] - values[points[-2]]) * (i - points[-2]) >= (y - values[points[-2]]) * (points[-1] - points[-2]):
            points.pop()
        points.append(i)
    hull = torch.empty_like(errors)
    for a, b in pairwise(points):
        hull[a : b + 1] = torch.linspace(values[a], values[b], b - a + 1, dtype=errors.dtype)
    if len(points) == 1:
        hull[:] = errors
    return hull


def _block_influence(layers: Sequence[Layer], keep: float) -> Filler:
    removed = torch.softmax(-_influences(layers, "block-influence") / TEMPERATURE, 0)
    shares = {id(layer): float(share) for layer, share in zip(layers, removed)}

    def fill(layer: Layer, t: float) -> int:  # what a layer can't give up is given up by the others in proportion
        return _whole((1 - min(MOST_REMOVED, t * shares[id(layer)])) * layer.dense / layer.unit)

    return _threshold(fill, 1 / float(removed.min()))


def _welore(layers: Sequence[Layer], keep: float) -> Filler:
    if any(layer.spectrum is None for layer in layers):
        raise UsageError("welore allocates by singular values of matrices, and here are layers without; use waterfill or uniform")
    return _threshold(lambda layer, t: int((layer.spectrum >= t).sum()), 1.0 + 1e-9)  # type: ignore[operator]


def _influences(layers: Sequence[Layer], method: str) -> Tensor:
    if any(layer.influence is None for layer in layers):
        raise UsageError(f"{method} needs the influence of the residual blocks, and a layer is in none; use waterfill or uniform")
    return torch.tensor([layer.influence for layer in layers], dtype=torch.float64)


_METHODS: dict[str, Callable[[Sequence[Layer], float], Filler]] = {
    "uniform": _uniform,
    "waterfill": _waterfill,
    "waterfill-influence": _waterfill_influence,
    "block-influence": _block_influence,
    "welore": _welore,
}


def _whole(x: float) -> int:
    """The whole part of a number that sums of floats may have left just below one."""
    return int(x + 1e-9)


def _parameters(layers: Sequence[Layer], kept: Sequence[int]) -> float:
    return sum(layer.unit * k for layer, k in zip(layers, kept, strict=True))


def _rounded(layers: Sequence[Layer], kept: Sequence[int], low: Sequence[int], round_to: int, budget: float) -> list[int]:
    """Multiples of round_to: down first, then up where a parameter takes most error away, as long as the budget lasts."""
    found = [max(k // round_to * round_to, least) for k, least in zip(kept, low, strict=True)]
    while True:
        steps = []
        for i, (layer, k) in enumerate(zip(layers, found)):
            more = (k // round_to + 1) * round_to
            price = (more - k) * layer.unit
            if more - kept[i] < round_to and more * layer.unit < layer.dense and _parameters(layers, found) + price <= budget:
                steps.append((float(layer.errors[k] - layer.errors[more]) / price, i, more))
        if not steps:
            return found
        _, i, more = max(steps)
        found[i] = more
