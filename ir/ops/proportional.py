"""softmax(scale * q k^T + log sizes) v in its exact forms        q: [B, H, Q, D]   k, v: [B, Hkv, K, D | Dv]   sizes: [B, K]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A bias of log sizes is what `attention` does: the fastest form on a CPU and in onnxruntime (augmented within 1 %, value-weighted 14 to 21 % slower;
# onnxruntime 1.31, 197 tokens, 6 heads of 64). On CUDA a bias keeps flash attention, which takes half precision and no mask, from running: there the other
# two forms give the same numbers by plain attention. They want at least one size above 0 in each sample.


def log_sizes(q: Tensor, sizes: Tensor) -> Tensor:
    """[B, 1, 1, K] in q's dtype: what multiplies a key's weight by its size when it is added to its scores. Finite, but that of 0 hides the key."""
    wide = sizes.to(torch.promote_types(q.dtype, torch.float32))[:, None, None]
    return torch.where(wide > 0, wide, 1.0).log().to(q.dtype).masked_fill(wide == 0, torch.finfo(q.dtype).min / 2)


def unmasked(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    """In the form that is exact in q's dtype: bfloat16 holds sizes up to 256 but their logarithms only to 1 %."""
    return (value_weighted if q.dtype == torch.bfloat16 else augmented)(q, k, v, sizes, scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, width: int) -> Tensor:
    """Attention whose q, k and v have one width, a multiple of 8: what flash kernels take. Zeros change nothing. [..., width]"""
    whole = max(-(-t.shape[-1] // 8) * 8 for t in (q, k, v))
    q, k, v = (F.pad(t, (0, whole - t.shape[-1])) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[..., :width]


def value_weighted(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    """softmax(s) (sizes v) / softmax(s) sizes: sizes are one more channel of v. Exact in half precision too up to sizes of 256 (log sizes is not)."""
    weights = sizes.to(v.dtype)[:, None, :, None].expand(*v.shape[:-1], 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    y = _plain(q, k, torch.cat([v * weights, weights], -1), factor, v.shape[-1] + 1)
    return y[..., :-1] / y[..., -1:]


def augmented(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    """[q, 1/scale] . [k, log sizes]: one more channel of q and k. v may have another width than these."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    one = torch.full_like(q[..., :1], 1 / factor)
    more = log_sizes(q, sizes).transpose(-1, -2).expand(*k.shape[:-1], 1)
    return _plain(torch.cat([q, one], -1), torch.cat([k, more], -1), v, factor, v.shape[-1])
