"""keep, source, slot: of the tokens with the most like them, `r` are merged into others        metric: [B, N, D]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic
from .token_match import GRID, cosines, unit_rows
from .token_take import token_take


@semantic("token_match_energy(Tensor metric, SymInt r, SymInt prefix=0, float margin=0.5, Tensor? sizes=None) -> (Tensor, Tensor, Tensor)")
def token_match_energy(metric: Tensor, r: int, prefix: int = 0, margin: float = 0.5, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Matching that protects what is rare (PiToMe: Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging").

    The energy of a token is its mean over all of f(cosine - margin), f(c) = c if c >= 0 else exp(c) - 1: high for one of many alike, low for
    one that stands alone. The 2r of highest energy are dealt out in turn to sources and targets, and each source joins the target most like it.

    metric: [B, N, D], compared in float32 at least; energies and cosines that differ by less than 1e-6 may count as equal.
    r: 1 to half of the tokens behind the prefix.
    prefix: so many first tokens neither go nor are joined, and count for nobody's energy.
    sizes: [B, N], how many tokens each stands for; those of 0 (padding) are the first sources, count for nobody's energy, and leave r less for the others.
    Returns int64 indices: keep [B, N - r], the tokens that stay, ascending; source [B, r], those that go, padding and then the highest energy
    first; slot [B, r], the places in `keep` of what they are merged into. Of equal energies the lower index counts first, of targets equally
    like a source the one of the higher energy.
    """
    unit = unit_rows(metric[:, prefix:])
    alike = F.elu(unit @ unit.transpose(1, 2) - margin)  # [B, n, n]
    if sizes is not None:
        empty = sizes[:, prefix:] == 0
        alike = alike.masked_fill(empty[:, None], 0.0)
    energy = (alike.mean(-1) * GRID).round()
    if sizes is not None:
        energy = energy.masked_fill(empty, float("inf"))
    order = energy.sort(dim=-1, descending=True, stable=True).indices
    if sizes is None:
        source, target = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
        scores = cosines(token_take(unit, source), token_take(unit, target))
    else:
        pairs = r - empty.sum(-1, keepdim=True)  # [B, 1]: of tokens that stand for some
        source, target = order[:, : 2 * r].gather(1, _dealt(pairs, r)).split(r, 1)
        scores = cosines(token_take(unit, source), token_take(unit, target))
        scores = scores.masked_fill((torch.arange(r, device=metric.device) >= pairs)[:, None], float("-inf"))
    joined = target.gather(1, scores.max(-1).indices)
    keep = torch.cat([target, order[:, 2 * r :]], 1).sort(dim=-1).values
    slot = joined - (source[:, None] < joined[..., None]).sum(-1)  # each token moves up by as many as go before it
    first = torch.arange(prefix, device=metric.device).expand(metric.shape[0], -1)
    return torch.cat([first, keep + prefix], 1), source + prefix, slot + prefix


def _dealt(pairs: Tensor, r: int) -> Tensor:
    """[B, 2r]: the ranks of the sources, then those of the targets, where the first r - pairs [B, 1] ranks are padding: these are sources, the pairs
    behind them are dealt out in turn, and what is left are targets that none should join."""
    rank = torch.arange(2 * r, device=pairs.device)
    turn = rank + pairs - r
    key = torch.where(turn < 0, rank, torch.where(turn < 2 * pairs, turn % 2 * (2 * r) + rank, 4 * r + rank))
    return key.sort(dim=-1).indices


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Even and odd numbers of tokens, with and without a prefix, all going, equal rows, padding within and beyond r."""
    for b, n, d, r, prefix in [(1, 8, 16, 2, 0), (2, 17, 8, 8, 1), (3, 21, 12, 5, 2), (1, 2, 4, 1, 0)]:
        yield torch.randn(b, n, d, device=device, dtype=dtype), r, prefix
    twins = torch.randn(2, 5, 8, device=device, dtype=dtype).repeat_interleave(4, 1)
    yield twins, 6, 0, 0.9
    sizes = torch.ones(3, 20, device=device)
    sizes[0, 17:] = 0
    sizes[1, 9:] = 0
    yield torch.randn(3, 20, 8, device=device, dtype=dtype), 7, 1, 0.2, sizes
