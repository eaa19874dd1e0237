"""ONNX operators on 8- and 4-bit codes, standard and onnxruntime's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .neural import conv
from .values import NeedsValue

RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.uint16: (0, 65535), torch.int16: (-32768, 32767)}


def _along(v: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """A scale or zero point that stands for a tensor, an axis, or blocks of an axis, as it meets x."""
    if v.numel() == 1:
        return v.reshape(())
    if v.dim() == 1 and not block_size:
        return v.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    if block_size:
        return v.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return v


def _wide(v: Tensor) -> Tensor:
    return v.to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, saturate: int = 1, block_size: int = 0, output_dtype: Any = None, precision: int = 0
) -> Tensor:
    dtype = zero.dtype if zero is not None else output_dtype or torch.uint8
    ratio = x / _along(scale, x, axis, block_size)
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        return (ratio.clamp(-limit, limit) if saturate else ratio).to(dtype)
    low, high = RANGES[dtype]
    code = torch.round(ratio)
    if zero is not None:
        code = code + _wide(_along(zero, x, axis, block_size)).to(code.dtype)
    return code.clamp(low, high).to(torch.int32).to(dtype)


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: Any = None) -> Tensor:
    if x.dtype.is_floating_point:
        y = x.to(scale.dtype) * _along(scale, x, axis, block_size)
    else:
        code = _wide(x) if zero is None else _wide(x) - _wide(_along(zero, x, axis, block_size))
        y = code.to(scale.dtype) * _along(scale, x, axis, block_size)
    return y.to(output_dtype) if output_dtype else y


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    axes = list(range(x.dim()))  # the ONNX exporter has no amin without them
    low, high = x.amin(axes).clamp(max=0), x.amax(axes).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(torch.clamp(-low / scale, 0, 255))
    y = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Products of 8-bit codes, in float64 where they are exact and fast."""
    return torch.matmul(a.double(), b.double()).to(torch.int32)


def _centred(a: Tensor, zero: Tensor | None, rows: bool) -> Tensor:
    wide = _wide(a)
    if zero is None:
        return wide
    zero = _wide(zero)
    if zero.numel() > 1 and rows and zero.dim() == 1:
        zero = zero[:, None]
    return wide - (zero.reshape(()) if zero.numel() == 1 else zero)


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return _exact(_centred(a, a_zero, True), _centred(b, b_zero, False))


def _exact_conv(x: Tensor, w: Tensor, **attributes: Any) -> Tensor:
    """Of whole numbers up to 255, in float32, which holds sums up to 2**24 exactly: onnxruntime convolves no float64.

    Where as many products as a filter has may exceed that, digits of w are convolved one by one.
    """
    x, w = x.float(), w.float()
    base = 2 ** max(int(math.log2(2**24 / (255 * math.prod(map(int, w.shape[1:]))))), 1)
    total, place, largest = torch.zeros((), dtype=torch.int32), 1, 255
    while largest > base:
        higher = torch.floor(w / base)
        total = total + conv(x, w - higher * base, **attributes).to(torch.int32) * place
        w, place, largest = higher, place * base, -(-largest // base)
    return total + conv(x, w, **attributes).to(torch.int32) * place


def conv_integer(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, **attributes: Any) -> Tensor:
    x = _centred(x, x_zero, False)
    w = _wide(w) - (0 if w_zero is None else _wide(_along(w_zero, w, 0)))
    return _exact_conv(x, w, **attributes)


def _requantize(total: Tensor, scale: Tensor, y_scale: Tensor, y_zero: Tensor) -> Tensor:
    low, high = RANGES[y_zero.dtype]
    return (torch.round(total.to(torch.float32) * (scale / y_scale)) + _wide(y_zero)).clamp(low, high).to(torch.int32).to(y_zero.dtype)


def qlinear_matmul(a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor) -> Tensor:
    a_s = a_scale[:, None] if a_scale.numel() > 1 else a_scale.reshape(())
    b_s = b_scale if b_scale.numel() > 1 else b_scale.reshape(())
    return _requantize(matmul_integer(a, b, a_zero, b_zero), (a_s * b_s).float(), y_scale.float(), y_zero)


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    b: Tensor | None = None,
    **attributes: Any,
) -> Tensor:
    total = conv_integer(x, w, x_zero, w_zero, **attributes)
    if b is not None:
        total = total + _along(b, total, 1) if b.numel() > 1 else total + b
    return _requantize(total, x_scale * _along(w_scale, total, 1), y_scale, y_zero)


def matmul_integer_to_float(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    y = matmul_integer(a, b, a_zero, b_zero).to(a_scale.dtype) * (a_scale * b_scale)
    return y if bias is None else y + bias


def dynamic_quantize_matmul(a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    codes, scale, zero = dynamic_quantize(a)
    return matmul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


def qlinear_of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """onnxruntime's QLinearAdd and its like: of what codes stand for, as codes again."""

    def run(a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor | None = None) -> Tensor:
        return quantize(function(dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)), y_scale, y_zero)

    return run


def qlinear_sigmoid(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor | None = None) -> Tensor:
    return quantize(torch.sigmoid(dequantize(x, x_scale, x_zero)), y_scale, y_zero)


def qlinear_leaky_relu(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor | None = None, *, alpha: float = 0.01) -> Tensor:
    return quantize(torch.nn.functional.leaky_relu(dequantize(x, x_scale, x_zero), alpha), y_scale, y_zero)


def qgemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """c: int32, in steps of a_scale * b_scale. Codes where y_scale is given, else floats."""
    b_zero = b_zero if b_zero.numel() > 1 else b_zero.reshape(())
    wide = _wide(b.t() if transB else b) - _wide(b_zero)
    total = _exact(_centred(a.t() if transA else a, a_zero, False), wide)
    total = total if c is None else total + c
    scale = a_scale * b_scale * alpha
    return total.to(scale.dtype) * scale if y_scale is None or y_zero is None else _requantize(total, scale, y_scale, y_zero)


def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    group: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int = 32,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """a [..., K] times a weight of N rows, whose codes lie in blocks: (code - zero) * scale. b: uint8 [N, blocks, block_size * bits / 8]."""
    if group is not None:
        raise NeedsValue("its channels are grouped by an index (g_idx), which no layer of ours has")
    blocks = -(-K // block_size)
    if zeros is not None:
        zeros = zeros.reshape(N, -1) if zeros.dtype == torch.uint8 else zeros.reshape(N, blocks)
    return torch.ops.rewright.linear_nbits(a, b.reshape(N, blocks, -1), scales.reshape(N, blocks), zeros, bias, bits, block_size)
