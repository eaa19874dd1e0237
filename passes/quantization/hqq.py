"""Half-quadratic quantization: move the grid until the p-norm of the error is small, p < 1. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.formats import Format, Grid, grid
from .codes import blocks, dequantized, rounded

P = 0.7  # errors below 1 count for the few large weights that a grid should not stretch to
BETA = 10.0  # how closely the split variable follows the error
ITERATIONS = 20


def hqq_grid(w: Tensor, form: Format, group_size: int = 128, real_zero_point: bool = False) -> Grid:
    """The grid [out, groups, 1] for w [out, in] that minimises sum |w - w_q|^p (Badri and Shaji 2023, specs/quant_shiftadd.md 3.14).

    Half-quadratic splitting: the error is split into E, its shrunken self, and a rest that a least-squares step removes.
    real_zero_point: that step moves the zero point, which then lies between two codes, as in the original method; otherwise, and
    for symmetric formats, it moves the scale and the zero point stays a code. Errors are measured in steps, so BETA means the same
    for weights of any size. Each group keeps the best grid it met, the first of them that of rounding to nearest: never worse than it.
    """
    parts = blocks(w, form, group_size)
    if w.is_meta:
        return grid(parts, form)
    real = blocks(torch.ones_like(w[:1]), form, group_size)  # 0 where a short last group was filled up
    on = best = grid(parts, form)
    least = torch.full_like(on.scale, torch.inf)
    for _ in range(ITERATIONS):
        q = rounded(parts, on, form).to(parts.dtype)
        rest = parts - dequantized(q, on)
        error = rest.abs().pow(P).sum(-1, keepdim=True)
        better = error < least
        if not better.any():
            break
        best = Grid(torch.where(better, on.scale, best.scale), torch.where(better, on.zero_point, best.zero_point))
        least = torch.where(better, error, least)
        target = parts - _shrink(rest / on.scale) * on.scale
        if real_zero_point and not form.symmetric:
            zero = ((q - target / on.scale) * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
            on = Grid(on.scale, zero)
        else:
            steps = q - on.zero_point
            fitted = (target * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
            on = Grid(torch.where(fitted > 0, fitted, on.scale), on.zero_point)
    return best


def _shrink(d: Tensor) -> Tensor:
    """The generalised soft threshold that minimises |e|^p + beta / 2 (e - d)^2, to first order."""
    size = d.abs()
    return d.sign() * (size - size.pow(P - 1) / BETA).clamp(min=0)
