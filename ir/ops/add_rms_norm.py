"""h = x + r;  y = rms_norm(h, w, eps)        x, r: [..., d]   w: [d]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic
from .rms_norm import rms_norm


@semantic("add_rms_norm(Tensor x, Tensor r, Tensor w, float eps) -> (Tensor, Tensor)")
def add_rms_norm(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual add and the RMS norm that reads it: returns (y, h), both like x; h is rounded to x's dtype first."""
    h = x + r
    return rms_norm(h, w, eps), h


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Rows where eps dominates, a ragged width, wider than one block, large values."""
    for n, d, scale in [(1, 64, 1e-3), (7, 123, 1), (3, 5000, 1), (4, 256, 1e2)]:
        x, r = torch.randn(2, n, d, device=device, dtype=dtype) * scale
        yield x, r, torch.randn(d, device=device, dtype=dtype), 1e-5
