"""attention as the Attention operator of opset 23: one node, no transposes where heads stay packed."""

from __future__ import annotations

from torch import Tensor
from torch.onnx.ops import symbolic

from ...ir.ops.attention import seen
from ...ir.ops.proportional import log_sizes

HIDDEN = -1e9
"""Added to a masked score: its weight underflows to 0, and a row that sees nothing stays finite (-inf would give NaN)."""


def ort(
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
    """q: [B, H, Q, D], k and v: [B, Hkv, K, D] -> [B, H, Q, Dv]."""
    shape = (*q.shape[:-1], v.shape[-1])
    return _operator(q, k, v, {}, shape, key_mask, causal, window, scale, softcap, bias, sizes)


def packed(
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
    """q: [B, Q, H * D], k and v: [B, K, Hkv * D] -> [B, Q, H * Dv]."""
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    shape = (*q.shape[:-1], heads * (v.shape[-1] // kv_heads))
    return _operator(q, k, v, counts, shape, key_mask, causal, window, scale, softcap, bias, sizes)


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attributes: dict,
    shape: tuple,
    key_mask: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    sizes: Tensor | None,
) -> Tensor:
    """q, k, v by head or packed: the second-last axis counts queries and keys either way."""
    if sizes is not None:
        bias = log_sizes(q, sizes) if bias is None else bias + log_sizes(q, sizes)
    only_causal = causal and key_mask is None and window is None and bias is None
    mask = None if only_causal else _additive(q, k, key_mask, causal, window, bias)
    attributes = {**attributes, "is_causal": int(only_causal)}
    if scale is not None:
        attributes["scale"] = scale
    if softcap is not None:
        attributes["softcap"] = softcap
    return symbolic("::Attention", (q, k, v, mask) if mask is not None else (q, k, v), attributes, dtype=q.dtype, shape=shape)


def _additive(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, window: int | None, bias: Tensor | None) -> Tensor | None:
    """What is added to the scores, [B, 1 or H, Q, K]: onnxruntime takes no mask that broadcasts over queries."""
    visible = seen(q, k, key_mask, causal, window)
    mask = bias
    if visible is not None:
        mask = (1.0 - visible.to(q.dtype)) * HIDDEN
        mask = mask if bias is None else mask + bias
    if mask is None:
        return None
    heads = mask.shape[-3] if mask.dim() > 2 else 1  # a bias may be [Q, K] alone
    return mask.expand(q.shape[0], heads, q.shape[-2], k.shape[-2])
