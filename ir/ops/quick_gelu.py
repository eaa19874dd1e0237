"""y = x * sigmoid(1.702 x)        x: any shape"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("quick_gelu(Tensor x) -> Tensor")
def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Unit scale, where 1.702 matters; both saturated ends; zeros; a ragged size."""
    for shape, scale in [((4, 64), 1.0), ((7, 123), 1.0), ((2, 3, 33), 30.0), ((5,), 0.0)]:
        yield (torch.randn(shape, device=device, dtype=dtype) * scale,)
