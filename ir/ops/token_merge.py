"""y, t: tokens joined by weighted means, and how many each stands for        x: [B, N, C]   keep, source, slot: of token_match"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic
from .token_take import rows, token_take


@semantic("token_merge(Tensor x, Tensor keep, Tensor source, Tensor slot, Tensor? sizes=None, bool mlerp=False) -> (Tensor, Tensor)")
def token_merge(x: Tensor, keep: Tensor, source: Tensor, slot: Tensor, sizes: Tensor | None = None, mlerp: bool = False) -> tuple[Tensor, Tensor]:
    """Each token that stays becomes the mean of itself and of those merged into it, weighted by how many tokens they stand for.

    x: [B, N, C]   keep: [B, M], the tokens that stay   source: [B, r], those that go   slot: [B, r], their places in `keep`.
    sizes: [B, N] float32, 1 each if None.   mlerp: the mean is stretched to the largest norm of its members (ToFu: Kim et al. 2024).
    Returns y [B, M, C], summed in float32 at least, and its sizes [B, M] float32: sums of sizes, and of sizes times tokens, are what they were.
    A token of size 0 adds nothing; where all are of size 0 the one that stays is kept.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    stay, gone = (token_take(wide, i).flatten(0, 1) for i in (keep, source))
    heavy, light = (torch.ones_like(i, dtype=torch.float32) if sizes is None else sizes.gather(1, i) for i in (keep, source))
    heavy, light, places = heavy.flatten(), light.flatten(), rows(slot, keep.shape[1])
    total = heavy.index_add(0, places, light)
    share = light.to(wide.dtype) / torch.where(total > 0, total, 1.0)[places]
    y = stay.index_add(0, places, (gone - stay[places]) * share[:, None])  # the mean, by the rows that change alone: to sum them all takes 2.5 times as long
    if mlerp:
        old, new = torch.where((heavy > 0) | (total == 0), stay.norm(dim=-1), 0.0), torch.where(light > 0, gone.norm(dim=-1), 0.0)
        y = y * (old.scatter_reduce(0, places, new, "amax") / y.norm(dim=-1).clamp(min=1e-12))[:, None]
    return y.unflatten(0, keep.shape).to(x.dtype), total.unflatten(0, keep.shape)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Several into one, none into some, sizes with zeros, one token left, both means."""
    for b, n, c, r in [(1, 8, 16, 2), (2, 17, 8, 8), (3, 21, 12, 10), (1, 2, 4, 1)]:
        order = torch.stack([torch.randperm(n, device=device) for _ in range(b)])
        keep, source, slot = order[:, r:], order[:, :r], torch.randint(n - r, (b, r), device=device)
        x = torch.randn(b, n, c, device=device, dtype=dtype)
        yield x, keep, source, slot, None, False
        yield x, keep, source, slot, torch.randint(4, (b, n), device=device).float(), False
        yield x, keep, source, slot, torch.randint(1, 4, (b, n), device=device).float(), True
