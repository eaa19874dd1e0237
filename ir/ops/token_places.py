"""Where each original token is now        keep: [B, M]   source, slot: [B, r]   places: [B, N0]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic


@semantic("token_places(Tensor keep, Tensor source, Tensor slot, Tensor? places=None) -> Tensor")
def token_places(keep: Tensor, source: Tensor, slot: Tensor, places: Tensor | None = None) -> Tensor:
    """int64 [B, N0]: the place among the merged tokens of each original one, by which `token_take` copies a merged value back to all.

    places: the same before this merge; None: it is the first. The tokens of place i are as many as i's size.
    """
    here = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape[0], -1)
    order = torch.cat([keep, source], 1).sort(dim=1).indices  # each token stands in exactly one of the two: its rank is where
    now = torch.cat([here, slot], 1).gather(1, order)
    return now if places is None else now.gather(1, places)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A first merge and a later one, odd and even, one token left."""
    for b, n, r in [(1, 8, 2), (2, 17, 8), (3, 5, 2), (1, 2, 1)]:
        order = torch.stack([torch.randperm(n, device=device) for _ in range(b)])
        keep, source, slot = order[:, r:], order[:, :r], torch.randint(n - r, (b, r), device=device)
        yield keep, source, slot, None
        yield keep, source, slot, torch.randint(n, (b, 2 * n), device=device)
