"""s_j = 2^-k_j: each channel's own floating-point exponent bias, moved into the weights (LLM-FP4, Liu et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .observed import Observed

_EXPONENT, _MANTISSA = 4, 3  # bits of float8 E4M3, the floating-point format of ir.formats


def fp_preshift(seen: Observed, exponent: int = _EXPONENT, mantissa: int = _MANTISSA) -> Tensor:
    """Powers of two that bring smaller channels up to the largest, as far as the exponent reaches: k_j in 0 .. 2^exponent - 1.

    B_j = 2^E - log2(max|x_j|) + log2(2 - 2^-M) - 1 puts the largest code on the channel's maximum; k_j = round(B_j) - round(min B).
    """
    largest = math.log2(2 - 2.0**-mantissa)
    bias = 2**exponent - torch.log2(seen.absmax.clamp_min(torch.finfo(torch.float64).tiny)) + largest - 1
    k = (torch.round(bias) - torch.round(bias.min())).clamp(0, 2**exponent - 1)
    return seen.settled(torch.exp2(-k))
