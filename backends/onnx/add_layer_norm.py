"""add_layer_norm as com.microsoft SkipLayerNormalization."""

from __future__ import annotations

import torch
from torch import Tensor


def ort(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, h); outputs 1 and 2 of the operator (mean, inverse deviation) are for training only."""
    row = (*x.shape[:-1], 1)
    y, _, _, h = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::SkipLayerNormalization", (x, r, w, b), {"epsilon": eps}, dtypes=(x.dtype, torch.float32, torch.float32, x.dtype), shapes=(x.shape, row, row, x.shape), version=1
    )
    return y, h
