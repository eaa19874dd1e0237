"""linear_fp8 on a GPU that has float8 (sm_89 and later): every token over its own range, a float8 product, both scales and the bias on the way out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...ir.formats import FP8_MAX
from ._gemm import dense, flat, linear
from ._quantize import over_rows


def launch(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """y of the op."""
    with torch.cuda.device_of(x):
        return linear(over_rows(flat(x), "fp8", FP8_MAX), w.contiguous(), scale.contiguous(), dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, widths on and off 16 bytes, a row longer than a block, ties."""
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
        w = torch.randn(n, k, device=device).mul(60).to(torch.float8_e4m3fn)
        if m == 1 and k == 100:  # a range of 448, so that these are ties: to the even neighbour, also where neighbours are 2^-9 apart
            x, w = x.new_zeros(2, k), torch.ones(n, k, device=device)
            w[:, 0] = 0
            x[0, :3], x[1, :3] = torch.tensor([[448, 17, 19], [448, 2**-10, 3 * 2**-10]], dtype=dtype, device=device)
            w = w.to(torch.float8_e4m3fn)
        yield x, w, torch.rand(n, device=device) * 0.01 + 0.001, torch.randn(n, dtype=dtype, device=device) if bias else None
