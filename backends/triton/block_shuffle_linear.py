"""block_shuffle_linear on a GPU: two block-diagonal products; the shuffles are the order in which the second reads and writes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._blocks import block_product
from ._gemm import dense, flat


def launch(x: Tensor, w1: Tensor, w2: Tensor, b: Tensor | None = None) -> Tensor:
    """y of the op."""
    out = w2.shape[0] * w2.shape[1] if b is None else b.shape[0]
    with torch.cuda.device_of(x):
        middle = block_product(flat(x), w1.contiguous())
        y = block_product(middle, w2.contiguous(), x_interleaved=True, y_interleaved=True, b=dense(b), width=out)
    return y.view(*x.shape[:-1], out)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, blocks wider than one, outputs left out."""
    for m, n, ins, outs, q, out in [
        (3, 288, 3, 6, 80, 200),
        (3, 300, 3, 6, 70, 200),
        (70, 160, 2, 2, 160, 288),
        (70, 130, 2, 2, 130, 260),
        (65, 40, 4, 8, 40, 33),
    ]:
        x = torch.randn(m, n, dtype=dtype, device=device)
        w1 = torch.randn(ins, q, -(-n // ins), dtype=dtype, device=device)
        w2 = torch.randn(outs, -(-out // outs), ins * q // outs, dtype=dtype, device=device)
        yield x, w1, w2, torch.randn(out, dtype=dtype, device=device)
