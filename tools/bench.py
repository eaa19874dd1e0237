"""Fair timing: all candidates in one process, alternating, after a warm-up; medians with their spread, ratios run by run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """One candidate. Ratios are to the reference candidate of the same round, so a slow moment of the machine hits both."""

    name: str
    median_ms: float
    low_ms: float
    """25th percentile of the rounds."""
    high_ms: float
    """75th percentile."""
    ratio: float
    """Median over rounds of time / reference time: below 1 is faster."""
    ratio_low: float
    ratio_high: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def alternate(candidates: Mapping[str, Callable[[], Any]], reference: str, rounds: int = 15, warm_up: int = 2, budget_s: float = 20.0) -> dict[str, Timing]:
    """Time every candidate once a round, in turn, for `rounds` rounds or until `budget_s` seconds are spent (at least 5).

    Wall time of one call each; calls under a millisecond are repeated within the round until they take one.
    """
    repeats = {}
    for name, call in candidates.items():
        for _ in range(warm_up):
            call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, int(1e-3 / max(time.perf_counter() - begin, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > budget_s:
            break
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: _timing(name, own, times[reference]) for name, own in times.items()}


def _timing(name: str, own: list[float], reference: list[float]) -> Timing:
    low, _, high = statistics.quantiles(own, n=4)
    ratios = [a / b for a, b in zip(own, reference)]
    ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
    return Timing(name, statistics.median(own), low, high, statistics.median(ratios), ratio_low, ratio_high)
