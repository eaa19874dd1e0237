"""Products with weights that are packed codes of 2, 4 or 8 bits, unpacked on the way: a tile's, or for few rows a vector's."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gemm import BAND, place
from ._quantize import Codes
from ._tiles import ANY, FLOAT32, Tile, choose, upcast

FEW = 4
"""Rows for which every product is its own sum: the weights are read once a row, out of the cache after the first."""

VECTORS = (Tile(rows=FEW, bm=1, bn=16, bk=256, warps=4, stages=3),)
TILES = (
    Tile(rows=32, bm=16, bn=32, bk=128, warps=4, stages=3),
    Tile(rows=128, bm=64, bn=64, bk=64, warps=4, stages=3),
    Tile(rows=ANY, bm=128, bn=128, bk=64, warps=8, stages=3),
)
"""For x in half precision, and in codes of 8 bits."""
RAGGED_TILES = (
    Tile(rows=32, bm=16, bn=32, bk=64, warps=4, stages=2),
    Tile(rows=ANY, bm=64, bn=64, bk=32, warps=8, stages=2),
)
"""For rows of values or of bytes that 16 does not divide: Triton takes them one by one, through registers."""
TWO_TERM_TILES = (
    Tile(rows=32, bm=16, bn=32, bk=64, warps=4, stages=3),
    Tile(rows=ANY, bm=64, bn=64, bk=64, warps=8, stages=3),
)
"""For two sums at a time."""
WIDE_TILES = (
    Tile(rows=32, bm=16, bn=32, bk=32, warps=4, stages=2),
    Tile(rows=ANY, bm=64, bn=64, bk=32, warps=8, stages=2),
)
"""For x in float32, whose products are three each."""


class Packed(NamedTuple):
    """Weights as an op stores them, dense."""

    kind: str
    """'uniform': (code - zero point) scale, a scale every `group` channels.  'shift': 0 and +-2^k.  'ternary': code - 1. A scale a row for these two."""
    codes: Tensor
    """uint8 [terms, out, bytes]: the first channel in the low bits."""
    bits: int
    scale: Tensor
    """[out, groups] of 'uniform', else [terms, out], or [1, 1]."""
    zero: Tensor | None = None
    """Of 'uniform': float [out, groups], or packed like the codes [out, bytes], or none for 2^(bits - 1)."""
    group: int = 1


@triton.jit
def _spread(packed, BITS: tl.constexpr):
    """uint8 [n, bytes] -> int32 codes [n, bytes * 8 / BITS], in order."""
    p = packed.to(tl.int32)
    if BITS == 8:
        return p
    elif BITS == 4:
        return tl.interleave(p & 15, p >> 4)
    else:
        return tl.interleave(tl.interleave(p & 3, (p >> 4) & 3), tl.interleave((p >> 2) & 3, p >> 6))


@triton.jit
def _codes(W, cols, start, n, row_bytes, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    at = start * BITS // 8 + tl.arange(0, BK * BITS // 8)
    inside = (cols[:, None] < n) & (at[None, :] < row_bytes)
    return _spread(tl.load(W + cols.to(tl.int64)[:, None] * row_bytes + at[None, :], mask=inside, other=0), BITS)


@triton.jit
def _weights(
    W, S, ZP, cols, start, n, k, row_bytes, groups, zero_bytes,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN, BK]: int8 codes, whose scale comes last, or of 'uniform' float32 values. RUN neighbours share a scale."""
    codes = _codes(W, cols, start, n, row_bytes, BITS, BN, BK)
    if KIND == "shift":
        size = (1 << (codes & 7)) >> 1
        return tl.where(codes & 8 != 0, -size, size).to(tl.int8)
    elif KIND == "ternary":
        return (codes - 1).to(tl.int8)
    else:
        group = (start + tl.arange(0, BK // RUN) * RUN) // GROUP
        inside = (cols[:, None] < n) & (group[None, :] < groups)
        row = cols.to(tl.int64)[:, None]
        scale = tl.load(S + row * groups + group[None, :], mask=inside, other=0).to(tl.float32)
        if ZERO == "packed":
            zero = tl.load(ZP + row * zero_bytes + (group * BITS // 8)[None, :], mask=inside, other=0).to(tl.int32)
            zero = ((zero >> (group * BITS % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        elif ZERO == "float":
            zero = tl.load(ZP + row * groups + group[None, :], mask=inside, other=0).to(tl.float32)
        else:
            zero = tl.full((BN, BK // RUN), 1 << (BITS - 1), tl.float32)
        runs = tl.reshape(codes.to(tl.float32), (BN, BK // RUN, RUN))
        return tl.reshape((runs - zero[:, :, None]) * scale[:, :, None], (BN, BK))


@triton.jit
def _tile(
    X, W, S, ZP, XS, XZ, B, Y, m, n, k, row_bytes, term_bytes, groups, zero_bytes, xs_stride, s_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr, TERMS: tl.constexpr, X_ZERO: tl.constexpr,
    BIAS: tl.constexpr, UP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, col = place(m, n, BM, BN, BAND)
    rows, cols, at = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, BK)
    CODES: tl.constexpr = X.dtype.element_ty == tl.int8
    WHOLE: tl.constexpr = tl.int32 if CODES else tl.float32
    first, second = tl.zeros((BM, BN), WHOLE), tl.zeros((BM, BN), WHOLE)
    sums, more_sums = tl.zeros((BN,), tl.int32), tl.zeros((BN,), tl.int32)
    for start in range(0, k, BK):
        x = tl.load(X + rows.to(tl.int64)[:, None] * k + (start + at)[None, :], mask=(rows[:, None] < m) & (start + at[None, :] < k), other=0)
        w = _weights(W, S, ZP, cols, start, n, k, row_bytes, groups, zero_bytes, KIND, BITS, GROUP, RUN, ZERO, BN, BK)
        if X_ZERO:
            w = tl.where(start + at[None, :] < k, w, 0).to(tl.int8)
            sums += tl.sum(w.to(tl.int32), 1)
        first = _add(first, x, w, UP)
        if TERMS == 2:
            w = _weights(W + term_bytes, S, ZP, cols, start, n, k, row_bytes, groups, zero_bytes, KIND, BITS, GROUP, RUN, ZERO, BN, BK)
            if X_ZERO:
                w = tl.where(start + at[None, :] < k, w, 0).to(tl.int8)
                more_sums += tl.sum(w.to(tl.int32), 1)
            second = _add(second, x, w, UP)
    if X_ZERO:  # codes are stored 128 lower
        zero = tl.load(XZ).to(tl.int32) - 128
        first -= zero * sums[None, :]
        second -= zero * more_sums[None, :]
    y = first.to(tl.float32)
    if KIND != "uniform":
        y *= tl.load(S + cols * s_stride, mask=cols < n, other=0).to(tl.float32)[None, :]
        if TERMS == 2:
            y += second.to(tl.float32) * tl.load(S + n + cols, mask=cols < n, other=0).to(tl.float32)[None, :]
    if CODES:
        y *= tl.load(XS + rows * xs_stride, mask=rows < m, other=0).to(tl.float32)[:, None]
    if BIAS:
        y += tl.load(B + cols, mask=cols < n, other=0).to(tl.float32)[None, :]
    tl.store(Y + rows.to(tl.int64)[:, None] * n + cols[None, :], y.to(Y.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def _add(acc, x, w, UP: tl.constexpr):
    if acc.dtype == tl.int32:
        return tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    elif UP:
        return tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision=FLOAT32)
    else:  # through float32, as bfloat16 wants it
        return tl.dot(x, tl.trans(w.to(tl.float32).to(x.dtype)), acc, input_precision=FLOAT32)


@triton.jit
def _vector(
    X, W, S, ZP, XS, XZ, B, Y, n, k, row_bytes, term_bytes, groups, zero_bytes, xs_stride, s_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, ZERO: tl.constexpr, TERMS: tl.constexpr, X_ZERO: tl.constexpr,
    BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    cols, at = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    CODES: tl.constexpr = X.dtype.element_ty == tl.int8
    WHOLE: tl.constexpr = tl.int32 if CODES else tl.float32
    first, second = tl.zeros((BN, BK), WHOLE), tl.zeros((BN, BK), WHOLE)
    shift = tl.load(XZ).to(tl.int32) - 128 if X_ZERO else 0
    for start in range(0, k, BK):
        x = tl.load(X + row.to(tl.int64) * k + start + at, mask=start + at < k, other=0).to(WHOLE)
        if X_ZERO:
            x = tl.where(start + at < k, x - shift, 0)
        first += x[None, :] * _weights(W, S, ZP, cols, start, n, k, row_bytes, groups, zero_bytes, KIND, BITS, GROUP, RUN, ZERO, BN, BK).to(WHOLE)
        if TERMS == 2:
            w = _weights(W + term_bytes, S, ZP, cols, start, n, k, row_bytes, groups, zero_bytes, KIND, BITS, GROUP, RUN, ZERO, BN, BK)
            second += x[None, :] * w.to(WHOLE)
    y = tl.sum(first, 1).to(tl.float32)
    if KIND != "uniform":
        y *= tl.load(S + cols * s_stride, mask=cols < n, other=0).to(tl.float32)
        if TERMS == 2:
            y += tl.sum(second, 1).to(tl.float32) * tl.load(S + n + cols, mask=cols < n, other=0).to(tl.float32)
    if CODES:
        y *= tl.load(XS + row * xs_stride).to(tl.float32)
    if BIAS:
        y += tl.load(B + cols, mask=cols < n, other=0).to(tl.float32)
    tl.store(Y + row.to(tl.int64) * n + cols, y.to(Y.dtype.element_ty), mask=cols < n)


def _tiles(m: int, k: int, row_bytes: int, terms: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    if m <= FEW:
        return VECTORS
    if k % 16 or row_bytes % 16:
        return RAGGED_TILES
    if dtype == torch.float32:
        return WIDE_TILES
    return TILES if terms == 1 else TWO_TERM_TILES


def linear(x: Tensor | Codes, w: Packed, b: Tensor | None, like: Tensor) -> Tensor:
    """y = x w^T + b in the dtype and with the leading axes of `like`. x: dense [rows, in], as it is or in codes."""
    values, x_scale, x_zero = x if isinstance(x, Codes) else (x, None, None)
    (m, k), (terms, n, row_bytes) = values.shape, w.codes.shape
    if terms > 2:
        raise ValueError(f"weights have one or two terms, got {terms}")
    y = torch.empty(*like.shape[:-1], n, dtype=like.dtype, device=like.device)
    tile = choose(_tiles(m, k, row_bytes, terms, values.dtype), m, like)
    zero = "none" if w.zero is None else "float" if w.zero.is_floating_point() else "packed"
    uniform = w.kind == "uniform"
    sizes = (
        n, k, row_bytes, n * row_bytes, w.scale.shape[-1] if uniform else 1, w.zero.shape[-1] if w.zero is not None else 1,
        int(x_scale is not None and x_scale.numel() > 1), int(w.scale.numel() > 1),
    )  # fmt: skip
    form = {
        "KIND": w.kind, "BITS": w.bits, "GROUP": w.group, "RUN": math.gcd(w.group, tile.bk), "ZERO": zero, "TERMS": terms,
        "X_ZERO": x_zero is not None, "BIAS": b is not None, "BN": tile.bn, "BK": tile.bk,
    }  # fmt: skip
    tensors = (values, w.codes, w.scale, w.zero, x_scale, x_zero, b, y)
    if tile.bm == 1:
        _vector[(triton.cdiv(n, tile.bn), m)](*tensors, *sizes, **form, **tile.options)
    else:
        grid = (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)
        _tile[grid](*tensors, m, *sizes, **form, UP=upcast(values.dtype), BM=tile.bm, BAND=BAND, **tile.options)
    return y
