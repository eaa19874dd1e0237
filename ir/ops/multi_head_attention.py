"""attention on [B, tokens, heads * D]: y = join(attention(split(q), split(k), split(v)))"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import attention as by_head
from ._semantic import semantic


@semantic(
    "multi_head_attention(Tensor q, Tensor k, Tensor v, int heads, int kv_heads, Tensor? key_mask=None, bool causal=False, int? window=None, "
    "float? scale=None, float? softcap=None, Tensor? bias=None, Tensor? sizes=None) -> Tensor"
)
def multi_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """`attention` between the projections' own layouts, so that a backend needs no transposes.

    q: [B, Q, heads * D]   k: [B, K, kv_heads * D]   v: [B, K, kv_heads * Dv]   ->   [B, Q, heads * Dv]; the rest as in `attention`.
    """
    q, k, v = (t.unflatten(-1, (n, t.shape[-1] // n)).permute(0, 2, 1, 3) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    return by_head.attention(q, k, v, key_mask, causal, window, scale, softcap, bias, sizes).permute(0, 2, 1, 3).flatten(2)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """The cases of `attention`, joined."""
    for q, k, v, *rest in by_head.cases(dtype, device):
        joined = (t.permute(0, 2, 1, 3).flatten(2) for t in (q, k, v))
        yield *joined, q.shape[1], k.shape[1], *rest
