"""linear_int8_static as QuantizeLinear and one integer product that onnxruntime runs whole: with bias, float out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic


def ort(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """QuantizeLinear + com.microsoft.MatMulIntegerToFloat with the bias inside; layers that share x and its grid share the QuantizeLinear."""
    q = quantized(x, x_scale, x_zero_point)
    given = (q, w.t(), x_scale, scale, x_zero_point, None, b)
    return symbolic("com.microsoft::MatMulIntegerToFloat", given[: 5 if b is None else 7], {}, dtype=x.dtype, shape=(*x.shape[:-1], w.shape[0]))


def pure(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """QuantizeLinear, DequantizeLinear, Gemm: onnxruntime makes it QGemm, 0 to 20 % slower than the form above.

    Not MatMul: of MatMul + Add with static shapes onnxruntime makes a float Gemm behind a DequantizeLinear at every run, 3
    times slower than float32. The weight needs its zero points, else nothing is fused. The bias is added in float:
    as Gemm's int32 operand it is no faster, and where a channel's scale is coarse (a row of zeros) it loses precision.
    """
    q = quantized(x, x_scale, x_zero_point).flatten(0, -2)
    rows = dequantized(q, x_scale, x_zero_point, x.dtype)
    weight = dequantized(w, scale, torch.zeros(w.shape[0], dtype=torch.int8), x.dtype, axis=0)
    y = symbolic("::Gemm", (rows, weight), {"transB": 1}, dtype=x.dtype, shape=(q.shape[0], w.shape[0]))
    y = y.view(*x.shape[:-1], w.shape[0])
    return y if b is None else y + b


def quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """uint8 codes: int8 ones take a scalar path in MatMulInteger, ten times slower."""
    return symbolic("::QuantizeLinear", (x, scale, zero_point), {}, dtype=torch.uint8, shape=x.shape)


def dequantized(q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype, axis: int | None = None) -> Tensor:
    """What codes stand for; one scale, or one along an axis."""
    return symbolic("::DequantizeLinear", (q, scale, zero_point), {} if axis is None else {"axis": axis}, dtype=dtype, shape=q.shape)
