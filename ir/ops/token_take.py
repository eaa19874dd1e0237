"""y[b, i] = x[b, index[b, i]]        x: [B, N, ...]   index: int64 [B, M]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("token_take(Tensor x, Tensor index) -> Tensor")
def token_take(x: Tensor, index: Tensor) -> Tensor:
    """Whole tokens by number, per sample: what pruning keeps, and, by the places of `token_places`, how merged tokens are copied back to
    all tokens they stand for. Returns [B, M, ...]. Rows are moved whole (a gather of single elements takes twice the time).
    """
    return x.flatten(0, 1).index_select(0, rows(index, x.shape[1])).unflatten(0, index.shape)


def rows(index: Tensor, count: int) -> Tensor:
    """[B * M]: the numbers of these tokens when the samples, of `count` tokens each, stand one after the other."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * count).flatten()


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Fewer and more tokens than there are, one token, values of one number a token."""
    for b, n, m, rest in [(1, 7, 3, (8,)), (2, 5, 11, (4,)), (3, 1, 2, (2, 3)), (2, 9, 9, ())]:
        yield torch.randn(b, n, *rest, device=device, dtype=dtype), torch.randint(n, (b, m), device=device)
