"""linear_token on a GPU: every token quantized over its own range, an int8 product, both scales and the bias on the way out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat, linear
from ._quantize import over_rows


def launch(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, bits: int = 8) -> Tensor:
    """y of the op."""
    with torch.cuda.device_of(x):
        return linear(over_rows(flat(x), "int", 2 ** (bits - 1) - 1), w.contiguous(), scale.contiguous(), dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, widths on and off 16 bytes, a row longer than a block, a NaN."""
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
        if m == 3:
            x[1, -1] = torch.nan
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        yield x, w, torch.rand(n, device=device) + 0.01, torch.randn(n, dtype=dtype, device=device) if bias else None, 8
