"""y[i] = scale[ids[i]] w[ids[i]]      ids: [...] integers   w: int8 [rows, d]   scale: [rows]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("embedding_int8(Tensor ids, Tensor w, Tensor scale) -> Tensor")
def embedding_int8(ids: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Rows of a table kept in 8 bits, symmetric with one scale a row; returns [..., d] in the scale's dtype."""
    return torch.nn.functional.embedding(ids, w).to(scale.dtype) * torch.nn.functional.embedding(ids, scale[:, None])


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One row, a ragged width, the same id twice."""
    for rows, d, ids in [(1, 8, [0]), (7, 33, [[6, 0, 3], [3, 3, 1]])]:
        w = torch.randint(-127, 128, (rows, d), device=device, dtype=torch.int8)
        yield torch.tensor(ids, device=device), w, torch.rand(rows, device=device, dtype=dtype) + 0.01
