"""o_i = (gamma sum_near e^(s_ij - max) v_j + sum_far (fq_i.fk_j) v_j) / the sum of the same weights,  s = scale q.k: softmax near, linear attention far"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic
from .linear_attention import EPS, nonzero, wide

LEAST_GAMMA = 1e-20
"""Stands in for a gamma of 0: where nothing is far, gamma cancels and must not be 0."""


@semantic(
    "hybrid_attention(Tensor q, Tensor k, Tensor v, Tensor fq, Tensor fk, Tensor gamma, Tensor? key_mask=None, int window=64, "
    "bool causal=False, float? scale=None) -> Tensor"
)
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    key_mask: Tensor | None = None,
    window: int = 64,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention to near tokens and linear attention to all others (LoLCATs; specs/attention_tokens.md 8.2). Returns [b, h, n, dv].

    q, fq: [b, h, n, d | D], k, v, fk: [b, hk, n, d | dv | D], fq and fk the features of q and k; hk divides h, grouped as in `attention`.
    gamma: [h], how much the near weigh against the far, not below 0.   scale: default 1 / sqrt(d).   key_mask: [b, n] bool, False for padding.
    window: tokens come in blocks of that many. Near are the keys of a query's own block and of the one before it, up to the query itself (causal), or
    of its own and both neighbours. With one block this is softmax attention. The maximum is taken over the near only: it is part of what was learned.
    Far products have eps added, as in `linear_attention`.
    """
    _, h, n, d = q.shape
    hk, dtype = k.shape[1], v.dtype
    _check(q, k, v, fq, fk, window)
    q, k, v, fq, fk = (wide(t) for t in (q, k, v, fq, fk))
    count = (n + window - 1) // window

    def blocks(x: Tensor) -> Tensor:
        """[b, hk, blocks, tokens of a block, ...]; of queries, those of the heads that share a key head one after the other."""
        x = F.pad(x, (0, 0, 0, count * window - n)).unflatten(2, (count, window)).unflatten(1, (hk, x.shape[1] // hk))
        return x.transpose(2, 3).flatten(3, 4)

    given = torch.ones(1, n, device=q.device, dtype=q.dtype) if key_mask is None else key_mask.to(q.dtype)
    given = F.pad(given, (0, count * window - n)).unflatten(1, (count, window))[:, None, :, :, None]
    q, k, v, fq, fk = (blocks(t) for t in (q * (d**-0.5 if scale is None else scale), k, v, F.pad(fq, (0, 1), value=EPS), F.pad(fk, (0, 1), value=1.0)))
    fk = fk * given

    seen = beside(given, causal).squeeze(-1)[..., None, :]  # [b, 1, blocks, 1, near]
    if causal:
        own = torch.ones(window, window, device=q.device, dtype=q.dtype).tril()
        seen = seen * torch.cat([torch.ones_like(own), own], -1)
        seen = seen if h == hk else torch.cat([seen] * (h // hk), -2)
    scores = q @ beside(k, causal).transpose(-1, -2)
    scores = torch.where(seen > 0, scores, torch.finfo(scores.dtype).min)
    near = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen  # [b, hk, blocks, rows, near]
    share = wide(gamma).to(q.dtype).clamp(min=LEAST_GAMMA).reshape(hk, h // hk, 1).expand(hk, h // hk, window).reshape(hk, 1, -1, 1)
    near = near * share

    state, total = apart(fk.transpose(-1, -2) @ v, causal), apart(fk.sum(-2), causal)
    o = near @ beside(v, causal) + fq @ state
    o = o / nonzero(near.sum(-1, keepdim=True) + fq @ total[..., None])
    return o.unflatten(3, (h // hk, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :n].to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, window: int) -> None:
    if window < 1:
        raise ValueError(f"a window holds at least one token, got {window}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"hybrid attention takes as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k.shape[1]} key heads evenly")
    if fq.shape[:3] != q.shape[:3] or fk.shape[:3] != k.shape[:3] or fq.shape[-1] != fk.shape[-1]:
        raise ValueError(f"features {list(fq.shape)} and {list(fk.shape)} are not those of queries {list(q.shape)} and keys {list(k.shape)}")


def beside(x: Tensor, causal: bool) -> Tensor:
    """Each block with the one before it in front, and, unless causal, the one after it behind: zeros beyond the ends. [b, heads, blocks, near, ...]"""
    previous = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    parts = [previous, x] if causal else [previous, x, F.pad(x, (0, 0, 0, 0, 0, 1))[:, :, 1:]]
    return torch.cat(parts, -2)


def apart(x: Tensor, causal: bool) -> Tensor:
    """For each block the sum of x over the blocks that are neither it nor beside it, or of those before. Only additions: exactly 0 where there are none."""
    ends = (0, 0) * (x.dim() - 3)
    before = F.pad(x.cumsum(2), (*ends, 2, 0))[:, :, :-2]
    return before if causal else before + F.pad(x.flip(2).cumsum(2).flip(2), (*ends, 0, 2))[:, :, 2:]


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One block, ragged last ones, both kinds, grouped heads, padding with holes and a text of padding alone, a scale, features of zeros, gamma of 0."""
    for b, h, hk, n, window, causal, masked, scale in [
        (1, 2, 2, 9, 16, False, False, None),
        (2, 4, 2, 45, 8, False, False, None),
        (2, 4, 2, 45, 8, True, False, 0.5),
        (2, 4, 1, 30, 8, False, True, None),
        (2, 2, 2, 33, 8, True, True, None),
    ]:
        q, k, v, fq, fk = (torch.randn(b, heads, n, width, device=device, dtype=dtype) for heads, width in ((h, 8), (hk, 8), (hk, 4), (h, 6), (hk, 6)))
        fq, fk = fq.abs(), fk.abs()
        fq[0, 0, n - 1] = 0
        gamma = torch.rand(h, device=device, dtype=dtype) + 0.2
        mask = torch.rand(b, n, device=device) < 0.6
        if masked:
            gamma[0], mask[-1] = 0, False
        yield q, k, v, fq, fk, gamma, mask if masked else None, window, causal, scale
