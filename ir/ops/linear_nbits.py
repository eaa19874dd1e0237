"""y = x ((w - zero_point) scale)^T + b, one zero point and scale every group_size channels      x: [..., in]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import pack, unpack
from ._semantic import semantic


@semantic("linear_nbits(Tensor x, Tensor w, Tensor scale, Tensor? zero_point, Tensor? b, int bits, int group_size) -> Tensor")
def linear_nbits(x: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, b: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Weight-only quantized linear: only the weights are codes of 2, 4 or 8 bits, products are in x's dtype.

    The layout is that of onnxruntime's MatMulNBits, n = ceil(in / group_size):
    w: uint8 [out, n, group_size * bits / 8], the first channel in the low bits, a short last group filled up with anything.
    scale: [out, n].  zero_point: uint8 [out, ceil(n * bits / 8)] packed like w, or float [out, n], or None for 2^(bits-1).
    Gradients reach x, scale, a float zero_point and b.
    """
    weight = group_values(w, scale, zero_point, bits, group_size).flatten(-2)[:, : x.shape[-1]]
    return torch.nn.functional.linear(x, weight.to(x.dtype), b)


def group_values(w: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """What packed codes stand for: [rows, n, group_size * bits / 8] -> [rows, n, group_size] in the scale's dtype."""
    codes = unpack(w, bits, group_size).to(scale.dtype)
    if zero_point is None:
        return (codes - 2 ** (bits - 1)) * scale[..., None]
    zero = zero_point if zero_point.is_floating_point() else unpack(zero_point, bits, scale.shape[-1])
    return (codes - zero.to(scale.dtype)[..., None]) * scale[..., None]


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """4, 8 and 2 bits; packed, float and no zero points; an odd number of groups, a short last group, three axes, no bias."""
    for shape, out, bits, group, zeros, bias in [
        ((5, 64), 16, 4, 32, "packed", True),
        ((7, 100), 33, 4, 32, "float", False),
        ((2, 3, 144), 24, 8, 16, "packed", True),
        ((4, 128), 8, 2, 16, "none", True),
        ((3, 80), 6, 4, 16, "packed", True),
    ]:
        groups = -(-shape[-1] // group)
        w = torch.randint(0, 256, (out, groups, group * bits // 8), device=device, dtype=torch.uint8)
        scale = torch.rand(out, groups, device=device, dtype=dtype) * 0.1 + 0.01
        zero = torch.randint(0, 2**bits, (out, groups), device=device)
        zero_point = {"packed": pack(zero, bits), "float": zero.to(dtype) + 0.25, "none": None}[zeros]
        x, b = torch.randn(shape, device=device, dtype=dtype), torch.randn(out, device=device, dtype=dtype) if bias else None
        yield x, w, scale, zero_point, b, bits, group
