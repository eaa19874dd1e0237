"""linear_int8_dynamic as DynamicQuantizeLinear + MatMulInteger, which onnxruntime fuses into one integer product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic, symbolic_multi_out


def ort(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """Standard operators in the order onnxruntime knows: it makes them MatMulIntegerToFloat or DynamicQuantizeMatMul, and
    layers that share x share its quantization. Activations reach MatMulInteger as uint8: int8 ones take a scalar path,
    ten times slower. The weight must be a constant [in, out] to be packed (specs/quant_shiftadd.md 6, R2 and R3)."""
    q, step, zero = symbolic_multi_out("::DynamicQuantizeLinear", (x,), {}, dtypes=(torch.uint8, x.dtype, torch.uint8), shapes=(x.shape, (), ()))
    product = symbolic("::MatMulInteger", (q, w.t(), zero), {}, dtype=torch.int32, shape=(*x.shape[:-1], w.shape[0]))
    y = product.to(x.dtype) * (step * scale)
    return y if b is None else y + b


pure = ort
