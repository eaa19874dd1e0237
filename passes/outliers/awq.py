"""s_j = E|x_j|^r, r searched: weights of channels that matter are rounded more finely (AWQ, Lin et al. 2024)."""

from __future__ import annotations

from .objective import Candidate, Objective


def awq(objective: Objective, steps: int) -> Candidate:
    """The best of r = 0, 1/steps, ... < 1, each normalised to sqrt(max s min s) = 1. r = 0 changes nothing."""
    mean_abs = objective.seen.mean_abs
    assert mean_abs is not None
    candidates = []
    for i in range(steps):
        s = (mean_abs ** (i / steps)).clamp_min(1e-4)
        candidates.append((objective.seen.settled(s / (s.max() * s.min()).sqrt()), None))
    return objective.best(candidates)
