"""linear_nbits as MatMulNBits, whose layout it has, or as the blocked DequantizeLinear of opset 21 that onnxruntime makes one of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from ...ir.ops.linear_nbits import linear_nbits
from .constants import blocked_codes

ACCURACY = 4
"""MatMulNBits rounds activations to int8 a group (about 0.5 % of the result). Levels 0 and 1 keep them: 2 times slower at 4
bits, 20 to 80 times at 8 bits (specs/quant_shiftadd.md 6, R6)."""


@contextlib.contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """For a while, the onnx_ir model's products keep their activations in float."""
    import onnx_ir

    products = [n for n in model.graph if n.op_type == "MatMulNBits"]
    for node in products:
        node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", 0)
    yield
    for node in products:
        node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", ACCURACY)


def ort(x: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, b: Tensor | None, bits: int, group_size: int) -> Tensor:
    """com.microsoft.MatMulNBits with the bias inside; groups it does not take stay in float."""
    if group_size < 16 or group_size & (group_size - 1):
        return linear_nbits(x, w, scale, zero_point, b, bits, group_size)
    if zero_point is not None and zero_point.is_floating_point():
        return ort(x, w, scale, None, b, bits, group_size) + _shift(x, scale, zero_point, bits, group_size)
    given = [x, w, scale, zero_point, None, b]
    while given[-1] is None:
        given.pop()
    attributes: dict[str, Any] = {"K": x.shape[-1], "N": w.shape[0], "bits": bits, "block_size": group_size, "accuracy_level": ACCURACY}
    return symbolic("com.microsoft::MatMulNBits", given, attributes, dtype=x.dtype, shape=(*x.shape[:-1], w.shape[0]))


def pure(x: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, b: Tensor | None, bits: int, group_size: int) -> Tensor:
    """DequantizeLinear [in, out] in blocks along in, MatMul, Add. 2 bits, which opset 21 lacks, stay in float."""
    if bits == 2:
        return linear_nbits(x, w, scale, zero_point, b, bits, group_size)
    if zero_point is not None and zero_point.is_floating_point():
        return pure(x, w, scale, None, b, bits, group_size) + _shift(x, scale, zero_point, bits, group_size)
    codes = blocked_codes(w, bits, x.shape[-1], signed=zero_point is None)
    zeros = [] if zero_point is None else [blocked_codes(zero_point, bits, scale.shape[1], signed=False)]
    attributes: dict[str, Any] = {"axis": 0, "block_size": group_size}
    y = x @ symbolic("::DequantizeLinear", (codes, scale.t(), *zeros), attributes, dtype=x.dtype, shape=codes.shape)
    return y if b is None else y + b


def _shift(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int) -> Tensor:
    """What float zero points add to a product around 2^(bits-1): the sum of x over each group times (2^(bits-1) - zero_point) scale.

    As MatMulNBits' own operand they would take it to a path 10 to 30 times slower.
    """
    short = -x.shape[-1] % group_size
    groups = (torch.nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, group_size))
    return groups.sum(-1) @ ((2 ** (bits - 1) - zero_point) * scale).t()
