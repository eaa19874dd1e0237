"""z = the middle of each channel, s_j = max(1, max|x_j - z_j| / t): only channels wider than t are scaled (Outlier Suppression+, Wei et al. 2023)."""

from __future__ import annotations

import math

import torch

from .objective import Candidate, Objective
from .observed import LOWEST


def osplus(objective: Objective, steps: int, shift: bool) -> Candidate:
    """The best of `steps` thresholds t, and of no migration at all.

    The original steps t evenly from max|x - z| down to 1; here it goes down by equal factors to the narrowest channel, so that
    models whose activations are all below 1, or mostly far below the outliers, are searched as well. The first t scales nothing.
    """
    seen = objective.seen
    z = seen.center if shift else None
    reach = seen.absmax if z is None else (seen.high - seen.low) / 2
    alive = reach[reach > 0]
    none = (torch.ones_like(reach), None)
    if not len(alive):
        return none
    top = float(alive.max())
    bottom = max(float(alive.min()), top * LOWEST)
    ts = torch.logspace(math.log10(top), math.log10(bottom), steps, dtype=torch.float64).tolist()
    return objective.best([none, *((seen.settled((reach / t).clamp_min(1)), z) for t in ts)])
