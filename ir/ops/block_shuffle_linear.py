"""y = blocks of w2, interleaved, of blocks of w1 of x, + b        x: [..., n]   w1: [k, q, ceil(n / k)]   w2: [l, s, r], k q = l r   b: [m], m <= l s"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic
from .block_dense_linear import block_diagonal


@semantic("block_shuffle_linear(Tensor x, Tensor w1, Tensor w2, Tensor? b=None) -> Tensor")
def block_shuffle_linear(x: Tensor, w1: Tensor, w2: Tensor, b: Tensor | None = None) -> Tensor:
    """Two block-diagonal matrices with a shuffle behind each: a Monarch matrix of order 2 (Dao et al. 2022), of any shape and block rank.

    Block c of the inputs makes the middle values t = c q + u; block a of the outputs reads those with t = rho l + a and makes the
    outputs i l + a. So inputs c and outputs a meet in the ranks t that belong to both. Inputs that k does not divide are padded with
    zeros at their end; outputs beyond the bias's m are left out (without a bias there are l s).
    """
    blocks, rows, rank = w2.shape
    middle = block_diagonal(x, w1).reshape(-1, rank, blocks)  # [tokens, rho, a]
    y = torch.bmm(middle.permute(2, 0, 1), w2.transpose(1, 2)).permute(1, 2, 0).reshape(*x.shape[:-1], rows * blocks)
    return y if b is None else y[..., : b.shape[0]] + b


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Blocks as in the papers; more of one than of the other, both ways; sizes no block divides; ranks some pairs of blocks lack; no bias."""
    for shape, ins, outs, q, out, bias in [
        ((24,), 4, 4, 8, 20, True),
        ((7, 48), 2, 6, 9, 24, True),
        ((2, 3, 13), 6, 3, 2, 10, True),
        ((3, 16), 4, 2, 1, 8, False),
    ]:
        x = torch.randn(shape, device=device, dtype=dtype)
        w1 = torch.randn(ins, q, -(-shape[-1] // ins), device=device, dtype=dtype)
        w2 = torch.randn(outs, -(-out // outs), ins * q // outs, device=device, dtype=dtype)
        yield x, w1, w2, torch.randn(out, device=device, dtype=dtype) if bias else None
