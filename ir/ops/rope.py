"""y = x * cos + rotate_half(x) * sin,  rotate_half([a, b]) = [-b, a]        x: [..., d]   cos, sin: broadcast to x"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of GPT-NeoX and Llama; d is even."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One token, many heads, cos and sin shared by the batch, a ragged head width; the two halves of cos differ."""
    for b, h, s, d, rows in [(1, 2, 1, 8, 1), (2, 4, 7, 64, 2), (3, 1, 33, 128, 1), (2, 3, 5, 22, 2)]:
        x = torch.randn(b, h, s, d, device=device, dtype=dtype)
        angle = torch.randn(rows, 1, s, d, device=device) * 3
        yield x, angle.cos().to(dtype), angle.sin().to(dtype)
