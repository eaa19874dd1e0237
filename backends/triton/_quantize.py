"""Activations as 8-bit codes: over a row's range, over that of the whole tensor, or on a grid that is given."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Values a program handles at a time, of a long row, of several short ones or of a flat tensor."""
PARTS = 256
"""The range of a whole tensor is found in at most so many parts: each later program reads them all."""
WARPS = 8

EXACT = {"num_warps": WARPS, "enable_fp_fusion": False}
"""A fused multiply-add would round once where the ops round twice, and fall to the other side of a tie."""


class Codes(NamedTuple):
    """What was quantized: y = (values - zero) * scale, for int8 `values` with a zero point stored 128 lower."""

    values: Tensor
    """[rows, d] int8 or float8."""
    scale: Tensor
    """float32: [rows], or [1] for all rows."""
    zero: Tensor | None
    """[1] of any integer dtype, in codes 0 .. 255; None: 0."""


@triton.jit
def round_even(x):
    """To integers, half to even, for |x| < 2^22: the sum's last bit is worth 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_to_fp8(x):
    # to float8 E4M3's own values, half to even: the interpreter's cast rounds otherwise. Below 2^-6 steps are 2^-9.
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def _load_rows(X, rows, start, count, d, BLOCK: tl.constexpr):
    col = start + tl.arange(0, BLOCK)
    at = rows.to(tl.int64)[:, None] * d + col[None, :]
    inside = (rows[:, None] < count) & (col[None, :] < d)
    return tl.load(X + at, mask=inside, other=0).to(tl.float32), at, inside


@triton.jit
def _rows(X, Q, S, count, d, high, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest, unknown = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, d, BLOCK):
        x, _, _ = _load_rows(X, rows, start, count, d, BLOCK)
        largest = tl.maximum(largest, tl.abs(x))
        unknown += (x != x).to(tl.int32)
    limit = tl.where(tl.max(unknown, 1) > 0, float("nan"), tl.max(largest, 1))  # no code is a NaN: its row's scale is
    if KIND == "ternary":
        inverse = tl.div_rn(127.0, tl.where(limit < 1e-5, 1e-5, limit))  # ir.ops.ternary_linear's LEAST
        scale = tl.div_rn(1.0, inverse)
    else:
        scale = tl.div_rn(limit, high)
        scale = tl.where(scale == 0, 1.0, scale)
    tl.store(S + rows, scale, mask=rows < count)
    for start in range(0, d, BLOCK):  # again, out of the cache
        x, at, inside = _load_rows(X, rows, start, count, d, BLOCK)
        if KIND == "ternary":
            q = tl.minimum(tl.maximum(round_even(x * inverse[:, None]), -128.0), 127.0)
        else:
            q = tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None]), -high), high)
            q = round_even(q) if KIND == "int" else _round_to_fp8(q)
        tl.store(Q + at, q.to(Q.dtype.element_ty), mask=inside)


@triton.jit
def _extremes(X, LOW, HIGH, count, span, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * span
    low, high, unknown = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)  # 0 is in every range
    for start in range(0, span, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < count, other=0).to(tl.float32)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
        unknown += (x != x).to(tl.int32)
    tl.store(LOW + tl.program_id(0), tl.where(tl.max(unknown, 0) > 0, float("nan"), tl.min(low, 0)))
    tl.store(HIGH + tl.program_id(0), tl.max(high, 0))


@triton.jit
def _whole(X, Q, S, Z, LOW, HIGH, count, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.arange(0, PARTS)
    low = tl.load(LOW + part, mask=part < parts, other=0)
    unknown = tl.max((low != low).to(tl.int32), 0)
    low = tl.min(low, 0)
    high = tl.max(tl.load(HIGH + part, mask=part < parts, other=0), 0)
    scale = tl.div_rn(high - low, 255.0)
    scale = tl.where(scale == 0, 1.0, scale)
    zero = round_even(tl.div_rn(-low, scale))
    if tl.program_id(0) == 0:
        tl.store(S, tl.where(unknown > 0, float("nan"), scale))
        tl.store(Z, zero.to(tl.int32))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0).to(tl.float32)
    q = tl.minimum(tl.maximum(round_even(tl.div_rn(x, scale)) + zero, 0.0), 255.0)
    tl.store(Q + at, (q - 128).to(tl.int8), mask=at < count)


@triton.jit
def _given(X, Q, S, Z, count, BLOCK: tl.constexpr):
    scale, zero = tl.load(S).to(tl.float32), tl.load(Z).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0).to(tl.float32)
    q = round_even(tl.minimum(tl.maximum(tl.div_rn(x, scale), -zero), 255 - zero)) + zero
    tl.store(Q + at, (q - 128).to(tl.int8), mask=at < count)


def over_rows(x: Tensor, kind: str, high: float) -> Codes:
    """x [rows, d], dense. kind: 'int' (codes of up to `high`), 'fp8' or 'ternary' (ir.ops.ternary_linear's rounding)."""
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = min(BLOCK, triton.next_power_of_2(x.shape[1]))
    rows = BLOCK // block
    grid = (triton.cdiv(x.shape[0], rows),)
    _rows[grid](x, q, scale, *x.shape, float(high), KIND=kind, ROWS=rows, BLOCK=block, **EXACT)
    return Codes(q, scale, None)


def over_all(x: Tensor) -> Codes:
    """x [rows, d], dense, on the grid over its whole range. Two steps, so that the order of sums and atomics play no part."""
    q = torch.empty_like(x, dtype=torch.int8)
    scale, zero = torch.empty(1, dtype=torch.float32, device=x.device), torch.empty(1, dtype=torch.int32, device=x.device)
    blocks = triton.cdiv(x.numel(), BLOCK)
    span = triton.cdiv(blocks, PARTS) * BLOCK
    parts = triton.cdiv(x.numel(), span)
    low, high = torch.empty(2, parts, dtype=torch.float32, device=x.device)
    _extremes[(parts,)](x, low, high, x.numel(), span, BLOCK=BLOCK, **EXACT)
    _whole[(blocks,)](x, q, scale, zero, low, high, x.numel(), parts, PARTS=triton.next_power_of_2(parts), BLOCK=BLOCK, **EXACT)
    return Codes(q, scale, zero)


def on_grid(x: Tensor, scale: Tensor, zero: Tensor) -> Codes:
    """x [rows, d], dense, on one calibrated grid."""
    q = torch.empty_like(x, dtype=torch.int8)
    _given[(triton.cdiv(x.numel(), BLOCK),)](x, q, scale, zero, x.numel(), BLOCK=BLOCK, **EXACT)
    return Codes(q, scale, zero)
