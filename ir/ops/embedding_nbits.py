"""y[i] = (w[ids[i]] - zero_point) scale, one zero point and scale every group_size channels      ids: [...] integers"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..formats import pack
from ._semantic import semantic
from .linear_nbits import group_values


@semantic("embedding_nbits(Tensor ids, Tensor w, Tensor scale, Tensor? zero_point, int bits, int group_size) -> Tensor")
def embedding_nbits(ids: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Rows of a table kept in 2, 4 or 8 bits in the layout of `linear_nbits`; only the rows read become float.

    w: uint8 [rows, n, group_size * bits / 8]   scale: [rows, n]   zero_point: packed, float or None, as there.
    Returns [..., n * group_size] in the scale's dtype: a row is a whole number of groups.
    """
    codes = embedding(ids, w.flatten(1)).unflatten(-1, w.shape[1:])
    zero = None if zero_point is None else embedding(ids, zero_point)
    return group_values(codes, embedding(ids, scale), zero, bits, group_size).flatten(-2)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One row, the same id twice, an odd number of groups; packed, float and no zero points; 4, 8 and 2 bits."""
    for rows, groups, bits, group, zeros, ids in [
        (1, 2, 4, 16, "none", [0]),
        (7, 3, 4, 32, "packed", [[6, 0, 3], [3, 3, 1]]),
        (5, 3, 8, 16, "packed", [4, 1]),
        (5, 2, 2, 16, "float", [[0, 2]]),
    ]:
        w = torch.randint(0, 256, (rows, groups, group * bits // 8), device=device, dtype=torch.uint8)
        scale = torch.rand(rows, groups, device=device, dtype=dtype) * 0.1 + 0.01
        zero = torch.randint(0, 2**bits, (rows, groups), device=device)
        zero_point = {"packed": pack(zero, bits), "float": zero.to(dtype) + 0.25, "none": None}[zeros]
        yield torch.tensor(ids, device=device), w, scale, zero_point, bits, group
