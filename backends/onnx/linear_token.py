"""linear_token as rows divided by their steps, rounded to uint8 around 128, and one integer product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from .linear_int8_static import dequantized, quantized


def ort(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, bits: int = 8) -> Tensor:
    """com.microsoft.MatMulIntegerToFloat, then each row times its step: the operator takes one scale of x, not one a row.

    Fewer than 8 bits are the same 8-bit product with codes nearer to 128: exact, no faster.
    """
    q, one, zero, step = _rows(x, bits)
    product = symbolic("com.microsoft::MatMulIntegerToFloat", (q, w.t(), one, scale, zero), {}, dtype=x.dtype, shape=(*x.shape[:-1], w.shape[0]))
    return product * step if b is None else product * step + b


def pure(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, bits: int = 8) -> Tensor:
    """DequantizeLinear, MatMul: onnxruntime makes it the product above, as nothing is added before the rows are scaled."""
    q, one, zero, step = _rows(x, bits)
    product = dequantized(q, one, zero, x.dtype) @ dequantized(w.t(), scale, torch.zeros(w.shape[0], dtype=torch.int8), x.dtype, axis=1)
    return product * step if b is None else product * step + b


def _rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, the grid they are on (scale 1, zero point 128) and the step of each row."""
    step = (x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(x.dtype).tiny)  # a row of zeros has none
    one, zero = torch.ones((), dtype=x.dtype), torch.full((), 128, dtype=torch.uint8)
    return quantized(x / step, one, zero), one, zero, step
