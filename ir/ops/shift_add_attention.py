"""y = gain o / |o| + conv(v),  o = v / 2 + B(q) (B(k)^T v) / pi,  B(x) = [x > mean(x)]        q, k: [B, H, N, D]   conv: [H, Dv, taps]   gain: [H]"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic
from .linear_attention import wide


@semantic("shift_add_attention(Tensor q, Tensor k, Tensor v, Tensor conv, Tensor gain, Tensor? key_mask=None) -> Tensor")
def shift_add_attention(q: Tensor, k: Tensor, v: Tensor, conv: Tensor, gain: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Linear angular attention on binary codes (You et al. 2023, "ShiftAddViT"; specs/attention_tokens.md 7.4). Returns [B, H, N, Dv].

    v: [B, H, N, Dv]. 1/2 + q.k / pi, the first terms of the angle between rows of length 1, stands in for softmax's weights, codes of 0 and 1 for
    the rows, so that both products only add: B(k)^T v sums the values of the tokens whose code has a bit, B(q) (.) sums those sums over a token's bits.
    conv: a filter a channel over `taps` (odd) neighbouring tokens, zeros beyond the ends. gain: what the row of length 1 is scaled by.
    key_mask: [B, N] bool, False for padding, whose values are zero for everybody, the filter too.
    Gradients pass straight through the codes (`code`).
    """
    values = v if key_mask is None else v.masked_fill(~key_mask[:, None, :, None], 0)
    sums = sums_over_codes(q, k, values)
    row = wide(values + sums * (2 / math.pi))  # twice o, for its length goes
    length = torch.linalg.vector_norm(row, dim=-1, keepdim=True).clamp_min(1e-12)
    return (row * (gain.to(row.dtype)[:, None, None] / length)).to(v.dtype) + over_tokens(values, conv)


def sums_over_codes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """B(q) (B(k)^T v): both products have an operand of zeros and ones. [B, H, N, Dv]"""
    return code(q) @ (code(k).transpose(-1, -2) @ v)


def code(x: Tensor) -> Tensor:
    """1 where a channel is above the mean of its row, else 0.

    Its slope is that of (x - mean) / (2 deviation) within one standard deviation of the mean, and zero beyond. (The slope of a row of length 1
    clipped to [0, 1], as published, recovers less in the same steps; benchmarks/shiftadd_vit.txt.)
    """
    full = wide(x)
    bits = (full > full.mean(-1, keepdim=True)).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return bits
    ramp = 0.5 * (F.normalize(full - full.mean(-1, keepdim=True), dim=-1) * math.sqrt(x.shape[-1])).clamp(-1, 1)
    return bits + (ramp - ramp.detach()).to(x.dtype)


def over_tokens(v: Tensor, conv: Tensor) -> Tensor:
    """Each channel of v filtered over tokens: sum_t conv[h, d, t] v[h, n + t - taps // 2, d]."""
    _, heads, _, width = v.shape
    flat = v.permute(0, 1, 3, 2).flatten(1, 2)  # [B, H * Dv, N]
    found = F.conv1d(flat, conv.to(v.dtype).flatten(0, 1)[:, None], padding=conv.shape[-1] // 2, groups=heads * width)
    return found.unflatten(1, (heads, width)).permute(0, 1, 3, 2)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Fewer tokens than taps, an odd number of them, rows of zeros, values of another width, padding with holes and a text of padding alone."""
    for b, h, n, d, dv, taps, masked in [(1, 2, 5, 16, 16, 9, False), (2, 3, 33, 24, 8, 9, False), (3, 2, 19, 16, 16, 5, True)]:
        q, k = torch.randn(2, b, h, n, d, device=device, dtype=dtype)
        v = torch.randn(b, h, n, dv, device=device, dtype=dtype)
        if masked:
            q[:, :, 3], k[:, 0, 4], v[0, :, 5] = 0, 0, 0
        conv = torch.randn(h, dv, taps, device=device, dtype=dtype) / taps
        mask = torch.rand(b, n, device=device) < 0.6
        mask[-1] = False
        yield q, k, v, conv, torch.rand(h, device=device, dtype=dtype) + 0.5, mask if masked else None
