"""block_shuffle_linear as one MatMul a block on each side: what lies between is Split and Concat, not a Transpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_dense_linear import parts


def ort(x: Tensor, w1: Tensor, w2: Tensor, b: Tensor | None = None) -> Tensor:
    """The rows of every block of w1 are sorted by the block of w2 that reads them, so that each reads a slice of each.

    Row u of block c is the middle value t = c q + u, and block a of w2 reads t = rho l + a in the order of rho: with c rising and, for
    one c, u rising, so the slices put together are in order.
    """
    rows = w1.shape[1]
    read: list[list[Tensor]] = [[] for _ in w2]
    for c, (part, block) in enumerate(zip(parts(x, w1), w1)):
        reader = [(c * rows + u) % len(w2) for u in range(rows)]
        order = sorted(range(rows), key=reader.__getitem__)
        pieces = F.linear(part, block.index_select(0, torch.tensor(order))).split([reader.count(a) for a in range(len(w2))], -1)
        for a, piece in enumerate(pieces):
            read[a] += [piece] if piece.shape[-1] else []
    y = torch.stack([F.linear(torch.cat(z, -1), block) for z, block in zip(read, w2)], -1).flatten(-2)  # output i of block a at i l + a
    return y if b is None else y[..., : b.shape[0]] + b


pure = ort
