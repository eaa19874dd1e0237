"""y = u (blockdiag(v) x) + b        x: [..., n]   v: [blocks, R / blocks, ceil(n / blocks)]   u: [m, R]   b: [m]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic


@semantic("block_dense_linear(Tensor x, Tensor v, Tensor u, Tensor? b=None) -> Tensor")
def block_dense_linear(x: Tensor, v: Tensor, u: Tensor, b: Tensor | None = None) -> Tensor:
    """Every group of inputs times a small matrix of its own, then all of that times one matrix (BlockDense, Wei et al. 2024).

    Inputs that `blocks` does not divide are padded with zeros at their end.
    """
    return F.linear(block_diagonal(x, v), u, b)


def block_diagonal(x: Tensor, w: Tensor) -> Tensor:
    """x [..., n] times w [k, q, ceil(n / k)] block by block: [..., k q], the results of a block side by side."""
    blocks, rows, columns = w.shape
    x = x if x.shape[-1] == blocks * columns else F.pad(x, (0, blocks * columns - x.shape[-1]))
    parts = x.reshape(-1, blocks, columns).transpose(0, 1)  # [k, tokens, columns]
    return torch.bmm(parts, w.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], blocks * rows)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One axis, wide to narrow, inputs the blocks do not divide, a block of nothing but padding, no bias."""
    for shape, blocks, rank, out, bias in [((24,), 4, 3, 10, True), ((7, 48), 2, 5, 6, True), ((2, 3, 13), 4, 2, 9, False), ((4, 5), 4, 1, 7, True)]:
        x = torch.randn(shape, device=device, dtype=dtype)
        v = torch.randn(blocks, rank, -(-shape[-1] // blocks), device=device, dtype=dtype)
        u = torch.randn(out, blocks * rank, device=device, dtype=dtype)
        yield x, v, u, torch.randn(out, device=device, dtype=dtype) if bias else None
