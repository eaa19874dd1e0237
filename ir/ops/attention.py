"""y = softmax(mask(softcap(scale * q k^T) + bias)) v        q: [B, H, Q, D]   k: [B, Hkv, K, D]   v: [B, Hkv, K, Dv]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._semantic import semantic
from .proportional import log_sizes, unmasked


@semantic(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, bool causal=False, int? window=None, "
    "float? scale=None, float? softcap=None, Tensor? bias=None, Tensor? sizes=None) -> Tensor"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Multi-head attention whose mask is facts, not a tensor. Returns [B, H, Q, Dv].

    Hkv divides H: key head i serves the query heads i*H/Hkv ... (i+1)*H/Hkv - 1 (grouped query; Ainslie et al. 2023).
    key_mask: [B, K] bool, True where a key may be seen (padding is False).
    causal: query i sees keys up to i + K - Q (the last query sees all).   window: only keys at a distance below it.
    scale: default 1/sqrt(D).   softcap: c * tanh(scores / c) before bias and mask (Gemma 2).
    bias: added to the scores, broadcastable to [B, H, Q, K] (T5, ALiBi).
    sizes: [B, K], how many equal keys each one stands for: its weight is that many times as large, and 0 hides it (proportional attention,
    Bolya et al. 2023; ir.ops.proportional has its exact forms).
    A query that sees no key at all has an unspecified finite row here: no valid output depends on it.
    """
    if sizes is not None:
        if q.is_cuda and q.dtype.itemsize == 2 and key_mask is None and not causal and window is None and softcap is None and bias is None:
            return unmasked(q, k, v, sizes, scale)
        bias = log_sizes(q, sizes) if bias is None else bias.to(q.dtype) + log_sizes(q, sizes)
    if softcap is not None:
        return _softcapped(q, k, v, seen(q, k, key_mask, causal, window), scale, softcap, bias)
    grouped = q.shape[1] != k.shape[1]
    if (
        causal and key_mask is None and window is None and bias is None and statically_known_true(q.shape[-2] == k.shape[-2])
    ):  # torch aligns its is_causal at the first key
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = seen(q, k, key_mask, causal, window)
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def seen(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Which query sees which key, bool and broadcastable to [B, H, Q, K]; None when every query sees every key."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal or window is not None:
        rows, columns = q.shape[-2], k.shape[-2]
        distance = torch.arange(rows, device=q.device)[:, None] + (columns - rows) - torch.arange(columns, device=q.device)  # [Q, K]
        near = distance >= 0 if causal else None
        if window is not None:
            inside = distance.abs() < window
            near = inside if near is None else near & inside
        mask = near[None, None] if mask is None else mask & near  # type: ignore[index, operator]
    return mask


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float, bias: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
    scores = torch.tanh((q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: a query that sees nothing stays free of NaN
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One case a term: grouped heads, key mask with holes, causal with Q = K and Q < K, window both ways, scale, softcap, bias, Dv other than D, sizes."""

    def tensors(b: int, h: int, kv: int, rows: int, columns: int, d: int, dv: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (b, h, rows, d), (b, kv, columns, d), (b, kv, columns, dv or d)
        return tuple(torch.randn(s, device=device, dtype=dtype) for s in shapes)  # type: ignore[return-value]

    def holes(b: int, columns: int) -> Tensor:
        mask = torch.rand(b, columns, device=device) < 0.6
        mask[:, 0] = True  # every query sees a key, also under `causal`
        return mask

    yield *tensors(1, 2, 2, 7, 7, 16), None, False, None, None, None, None
    yield *tensors(2, 4, 2, 33, 33, 32), None, True, None, None, None, None
    yield *tensors(2, 4, 1, 5, 21, 64), None, True, None, None, None, None
    yield *tensors(3, 4, 4, 19, 19, 24), holes(3, 19), False, None, None, None, None
    yield *tensors(2, 4, 2, 40, 40, 16), holes(2, 40), True, None, 0.5, None, None
    yield *tensors(2, 2, 2, 40, 40, 16), None, True, 9, None, None, None
    yield *tensors(1, 2, 2, 40, 40, 16), None, False, 9, None, None, None
    yield *tensors(2, 4, 2, 17, 17, 16), holes(2, 17), True, 17, 0.25, 2.0, None
    yield *tensors(2, 4, 4, 17, 17, 16), None, False, None, 1.0, None, torch.randn(1, 4, 17, 17, device=device, dtype=dtype)
    yield *tensors(2, 4, 2, 17, 17, 16, 8), holes(2, 17), False, None, None, 3.0, torch.randn(2, 1, 17, 17, device=device, dtype=dtype)
    counts = torch.randint(4, (2, 21), device=device).float()
    counts[:, 0] = 1
    yield *tensors(2, 4, 2, 9, 21, 16), None, False, None, None, None, None, counts
    yield *tensors(2, 4, 4, 21, 21, 16, 8), holes(2, 21), True, None, 0.5, 3.0, None, counts
