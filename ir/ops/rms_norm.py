"""y = w * round(x / sqrt(mean(x^2) + eps))        x: [..., d]   w: [d]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("rms_norm(Tensor x, Tensor w, float eps) -> Tensor")
def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019) in Llama's rounding order: normalise in float32, round to x's dtype, then scale."""
    f = x.float()
    return w * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Rows where eps dominates, a ragged width, wider than one block, large values, a head norm's four axes."""
    for *shape, scale in [(1, 64, 1e-3), (7, 123, 1), (3, 5000, 1), (4, 256, 1e2), (2, 4, 5, 16, 1)]:
        x = torch.randn(shape, device=device, dtype=dtype) * scale
        yield x, torch.randn(shape[-1], device=device, dtype=dtype), 1e-5
