"""block_dense_linear as one MatMul a block and one of all: onnxruntime's batched MatMul needs a Transpose before and behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ort(x: Tensor, v: Tensor, u: Tensor, b: Tensor | None = None) -> Tensor:
    """Split, MatMul a block, Concat, MatMul."""
    return F.linear(torch.cat([F.linear(part, block) for part, block in zip(parts(x, v), v)], -1), u, b)


def parts(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """x [..., n], padded, as one tensor for each block of w [k, q, ceil(n / k)]."""
    blocks, _, columns = w.shape
    x = x if x.shape[-1] == blocks * columns else F.pad(x, (0, blocks * columns - x.shape[-1]))
    return x.split(columns, -1)


pure = ort
