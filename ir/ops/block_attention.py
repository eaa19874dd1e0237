"""y = softmax over listed blocks of keys        q: [B, H, N, D]   k: [B, Hkv, N, D]   v: [B, Hkv, N, Dv]   blocks: int64 [H or 1, query blocks, slots]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic
from .attention import attention


@semantic(
    "block_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, int block, "
    "Tensor? key_mask=None, bool causal=False, float? scale=None, int dense=0) -> Tensor"
)
def block_attention(
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
    """Attention in which every `block` queries in a row see a list of blocks of keys. Returns [B, H, N, Dv]; specs/attention_tokens.md 9.3.

    blocks: for each head (or all alike) and each block of queries the numbers of the blocks of keys it sees, in any order, -1 for
    none. Made for as many tokens as there may be: of a shorter sequence the first ceil(N / block) rows count, and the numbers below
    that. key_mask: [B, N] bool. causal: also no later keys. dense: so many queries at the start see all keys (global tokens).
    Work and memory are in proportion to slots / blocks of N, never N x N. A query that sees no key has an unspecified finite row.
    """
    tokens = q.shape[2]
    short = (block - tokens % block) % block
    rows, keys, values = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block)) for x in (q, k, v))  # [B, H, n, block, D]
    count = rows.shape[2]
    listed = blocks[:, :count]
    there = (listed >= 0) & (listed < count)
    listed = torch.where(there, listed, 0)
    keys, values = (gathered(x, listed, rows.shape[1]) for x in (keys, values))  # [B, H, n, slots * block, D]
    position = (listed[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)  # [H or 1, n, slots * block]
    seen = (position < tokens) & there[..., None].expand(*there.shape, block).flatten(-2)
    seen = seen[None, :, :, None]  # [1, H or 1, n, 1, slots * block]
    if causal:
        first = torch.arange(count * block, device=q.device).view(1, count, block, 1)
        seen = seen & (position[:, :, None] <= first)[None]
    if key_mask is not None:
        shown = F.pad(key_mask, (0, short))[:, position.flatten()].unflatten(1, position.shape)  # [B, H or 1, n, slots * block]
        seen = seen & shown[:, :, :, None]
    seen = seen.expand(-1, rows.shape[1], -1, -1, -1).flatten(1, 2)
    y = F.scaled_dot_product_attention(rows.flatten(1, 2), keys.flatten(1, 2), values.flatten(1, 2), attn_mask=seen, scale=scale)
    y = y.unflatten(1, (-1, count)).flatten(2, 3)[:, :, :tokens]
    if not dense:
        return y
    if causal:  # the first queries see the first keys at most
        k, v, key_mask = k[:, :, :dense], v[:, :, :dense], None if key_mask is None else key_mask[:, :dense]
    return torch.cat([attention(q[:, :, :dense], k, v, key_mask, causal, None, scale), y[:, :, dense:]], 2)


def gathered(x: Tensor, listed: Tensor, heads: int) -> Tensor:
    """Blocks [B, Hkv, m, block, D] as listed [H or 1, n, slots] -> [B, H, n, slots * block, D]."""
    kv_heads, count = x.shape[1:3]
    if listed.shape[0] == 1:
        found = x.index_select(2, listed.flatten()).unflatten(2, listed.shape[1:])
        if kv_heads != heads:
            found = found.repeat_interleave(heads // kv_heads, 1)
    else:
        head = torch.arange(heads, device=x.device) // (heads // kv_heads)
        flat = (head[:, None, None] * count + listed).flatten()
        found = x.flatten(1, 2).index_select(1, flat).unflatten(1, listed.shape)
    return found.flatten(3, 4)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A pattern for all heads and one a head; unused slots; a short last block; a pattern made for more tokens; padding, causal, key heads, global tokens."""
    for b, h, hkv, n, d, block, planned, slots, per_head, masked, causal, dense in [
        (2, 3, 3, 37, 16, 8, 5, 2, True, False, False, 0),
        (1, 4, 2, 32, 8, 8, 6, 3, False, True, False, 3),
        (2, 2, 1, 20, 8, 16, 2, 2, True, False, True, 5),
    ]:
        q, k, v = (torch.randn(b, heads, n, d, device=device, dtype=dtype) for heads in (h, hkv, hkv))
        blocks = torch.rand(h if per_head else 1, planned, planned, device=device).argsort(-1)[..., :slots]
        blocks[..., 0] = torch.arange(planned, device=device)  # its own block, so that no query sees nothing
        blocks[:, :, 1:] = torch.where(blocks[:, :, 1:] == blocks[:, :, :1], -1, blocks[:, :, 1:])
        mask = torch.rand(b, n, device=device) < 0.7 if masked else None
        yield q, k, v, blocks, block, mask, causal, None, dense
