"""Which blocks of keys a block of queries sees: patterns for block_attention, int64 [1 or heads, query blocks, slots], -1 for an unused slot."""

from __future__ import annotations

import torch
from torch import Tensor


def window(count: int, reach: int, causal: bool = False, sinks: int = 0) -> Tensor:
    """[1, count, slots]: a block sees itself and `reach` blocks before it, unless causal also behind it, and the first `sinks` blocks.

    reach 0 is block-diagonal attention (TransNormer's DiagAttention, Qin et al. 2022).
    """
    own = torch.arange(count)[:, None]
    near = own + torch.arange(-reach, 1 if causal else reach + 1)
    near = torch.where((near >= sinks) & (near < count), near, -1)
    first = torch.arange(min(sinks, count)).expand(count, -1)
    first = torch.where(first <= own, first, -1) if causal else first
    return torch.cat([first, near], 1)[None]


def heaviest(mass: Tensor, slots: int, sinks: int = 0, causal: bool = False) -> Tensor:
    """[heads, count, slots] of mass [heads, query blocks, key blocks]: each block itself, the first `sinks`, and those with the most mass.

    slots: at least 1 + sinks. Of equal blocks the first; causal ones that lie behind their queries' are left out.
    """
    count = mass.shape[-1]
    own, other = torch.arange(count)[:, None], torch.arange(count)
    always = (own == other) | (other < sinks)
    score = torch.where(always, torch.inf, mass)
    hidden = (other > own) if causal else torch.zeros(count, count, dtype=torch.bool)
    score = torch.where(hidden, -torch.inf, score)
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[..., :slots].sort(-1).values
    return torch.where(hidden.expand_as(mass).gather(-1, chosen), -1, chosen)


def kept(mass: Tensor, blocks: Tensor) -> Tensor:
    """[heads, query blocks]: the share of mass [heads, query blocks, key blocks] that a pattern keeps."""
    listed = blocks.expand(len(mass), -1, -1)
    found = mass.gather(-1, listed.clamp(min=0)) * (listed >= 0)
    return found.sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)


def density(blocks: Tensor, causal: bool = False) -> float:
    """Blocks computed over blocks there are: unused slots cost what used ones do."""
    count = blocks.shape[1]
    return min(1.0, blocks.shape[2] * count / (count * (count + 1) / 2 if causal else count * count))
