"""block_dense_linear on a GPU: the block-diagonal factor here, the dense one by cuBLAS."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._blocks import block_product
from ._gemm import flat


def launch(x: Tensor, v: Tensor, u: Tensor, b: Tensor | None = None) -> Tensor:
    """y of the op."""
    with torch.cuda.device_of(x):
        middle = block_product(flat(x), v.contiguous())
    return torch.nn.functional.linear(middle, u, b).view(*x.shape[:-1], u.shape[0])


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every tile, edges beside a tile's, blocks wider than one, more padding than a block."""
    for m, n, blocks, rank, out in [(3, 288, 3, 80, 20), (3, 300, 3, 70, 20), (70, 160, 2, 160, 24), (70, 130, 2, 130, 24), (65, 9, 8, 2, 8)]:
        x = torch.randn(m, n, dtype=dtype, device=device)
        v, u = torch.randn(blocks, rank, -(-n // blocks), dtype=dtype, device=device), torch.randn(out, blocks * rank, dtype=dtype, device=device)
        yield x, v, u, torch.randn(out, dtype=dtype, device=device)
