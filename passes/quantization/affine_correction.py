"""Per output channel, the line through (quantized output, float output) that makes up for what rounding did on average."""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR = 100  # rows that speak for the identity
NARROWEST, WIDEST = 0.5, 2.0  # factors a scale may take


def affine_correction(y: Tensor, y_q: Tensor) -> tuple[Tensor, Tensor]:
    """a, c [out], float64, so that a y_q + c is closer to y in every channel than y_q is. y, y_q: [n, out].

    Least squares (specs/quant_shiftadd.md 3.17): a = cov / var, drawn towards 1 by n / (n + 100) and kept within 0.5 .. 2,
    c = mean(y) - a mean(y_q). The squared error is a parabola in a, and a lies between its lowest point and 1: it cannot grow.
    """
    y, y_q = y.double(), y_q.double()
    mean, mean_q = y.mean(0), y_q.mean(0)
    around = y_q - mean_q
    variance = around.square().mean(0)
    fitted = ((y - mean) * around).mean(0) / torch.where(variance == 0, 1.0, variance)
    a = torch.where(variance == 0, 1.0, 1 + (fitted - 1) * len(y) / (len(y) + PRIOR)).clamp(NARROWEST, WIDEST)
    return a, mean - a * mean_q
