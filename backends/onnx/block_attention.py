"""block_attention as two products and a softmax of its listed blocks: what hides a key is one more channel of it, so that scores are never masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.ops.attention import attention
from ...ir.ops.block_attention import gathered
from .attention import HIDDEN


def pure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    block: int,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dense: int = 0,
) -> Tensor:
    """q: [B, H, N, D], k and v: [B, Hkv, N, D] -> [B, H, N, Dv].

    Keys get a channel of 0, or of HIDDEN where they are padding, and one block of hidden keys behind them that unused slots point to;
    queries get a channel of 1.
    """
    tokens, width = q.shape[2:]
    count = (tokens + block - 1) // block
    short = count * block - tokens
    hidden = max(HIDDEN, torch.finfo(q.dtype).min / 2)
    shown = torch.zeros_like(k[:, :1, :, :1]) if key_mask is None else (1.0 - key_mask.to(k.dtype))[:, None, :, None] * hidden
    keys = torch.cat([F.pad(k, (0, 0, 0, short + block)), F.pad(shown, (0, 0, 0, short + block), value=hidden).expand(-1, k.shape[1], -1, -1)], -1)
    rows = F.pad(q * (width**-0.5 if scale is None else scale), (0, 1, 0, short), value=1.0).unflatten(2, (-1, block))  # [B, H, n, block, D + 1]
    listed = blocks[:, :count]
    listed = torch.where((listed >= 0) & (listed < count), listed, count)
    keys, values = (gathered(x.unflatten(2, (-1, block)), listed, q.shape[1]) for x in (keys, F.pad(v, (0, 0, 0, short + block))))
    scores = rows @ keys.transpose(-1, -2)  # [B, H, n, block, slots * block]
    if causal:
        position = (listed[..., None] * block + torch.arange(block)).flatten(-2)[:, :, None]
        scores = scores + (position > torch.arange(count * block).view(1, count, block, 1)).to(q.dtype) * hidden
    y = (scores.softmax(-1) @ values).flatten(2, 3)[:, :, :tokens]
    if not dense:
        return y
    if causal:  # the first queries see the first keys at most
        k, v, key_mask = k[:, :, :dense], v[:, :, :dense], None if key_mask is None else key_mask[:, :dense]
    return torch.cat([attention(q[:, :, :dense], k, v, key_mask, causal, None, scale), y[:, :, dense:]], 2)


ort = pure
"""No faster as an Attention operator for each block (1.31.1, 1 thread): benchmarks/sparse_attention.txt."""
