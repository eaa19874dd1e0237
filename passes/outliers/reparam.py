"""Every channel's own quantizer (step s_j, zero point) becomes a common one: s_j / stat(s) (RepQ-ViT: mean; DopQ-ViT: median or MAD)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .objective import Candidate
from .observed import Observed

Statistic = Literal["mean", "median", "mad"]
_MADS = 3


def reparam(seen: Observed, stat: Statistic, bits: int, shift: bool) -> Candidate:
    """s_j / s~ with s~ = stat(s), and z that puts the zero points on zp~ = round(stat(zp)).

    Channel j's quantizer has step s_j = (high - low) / (2^bits - 1) and zero point -low / s_j; (x - z) / s then spans
    s~ (0 - zp~) .. s~ (2^bits - 1 - zp~) in all channels. Without a shift: symmetric quantizers, s_j = max|x_j| / (2^(bits-1) - 1).
    The statistic sets the common step, not the ratios between channels: products that rescale W anyway are the same for all three.
    """
    if not shift:
        step = seen.absmax / (2 ** (bits - 1) - 1)
        return seen.settled(step / _typical(step, stat, step)), None
    step = (seen.high - seen.low) / (2**bits - 1)
    s = seen.settled(step / _typical(step, stat, step))
    zero_point = -seen.low / torch.where(step > 0, step, 1.0)
    common = torch.round(_typical(zero_point, stat, step))
    return s, seen.low + common * step


def _typical(values: Tensor, stat: Statistic, step: Tensor) -> Tensor:
    """A typical value over live channels; "mad": the mean of those whose step lies within 3 MADs of the median step."""
    values, step = values[step > 0], step[step > 0]
    if not len(values):
        return torch.ones((), dtype=step.dtype)
    if stat == "median":
        return values.median()
    if stat == "mad":
        distance = (step - step.median()).abs()
        values = values[distance <= _MADS * distance.median()]
    return values.mean()
