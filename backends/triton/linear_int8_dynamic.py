"""linear_int8_dynamic on a GPU: one grid over all of x, found in two steps, then an int8 product with the zero point taken off."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat, linear
from ._quantize import over_all


def launch(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """y of the op."""
    with torch.cuda.device_of(x):
        return linear(over_all(flat(x)), w.contiguous(), scale.contiguous(), dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, widths on and off 16 bytes, a range of several parts, a mean, so that the zero point is not in the middle, a NaN."""
    for m, n, k, bias in [
        (1, 48, 320, True),
        (1, 16, 100, True),
        (33, 80, 272, False),
        (70, 40, 132, True),
        (130, 144, 176, True),
        (1030, 16, 48, True),
        (260, 8, 4096, True),
    ]:
        x = torch.randn(m, k, dtype=dtype, device=device) + 1
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        if m == 33:
            x[1, -1] = torch.nan
        yield x, w, torch.rand(n, device=device) + 0.01, torch.randn(n, dtype=dtype, device=device) if bias else None
