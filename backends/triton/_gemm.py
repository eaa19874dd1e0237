"""Products of codes with weights of 8 bits, [rows, in] [out, in]^T, and the scales, zero point and bias on the way out."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._quantize import Codes
from ._tiles import ANY, Tile, choose

TILES = (
    Tile(rows=32, bm=16, bn=32, bk=256, warps=4, stages=4),
    Tile(rows=128, bm=64, bn=64, bk=128, warps=4, stages=4),
    Tile(rows=1024, bm=64, bn=128, bk=128, warps=4, stages=4),
    Tile(rows=ANY, bm=128, bn=128, bk=128, warps=8, stages=4),
)
"""Of int8 and float8 alike: at most 128 KiB of shared memory."""
RAGGED_TILES = (
    Tile(rows=32, bm=16, bn=32, bk=64, warps=4, stages=2),
    Tile(rows=ANY, bm=64, bn=64, bk=64, warps=8, stages=2),
)
"""For widths that 16 does not divide: Triton takes such rows one by one, through registers."""
SUM_BLOCK = 2048
BAND = 8
"""Tiles of so many rows share the columns of w while they are in L2."""


@triton.jit
def place(m, n, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """The first row and column of a program's tile: down a band of rows, then along it."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(m, BM), tl.cdiv(n, BN)
    first = pid // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    inside = pid % (BAND * across)
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def _scaled(
    X, W, XS, WS, Z, SUMS, B, Y, m, n, k, xs_stride,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row, col = place(m, n, BM, BN, BAND)
    rows, cols, at = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, BK)
    x_at = X + rows.to(tl.int64)[:, None] * k + at[None, :]
    w_at = W + cols.to(tl.int64)[None, :] * k + at[:, None]
    INTEGERS: tl.constexpr = X.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if INTEGERS else tl.float32)
    for start in range(0, k, BK):
        x = tl.load(x_at, mask=(rows[:, None] < m) & (at[None, :] < k - start), other=0.0)
        w = tl.load(w_at, mask=(cols[None, :] < n) & (at[:, None] < k - start), other=0.0)
        # Hopper adds up float8 products in 14 bits: into float32 after every step
        acc = tl.dot(x, w, acc, out_dtype=tl.int32) if INTEGERS else tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        x_at += BK
        w_at += BK
    if HAS_ZERO:  # codes are stored 128 lower: sum of (q - (z - 128)) w
        acc -= (tl.load(Z).to(tl.int32) - 128) * tl.load(SUMS + cols, mask=cols < n, other=0)[None, :]
    xs = tl.load(XS + rows * xs_stride, mask=rows < m, other=0).to(tl.float32)
    ws = tl.load(WS + cols, mask=cols < n, other=0).to(tl.float32)
    y = acc.to(tl.float32) * xs[:, None] * ws[None, :]
    if HAS_BIAS:
        y += tl.load(B + cols, mask=cols < n, other=0).to(tl.float32)[None, :]
    tl.store(Y + rows.to(tl.int64)[:, None] * n + cols[None, :], y.to(Y.dtype.element_ty), mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def _sum_rows(W, SUMS, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * k
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(W + row + at, mask=at < k, other=0).to(tl.int32)
    tl.store(SUMS + tl.program_id(0), tl.sum(total, 0))


def linear(x: Codes, w: Tensor, scale: Tensor, b: Tensor | None, like: Tensor) -> Tensor:
    """y = x (diag(scale) w)^T + b in the dtype and with the leading axes of `like`. w: int8 or float8 [out, in], dense."""
    (m, k), n = x.values.shape, w.shape[0]
    y = torch.empty(*like.shape[:-1], n, dtype=like.dtype, device=like.device)
    sums = None
    if x.zero is not None:  # read once more than the product needs: the ops don't store these sums
        sums = torch.empty(n, dtype=torch.int32, device=w.device)
        _sum_rows[(n,)](w, sums, k, BLOCK=min(SUM_BLOCK, triton.next_power_of_2(k)), num_warps=4)
    tile = choose(TILES if k % 16 == 0 else RAGGED_TILES, m, like)
    grid = (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)
    _scaled[grid](
        x.values, w, x.scale, scale, x.zero, sums, b, y, m, n, k, int(x.scale.numel() > 1),
        HAS_ZERO=x.zero is not None, HAS_BIAS=b is not None, BM=tile.bm, BN=tile.bn, BK=tile.bk, BAND=BAND, **tile.options,
    )  # fmt: skip
    return y


def flat(x: Tensor) -> Tensor:
    """[rows, d], dense."""
    return x.contiguous().view(-1, x.shape[-1])


def dense(x: Tensor | None) -> Tensor | None:
    """The same, dense; nothing stays nothing."""
    return None if x is None else x.contiguous()
