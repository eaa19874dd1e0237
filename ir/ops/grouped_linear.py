"""y_s = x_s w_e for the rows ends_(e-1) <= s < ends_e        x: [S, n] sorted by group   w: [E, n, m]   ends: [E]"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ._semantic import opaque


def _shape(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@opaque("grouped_linear(Tensor x, Tensor w, Tensor ends) -> Tensor", _shape)
def grouped_linear(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Every row times the matrix of its group (a token times its expert's weights). Groups may be empty. Returns [S, m]."""
    bounds = [0, *ends.tolist()]
    return torch.cat([x[begin:end] @ w[e] for e, (begin, end) in enumerate(pairwise(bounds))])


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One group, an empty one first, last and between."""
    for sizes, n, m in [((5,), 4, 6), ((3, 4), 8, 3), ((0, 7, 0, 2, 0), 16, 5)]:
        x, w = torch.randn(sum(sizes), n, device=device, dtype=dtype), torch.randn(len(sizes), n, m, device=device, dtype=dtype)
        yield x, w, torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
