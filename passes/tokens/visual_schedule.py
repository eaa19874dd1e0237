"""How many image tokens are left in front of which layer: the methods' schedules, and the smallest that hold a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .visual_scores import Criterion, ScoredBy

MethodName = Literal["balanced", "feather", "fastv", "pyramiddrop", "aim"]
TRIES = 16
"""Counts a search tries for a stage, in equal steps from the smallest to the one before."""


@dataclass(frozen=True)
class Stage:
    """In front of layer `layer` (from 0), `count` image tokens stay. merged: by merging, not dropping. grid: some of them evenly spread."""

    layer: int
    count: int
    merged: bool = False
    grid: bool = False


@dataclass(frozen=True)
class Method:
    """stages: (share of the layers that are before it, share of the image tokens that stay)."""

    stages: tuple[tuple[float, float], ...]
    criterion: Criterion = "last-token"
    scored_by: ScoredBy = "layer-before"
    uniform_stride: int = 0
    positions: str = "original"
    pre_llm_keep: float = 1.0

    def stages_of(self, layers: int, first: int) -> list[tuple[int, float]]:
        """(before layer, share) in a model of so many layers."""
        return [(max(first, round(depth * layers)), share) for depth, share in self.stages]


METHODS: dict[MethodName, Method] = {
    "balanced": Method(((1 / 4, 0.5), (1 / 2, 0.25)), uniform_stride=3),
    "feather": Method(((1 / 4, 0.3), (1 / 2, 0.09 * (1 / 9 + 0.3 * 8 / 9))), uniform_stride=3),  # the second: 9 % of what is left by the first
    "fastv": Method(((0.0, 0.5),), "last-token-rope"),
    "pyramiddrop": Method(((1 / 4, 0.5), (1 / 2, 0.25), (3 / 4, 0.125)), "last-token-rope", "layer-behind", positions="renumber"),
    "aim": Method(tuple(((13 + i) / 32, 1 - (i + 1) / 8) for i in range(8)), "pagerank", pre_llm_keep=0.125),
}
"""As published for 32 layers."""


def sigmoid_shares(curve: tuple[float, float, float], layers: int, first: int) -> list[tuple[int, float]]:
    """k_min + (1 - k_min) sigma(a (b - l / L)) / sigma(a b) of the image tokens in front of each layer l (spec 5.1: our form of P-Sigmoid)."""
    least, steepness, middle = curve

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    return [(i, least + (1 - least) * sigma(steepness * (middle - i / layers)) / sigma(steepness * middle)) for i in range(first, layers)]


def by_layer(shares: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """One share a layer: in a model of few layers several stages may meet, and the last one counts."""
    return sorted(dict(sorted(shares, key=lambda s: (s[0], -s[1]))).items())


def smallest(stages: Sequence[Stage], image: int, holds: Callable[[list[Stage]], bool]) -> list[Stage]:
    """G-Search: from shallow to deep the least count of each stage, not below its own, with which all so far hold; stages that drop none are left out."""
    found: list[Stage] = []
    for stage in stages:
        most = found[-1].count if found else image
        if stage.merged:
            found.append(stage)
            continue
        counts = sorted({stage.count + round((most - stage.count) * i / TRIES) for i in range(TRIES)})
        counts = [c for c in counts if c < most]
        low, high = 0, len(counts)
        while low < high:
            middle = (low + high) // 2
            if holds([*found, replace(stage, count=counts[middle])]):
                high = middle
            else:
                low = middle + 1
        if low < len(counts):
            found.append(replace(stage, count=counts[low]))
    return found
