"""h = x + r;  y = layer_norm(h) * w + b        x, r: [..., d]   w, b: [d]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("add_layer_norm(Tensor x, Tensor r, Tensor w, Tensor b, float eps) -> (Tensor, Tensor)")
def add_layer_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual add and the LayerNorm that reads it (Ba et al. 2016): returns (y, h), both like x."""
    h = x + r
    return torch.nn.functional.layer_norm(h, [h.shape[-1]], w, b, eps), h


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Rows where eps dominates, a ragged width, wider than one block, large values, a large mean."""
    for n, d, scale, mean in [(1, 64, 1e-6, 0), (7, 123, 1, 0), (3, 5000, 1, 0), (4, 256, 1e2, 0), (5, 384, 1, 30)]:
        x, r = torch.randn(2, n, d, device=device, dtype=dtype) * scale + mean
        w, b = torch.randn(2, d, device=device, dtype=dtype)
        yield x, r, w, b, 1e-12 if scale < 1e-3 else 1e-5
