"""ternary_linear as an integer product with codes -1, 0 and 1, or, of float activations, as MatMulNBits; the file holds 2 bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from ...ir.formats import unpack
from ...ir.ops.ternary_linear import LEAST
from .linear_int8_static import dequantized, quantized
from .linear_nbits import ACCURACY

BLOCK = 128
"""Channels that MatMulNBits rounds together."""


def ort(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """com.microsoft.MatMulIntegerToFloat, each row divided by what it was multiplied by; or com.microsoft.MatMulNBits with the bias inside.

    onnxruntime unpacks the codes once, when it loads the file. For float activations 4 bits a weight are the fastest of MatMulNBits'
    widths, or nearly: with 768 inputs and 3072 outputs, one thread, 4.4 times float32's speed at 1 row and 1.6 times at 128 (2 bits: 3.6
    and 1.3, 8 bits: 4.3 and 1.75), with 2048 and 5632 at 1 row 11.5 times (12.4 and 7.2). All of them round activations to 8 bits
    a block (see linear_nbits); without that, 4 bits are as fast as float32, and 2 and 8 bits 2 to 40 times slower.
    """
    if activations == "none":
        return _nbits(x, w, scale, b)
    q, one, zero, inverse = _rows(x)
    given = (q, _codes(w, x).t(), one, scale.expand(w.shape[0]), zero)
    product = symbolic("com.microsoft::MatMulIntegerToFloat", given, {}, dtype=x.dtype, shape=(*x.shape[:-1], w.shape[0]))
    return product / inverse if b is None else product / inverse + b


def pure(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """DequantizeLinear, MatMul: onnxruntime makes it the product above. Float activations take a float product."""
    if activations == "none":
        y = torch.nn.functional.linear(x, _codes(w, x).to(x.dtype)) * scale
        return y if b is None else y + b
    q, one, zero, inverse = _rows(x)
    weight = dequantized(_codes(w, x).t(), scale.expand(w.shape[0]), torch.zeros(w.shape[0], dtype=torch.int8), x.dtype, axis=1)
    product = dequantized(q, one, zero, x.dtype) @ weight
    return product / inverse if b is None else product / inverse + b


def _rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, the grid they are on (scale 1, zero point 128) and what each row was multiplied by."""
    inverse = 127 / x.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    one, zero = torch.ones((), dtype=x.dtype), torch.full((), 128, dtype=torch.uint8)
    return quantized(x * inverse, one, zero), one, zero, inverse


def _codes(w: Tensor, x: Tensor) -> Tensor:
    """[out, in] int8: -1, 0 and 1."""
    table = unpack(torch.arange(256, dtype=torch.uint8)[:, None], 2, 4).to(torch.int8) - 1
    return _looked_up(w, table)[:, : x.shape[-1]]


def _nbits(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    inner, outer, block = x.shape[-1], w.shape[0], BLOCK
    while block > max(inner, 16):
        block //= 2
    codes = unpack(torch.arange(256, dtype=torch.uint8)[:, None], 2, 4) + 7  # 8 stands for 0
    pairs = codes[:, 0::2] + 16 * codes[:, 1::2]
    packed = _looked_up(w, pairs)
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % (block // 2))).unflatten(1, (-1, block // 2))
    given = [x, packed, scale.expand(outer)[:, None].expand(packed.shape[:2]), None, None, b]
    while given[-1] is None:
        given.pop()
    attributes: dict[str, Any] = {"K": inner, "N": outer, "bits": 4, "block_size": block, "accuracy_level": ACCURACY}
    return symbolic("com.microsoft::MatMulNBits", given, attributes, dtype=x.dtype, shape=(*x.shape[:-1], outer))


def _looked_up(w: Tensor, table: Tensor) -> Tensor:
    """Each byte of w [out, n] as its row of a table [256, k]: [out, n k]. Shifts of whole weights would take onnxruntime ten times as long to load."""
    return torch.nn.functional.embedding(w.to(torch.int32), table).flatten(1)
