"""Attention, rotary positions and onnxruntime's fused layers of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import NeedsValue


def _heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * d] -> [batch, heads, tokens, d]"""
    return x.unflatten(-1, (heads, int(x.shape[-1]) // heads)).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    qk_matmul_output_mode: int = 0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    outputs: int = 1,
) -> Any:
    """Opset 23 and 24. Causal means that query i sees keys up to i, counted after the past ones; a window bounds how far back."""
    flat = q.dim() == 3
    if flat:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    present = k, v
    groups = int(q.shape[1]) // int(k.shape[1])
    offset = past if lengths is None else lengths[:, None, None, None] - q.shape[2]
    plain_causal = is_causal and mask is None and past_key is None and lengths is None and left_window_size < 0
    if mask is not None:
        mask = _whole(mask, k)
    if lengths is not None:
        mask = _and(mask, (torch.arange(k.shape[2])[None, :] < lengths[:, None])[:, None, None, :])
    if softcap or outputs > 3 or softmax_precision not in (None, 1):
        seen = _band(q, k, offset, is_causal, left_window_size)
        y, scores = _plain(q, k, v, mask if seen is None else _and(mask, seen), groups, scale, softcap, qk_matmul_output_mode)
    else:
        seen = None if plain_causal else _band(q, k, offset, is_causal, left_window_size)
        mask = mask if seen is None else _and(mask, seen)
        y, scores = F.scaled_dot_product_attention(q, k, v, mask, 0.0, bool(plain_causal), scale=scale, enable_gqa=groups > 1), None
    if flat:
        y = y.transpose(1, 2).flatten(2)
    return y if outputs == 1 else (y, *present, scores)[:outputs]


def _whole(mask: Tensor, k: Tensor) -> Tensor:
    """A mask may be shorter than the keys; those beyond it are not seen."""
    short = k.shape[2] - mask.shape[-1]
    if isinstance(short, int) and short > 0 and mask.shape[-1] != 1:
        if mask.dtype == torch.bool:
            return F.pad(mask.to(torch.uint8), [0, short]).to(torch.bool)
        return F.pad(mask, [0, short], value=-math.inf)
    return mask


def _band(q: Tensor, k: Tensor, offset: Any, causal: int, left: int) -> Tensor | None:
    """Which keys a query sees by place: none after its own, at most `left` before it."""
    keys, places = torch.arange(k.shape[2])[None, :], torch.arange(q.shape[2])[:, None] + offset
    seen = keys <= places if causal else None
    if left >= 0:
        near = keys >= places - left
        seen = near if seen is None else seen & near
    return seen


def _and(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, scale: float | None, softcap: float, mode: int) -> tuple[Tensor, Tensor]:
    """Step by step: the cap comes before the mask, and a query that sees nothing gets zeros."""
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(int(q.shape[-1])))
    raw = torch.matmul(q * root, (k * root).mT)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    masked = capped
    if mask is not None:
        masked = capped.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else capped + mask
    weights = torch.ops.aten._safe_softmax(masked, -1)
    return torch.matmul(weights, v), (raw, capped, masked, weights)[mode]


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None = None, *, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0
) -> Tensor:
    """Opset 23. cos, sin: [positions, d / 2] with position, else [batch, tokens, d / 2]."""
    flat = x.dim() == 3
    x = x.unflatten(-1, (num_heads, int(x.shape[-1]) // num_heads)) if flat else x.transpose(1, 2)  # [batch, tokens, heads, d]
    d = rotary_embedding_dim or int(x.shape[-1])
    turned, rest = x[..., :d], x[..., d:]
    if position is not None:
        cos, sin = cos[position], sin[position]
    cos, sin = cos[..., : d // 2].unsqueeze(2), sin[..., : d // 2].unsqueeze(2)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = cos * a - sin * b, sin * a + cos * b
    y = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    y = torch.cat([y, rest], -1) if d < int(x.shape[-1]) else y
    return y.flatten(2) if flat else y.transpose(1, 2)


def rotary_ort(
    x: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> Tensor:
    """com.microsoft: the position stands second; of one number it is where the tokens start."""
    if position.dim() == 1 and x.dim() == 3:
        position = position[:, None] + torch.arange(x.shape[1])[None, :]
    elif position.dim() == 1:
        position = position[:, None] + torch.arange(x.shape[2])[None, :]
    if x.dim() == 3 and not num_heads:
        num_heads = int(x.shape[-1]) // (2 * int(cos.shape[-1]))
    return rotary(x, cos, sin, position, interleaved=interleaved, num_heads=num_heads, rotary_embedding_dim=rotary_embedding_dim)


def skip_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-12, outputs: int = 1
) -> Any:
    """layer_norm(x + skip + bias); the fourth output is the sum."""
    total = x + skip if bias is None else x + bias + skip
    y = F.layer_norm(total, [int(total.shape[-1])], gamma, beta, epsilon)
    return y if outputs == 1 else (y, None, None, total)[:outputs]


def skip_rms_norm(x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-5, outputs: int = 1) -> Any:
    total = x + skip if bias is None else x + bias + skip
    y = F.rms_norm(total, [int(total.shape[-1])], gamma, epsilon)
    return y if outputs == 1 else (y, None, None, total)[:outputs]


def embed_layer_norm(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    positions: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Any:
    """layer_norm(word + position + segment embeddings); the third output is the sum."""
    at = torch.arange(ids.shape[1])[None, :] if position is None else position
    total = F.embedding(ids, words) + F.embedding(at, positions)
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments, kinds)
    y = F.layer_norm(total, [int(total.shape[-1])], gamma, beta, epsilon)
    count = None if mask is None or outputs < 2 else mask.sum(1).to(torch.int32)
    return y if outputs == 1 else (y, count if count is not None else torch.zeros_like(ids[:, 0], dtype=torch.int32), total)[:outputs]


def multi_head_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *_: Any,
    num_heads: int,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Any:
    """com.microsoft. bias: q's, k's and v's in one; key_mask: [batch, keys], nonzero is seen; attention_bias is added to the scores."""
    if k is None:  # packed [batch, tokens, heads, 3, d]
        q, k, v = (q[..., i, :].flatten(2) for i in range(3))
    elif v is None:
        k, v = (k[..., i, :].flatten(2) for i in range(2))
    assert v is not None
    if bias is not None:
        width = int(q.shape[-1])
        if k.dim() == 4:
            raise NeedsValue("its keys come with heads of their own beside a bias")
        q, k, v = q + bias[:width], k + bias[width : 2 * width], v + bias[2 * width :]
    q = _heads(q, num_heads)
    k, v = (x if x.dim() == 4 else _heads(x, num_heads) for x in (k, v))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    mask = attention_bias
    if key_mask is not None:
        if key_mask.dim() != 2:
            raise NeedsValue(f"its key_padding_mask has {key_mask.dim()} axes; rewright reads [batch, keys]")
        added = torch.where(key_mask[:, None, None, :] != 0, 0.0, mask_filter_value).to(q.dtype)
        mask = added if mask is None else mask + added
    if unidirectional:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask = seen if mask is None else torch.where(seen, mask, torch.finfo(q.dtype).min)
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale or None)
    y = y.transpose(1, 2).flatten(2)
    return y if outputs == 1 else (y, k, v)[:outputs]


def packed_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *_: Any,
    num_heads: int,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    unidirectional: int = 0,
    qkv_hidden_sizes: Any = None,
    do_rotary: int = 0,
    rotary_embedding_dim: int = 0,
    past_present_share_buffer: int = 0,
    outputs: int = 1,
) -> Any:
    """com.microsoft Attention: the projections of q, k and v in one weight [d, 3 d]. mask: [batch, keys], nonzero is seen."""
    if past is not None or do_rotary:
        raise NeedsValue("it has past keys or rotates, which rewright does not read yet")
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [int(weight.shape[1]) // 3] * 3
    parts = torch.split(weight, sizes, 1)
    biases = [None] * 3 if bias is None else torch.split(bias, sizes, 0)
    q, k, v = (F.linear(x, w.t(), b) for w, b in zip(parts, biases))
    if mask is not None and mask.dim() == 1:  # the number of tokens of each sequence
        mask = (torch.arange(x.shape[1])[None, :] < mask[: x.shape[0], None]).to(torch.int32)
    if mask is not None and mask.dim() == 3:
        added = torch.where(mask[:, None] != 0, 0.0, mask_filter_value).to(x.dtype)
        attention_bias, mask = added if attention_bias is None else attention_bias + added, None
    made = multi_head_attention(
        q, k, v, None, mask, attention_bias, num_heads=num_heads, scale=scale, mask_filter_value=mask_filter_value, unidirectional=unidirectional, outputs=3
    )
    return made[0] if outputs == 1 else (made[0], torch.stack(made[1:]))
