"""linear_int8_static on a GPU: x on its calibrated grid, then an int8 product with the zero point taken off."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat, linear
from ._quantize import on_grid


def launch(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """y of the op."""
    with torch.cuda.device_of(x):
        return linear(on_grid(flat(x), x_scale, x_zero_point), w.contiguous(), scale.contiguous(), dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, widths on and off 16 bytes, several blocks of x."""
    for m, n, k, bias in [
        (1, 48, 320, True),
        (1, 16, 100, True),
        (33, 80, 272, False),
        (70, 40, 132, True),
        (130, 144, 176, True),
        (1030, 16, 48, True),
        (3, 8, 4224, True),
    ]:
        x = torch.randn(m, k, dtype=dtype, device=device)
        grid = torch.full((), 0.02, device=device), torch.full((), 100, dtype=torch.uint8, device=device)
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        yield x, *grid, w, torch.rand(n, device=device) + 0.01, torch.randn(n, dtype=dtype, device=device) if bias else None
