"""add_layer_norm as Sum + LayerNormalization."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic


def ort(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, h). Sum, not Add: onnxruntime fuses Add + LayerNormalization into SkipLayerNormalization, whose CPU kernel is
    scalar: 1.95 ms against 0.30 ms for [1024, 384] on one Zen 4 core, 18 % of a whole 8-bit MiniLM."""
    h = symbolic("::Sum", (x, r), {}, dtype=x.dtype, shape=x.shape)
    return torch.nn.functional.layer_norm(h, [h.shape[-1]], w, b, eps), h
