"""Whether a matrix holds -g, 0 and g and nothing else, a g a row or one for all; then its codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.formats import pack

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""How far equal values may lie apart, relatively: w + (q - w), the straight-through form of training code, leaves a few units in the last place of q."""


@dataclass(frozen=True)
class Ternary:
    """A matrix [out, in] as the tensors of ternary_linear: four codes a byte, and the scale, [1] or [out]."""

    packed: Tensor
    scale: Tensor


def ternary(w: Tensor) -> Ternary | str:
    """The codes of a weight [out, in], or one sentence why it has none."""
    size = w.abs() if w.dtype.itemsize >= 4 else w.abs().float()
    largest = size.amax(1, keepdim=True)
    fits = ((size == 0) | (size >= largest * (1 - ROUNDING))).all(1) & largest[:, 0].isfinite()
    if not fits.all():
        return _why_not(w, int(fits.int().argmin()))
    scale = torch.where(largest == 0, 1.0, largest)[:, 0]
    used = scale[largest[:, 0] > 0]
    if not len(used) or used.min() >= used.max() * (1 - ROUNDING):
        scale = used.max()[None] if len(used) else scale[:1]
    return Ternary(pack(w.sign() + 1, 2), scale)


def _why_not(w: Tensor, row: int) -> str:
    values = w[row].unique().tolist()
    if len(values) > 3:
        return f"row {row} of its weight has {len(values):,} distinct values; ternary ones are at most three: -g, 0 and g"
    return f"row {row} of its weight holds {', '.join(f'{v:g}' for v in values)}, which are not -g, 0 and g"
