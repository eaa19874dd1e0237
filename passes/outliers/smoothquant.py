"""s_j = max|x_j|^a / max|w_:j|^(1-a): outliers of X split between X and W (SmoothQuant, Xiao et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Candidate, Objective
from .observed import Observed

_LEAST = 1e-5  # of a maximum


def smoothquant(seen: Observed, alpha: float) -> Tensor:
    """s for one alpha: 0 leaves X's outliers where they are, 1 moves them into the weights."""
    return seen.settled(seen.absmax.clamp_min(_LEAST) ** alpha / seen.weight_absmax.clamp_min(_LEAST) ** (1 - alpha))


def smoothquant_search(objective: Objective, steps: int) -> Candidate:
    """The best of s = 1 and of `steps` alphas from 0 to 1."""
    seen = objective.seen
    alphas = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    return objective.best([(torch.ones_like(seen.absmax), None), *((smoothquant(seen, a), None) for a in alphas)])


def smoothquant_bias(seen: Observed, alpha: float) -> Candidate:
    """SmoothQuant's s, and z that centres each scaled channel (SQ-b of MPTQ-ViT, arXiv 2401.14895): z / s is the middle of x / s."""
    return smoothquant(seen, alpha), seen.center
