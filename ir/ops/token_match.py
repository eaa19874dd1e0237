"""keep, source, slot: which `r` of the tokens are merged away, and into which        metric: [B, N, D]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic

GRID = 2**20
"""Steps of 1 that scores are rounded to. Equal tokens have equal scores but for the order in which a product is summed, and that differs from runtime to
runtime, from batch to batch and from row to row: rounded, ties are ties everywhere."""


@semantic(
    "token_match(Tensor metric, SymInt r, SymInt prefix=0, Tensor? sizes=None, Tensor? candidates=None, Tensor? targets=None) -> (Tensor, Tensor, Tensor)"
)
def token_match(
    metric: Tensor, r: int, prefix: int = 0, sizes: Tensor | None = None, candidates: Tensor | None = None, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching (Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3.1).

    Each candidate has one partner: the target whose metric has the highest cosine with its own. The r candidates nearest to their
    partners are merged into them.

    metric: [B, N, D], compared in float32 at least; cosines that differ by less than 1e-6 may count as equal.   r: 1 to the number of candidates.
    prefix: so many first tokens are neither candidates nor targets.
    sizes: [B, N], how many tokens each stands for; candidates of 0 (padding) go before all others, and none joins a target of 0 while there are others.
    candidates, targets: int64 [a], [b], ascending, all tokens behind the prefix in one or the other; default: dealt out in turn, candidates first.
    Returns int64 indices: keep [B, N - r], the tokens that stay in their new order (the prefix, what is left of the candidates, the targets);
    source [B, r], those that go, the nearest first; slot [B, r], the places in `keep` of what they are merged into. Of equal scores the
    lower index counts first.
    """
    batch, count = metric.shape[0], metric.shape[1]
    if candidates is None or targets is None:
        candidates, targets = (torch.arange(prefix + i, count, 2, device=metric.device) for i in (0, 1))
    unit = unit_rows(metric)
    scores = cosines(unit.index_select(1, candidates), unit.index_select(1, targets))
    if sizes is not None:
        scores = scores.masked_fill((sizes.index_select(1, targets) == 0)[:, None], float("-inf"))
    best, partner = scores.max(-1)
    if sizes is not None:
        best = best.masked_fill(sizes.index_select(1, candidates) == 0, float("inf"))
    order = best.sort(dim=-1, descending=True, stable=True).indices
    gone, left = order[:, :r], order[:, r:].sort(dim=-1).values
    first, second = (t.expand(batch, -1) for t in (torch.arange(prefix, device=metric.device), targets))
    keep = torch.cat([first, candidates[left], second], 1)
    return keep, candidates[gone], partner.gather(1, gone) + (count - targets.shape[0] - r)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; one of zeros stays. (Not `+ 1e-12`: the exporter takes that for 0 and leaves it out.)"""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of rows of length 1, [B, n, D] and [B, m, D] -> [B, n, m], in whole steps of 1 / GRID."""
    return (a @ b.transpose(1, 2) * GRID).round()


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Even and odd numbers of tokens, with and without a prefix, all candidates going, equal rows, padding, sets of one's own."""
    for b, n, d, r, prefix in [(1, 8, 16, 2, 0), (2, 17, 8, 8, 1), (3, 21, 12, 5, 2), (1, 2, 4, 1, 0)]:
        yield torch.randn(b, n, d, device=device, dtype=dtype), r, prefix, None
    twins = torch.randn(2, 5, 8, device=device, dtype=dtype).repeat_interleave(4, 1)
    yield twins, 6, 0, None
    sizes = torch.ones(2, 20, device=device)
    sizes[0, 12:] = 0
    yield twins, 7, 1, sizes
    yield (
        torch.randn(2, 13, 8, device=device, dtype=dtype),
        4,
        1,
        None,
        torch.tensor([1, 2, 4, 5, 7, 8, 10, 11], device=device),
        torch.tensor([3, 6, 9, 12], device=device),
    )
