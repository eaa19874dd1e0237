"""linear_int8_dynamic for onnxruntime: DynamicQuantizeMatMul, or DynamicQuantizeLinear + MatMulInteger in the standard domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


def ort(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """One fused node; the weight must be a constant s8 [in, out] to be packed (specs/quant_shiftadd.md 6, R3)."""
    return symbolic("com.microsoft::DynamicQuantizeMatMul", (x, w.t(), scale, None, b), {}, dtype=x.dtype, shape=(*x.shape[:-1], w.shape[0]), version=1)


def pure(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """Standard operators onnxruntime fuses back: activations reach MatMulInteger as uint8 (R2: int8 ones take a scalar path)."""
    q, step, zero = symbolic_multi_out("::DynamicQuantizeLinear", (x,), {}, dtypes=(torch.uint8, x.dtype, torch.uint8), shapes=(x.shape, (), ()))
    product = symbolic("::MatMulInteger", (q, w.t(), zero), {}, dtype=torch.int32, shape=(*x.shape[:-1], w.shape[0]))
    y = product.to(x.dtype) * (step * scale)
    return y if b is None else y + b
