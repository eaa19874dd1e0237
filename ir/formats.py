"""Number formats of 8 bits and fewer: which real values a code stands for. Rounding is half to even everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite value of float8 E4M3
POWERS = 7  # powers of two a term of "pot" has: 1 to 64


@dataclass(frozen=True)
class Format:
    """How a tensor is stored or seen by a quantized product.

    kind: "int" (uniform steps), "fp8" (float8 E4M3) or "pot" (powers of two, ir.pot: a term every 4 bits, each with a scale).
    per: what shares a scale: the whole tensor, a row (the last axis: an output channel's weights, a token's activations),
    or `group_size` neighbours of a row.
    symmetric: codes -(2^(bits-1) - 1) .. 2^(bits-1) - 1 around 0, else 0 .. 2^bits - 1 with a zero point; 0 stays 0 exactly in both.
    """

    kind: Literal["int", "fp8", "pot"]
    bits: int
    per: Literal["tensor", "row", "group"]
    symmetric: bool = True

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1) - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest code, or for "pot" the largest of a term."""
        if self.kind == "pot":
            return 2 ** (POWERS - 1)
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


# the names recipes use; "-group" formats have a zero point, as 4-bit weights want one
WEIGHTS = {
    "int8-channel": Format("int", 8, "row"),
    "int6-channel": Format("int", 6, "row"),
    "int4-channel": Format("int", 4, "row"),
    "int8-group": Format("int", 8, "group", symmetric=False),
    "int4-group": Format("int", 4, "group", symmetric=False),
    "fp8-channel": Format("fp8", 8, "row"),
    "pot4-channel": Format("pot", 4, "row"),
    "pot8-channel": Format("pot", 8, "row"),
}
# "-dynamic": one range for the whole tensor, found as it comes; "-static": one fixed by calibration; "-token": one a row, as it comes
ACTIVATIONS = {
    "none": None,
    "int8-dynamic": Format("int", 8, "tensor", symmetric=False),
    "int8-static": Format("int", 8, "tensor", symmetric=False),
    "int8-token": Format("int", 8, "row"),
    "int6-token": Format("int", 6, "row"),
    "int4-token": Format("int", 4, "row"),
    "fp8-token": Format("fp8", 8, "row"),
}


class Grid(NamedTuple):
    """A code q stands for (q - zero_point) * scale. Both broadcast against the (grouped) tensor; zero_point is 0 for symmetric formats and fp8."""

    scale: Tensor
    zero_point: Tensor


def grouped(x: Tensor, form: Format, group_size: int) -> Tensor:
    """x [..., d] as [..., ceil(d / group_size), group_size] for "group" formats (a short last group is filled with zeros), else x."""
    if form.per != "group":
        return x
    short = -x.shape[-1] % group_size
    return torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, group_size))


def ungrouped(x: Tensor, form: Format, width: int) -> Tensor:
    """The inverse of `grouped` for a tensor of `width` channels."""
    return x.flatten(-2)[..., :width] if form.per == "group" else x


def grid(x: Tensor, form: Format, shrink: float | Tensor = 1.0) -> Grid:
    """The grid over the range of a (grouped) tensor, times `shrink`. A range of zero gets scale 1."""
    axes = tuple(range(x.dim())) if form.per == "tensor" else (-1,)
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return grid_between(low * shrink, high * shrink, form)


def grid_between(low: Tensor, high: Tensor, form: Format) -> Grid:
    """The grid for values between two limits."""
    if form.symmetric:
        limit = torch.maximum(high, -low)
        scale = limit / (FP8_MAX if form.kind == "fp8" else form.high)
        return Grid(torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / form.high
    scale = torch.where(scale == 0, 1.0, scale)
    return Grid(scale, torch.round(-low / scale))


def codes(x: Tensor, on: Grid, form: Format) -> Tensor:
    """The codes of a (grouped) tensor, as floats; gradients pass straight through the rounding."""
    if form.kind == "fp8":
        return straight_through(x / on.scale, lambda v: v.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype))
    if form.kind == "pot":
        assert form.bits == 4, "a second term has a grid of its own"
        return straight_through(x / on.scale, nearest_power)
    return straight_through(x / on.scale, lambda v: torch.clamp(torch.round(v) + on.zero_point, form.low, form.high) - on.zero_point) + on.zero_point


def values(q: Tensor, on: Grid) -> Tensor:
    """What codes stand for."""
    return (q - on.zero_point) * on.scale


def fake_quantize(x: Tensor, form: Format | None, group_size: int = 128, on: Grid | None = None) -> Tensor:
    """x as its format keeps it: quantized and made float again. None keeps it as it is; `on` replaces the grid over its range."""
    if form is None:
        return x
    if form.kind == "pot":
        return _powers(x, form.bits // 4)
    parts = grouped(x, form, group_size)
    on = on or grid(parts.detach(), form)
    return ungrouped(values(codes(parts, on, form), on), form, x.shape[-1])


def _powers(x: Tensor, terms: int) -> Tensor:
    """x [..., d] as so many power-of-two terms keep it, each with a scale a row that reaches the largest value."""
    found, term = torch.zeros_like(x), Format("pot", 4, "row")
    for _ in range(terms):
        rest = (x - found).detach()
        on = grid(rest, term)
        found = found + codes(rest, on, term) * on.scale
    return straight_through(x, lambda _: found)


def nearest_power(x: Tensor, levels: int = POWERS) -> Tensor:
    """0 or the +-1, 2, 4 ... 2^(levels-1) nearest to each value, as floats; half way between two the larger.

    Nearest in the linear domain: 3, not sqrt(8), divides 2 from 4, which loses less than rounding the logarithm (specs/quant_shiftadd.md 4.1).
    """
    size = x.abs()
    code = (size >= 0.5).to(x.dtype)
    for i in range(levels - 1):
        code = code.add(size >= 1.5 * 2**i, alpha=2**i)
    return code * x.sign()


def straight_through(x: Tensor, rounding: Callable[[Tensor], Any]) -> Tensor:
    """rounding(x) with the gradient of x (Bengio et al. 2013)."""
    return x + (rounding(x) - x).detach()


def pack(q: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 along the last axis as uint8, the first in the low bits; a short last byte is filled with zeros. bits: 2, 4 or 8."""
    per_byte = 8 // bits
    q = torch.nn.functional.pad(q.to(torch.uint8), (0, -q.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte)).to(torch.int32)
    shifts = torch.arange(per_byte, device=q.device) * bits
    return (q << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [..., n] -> the first `width` codes of the last axis, uint8."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    spread = torch.bitwise_right_shift(packed.to(torch.int32)[..., None], shifts)  # not >>, which the ONNX exporter lacks
    return (spread & (2**bits - 1)).flatten(-2)[..., :width].to(torch.uint8)
