"""Block-diagonal products, block by block: y[:, a] = x[:, a] w[a]^T, whichever way blocks lie in the rows of x and y."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import ANY, FLOAT32, Tile, choose, upcast

TILES = (
    Tile(rows=64, bm=16, bn=64, bk=64, warps=4, stages=3),
    Tile(rows=ANY, bm=64, bn=128, bk=64, warps=4, stages=3),
)
RAGGED_TILES = (
    Tile(rows=64, bm=16, bn=32, bk=32, warps=4, stages=2),
    Tile(rows=ANY, bm=64, bn=64, bk=32, warps=8, stages=2),
)
"""For widths of rows or blocks that 16 does not divide: Triton takes them one by one, through registers."""
WIDE_TILES = (
    Tile(rows=64, bm=16, bn=32, bk=32, warps=4, stages=2),
    Tile(rows=ANY, bm=64, bn=64, bk=32, warps=8, stages=2),
)
"""For float32, whose products are three each."""
LEAST = 16
"""The smallest side tl.dot takes; what small blocks lack is masked."""


@triton.jit
def _block(
    X, W, B, Y, m, q, p, blocks, x_width, x_block, x_step, y_width, y_block, y_step,
    BIAS: tl.constexpr, UP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block, place = pid % blocks, pid // blocks  # blocks of a row run side by side: where they interleave they share its cache lines
    rows = place // tl.cdiv(q, BN) * BM + tl.arange(0, BM)
    cols, at = place % tl.cdiv(q, BN) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, p, BK):
        k = start + at
        x_at = block * x_block + k * x_step  # of its row: what lies behind the end is padding
        inside = (rows[:, None] < m) & (k[None, :] < p) & (x_at[None, :] < x_width)
        x = tl.load(X + rows.to(tl.int64)[:, None] * x_width + x_at[None, :], mask=inside, other=0)
        w_at = (block * q + cols).to(tl.int64)[None, :] * p + k[:, None]
        w = tl.load(W + w_at, mask=(cols[None, :] < q) & (k[:, None] < p), other=0)
        if UP:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=FLOAT32)
    y_at = block * y_block + cols * y_step
    kept = (cols < q) & (y_at < y_width)
    if BIAS:
        acc += tl.load(B + y_at, mask=kept, other=0).to(tl.float32)[None, :]
    tl.store(Y + rows.to(tl.int64)[:, None] * y_width + y_at[None, :], acc.to(Y.dtype.element_ty), mask=(rows[:, None] < m) & kept[None, :])


def block_product(x: Tensor, w: Tensor, x_interleaved: bool = False, y_interleaved: bool = False, b: Tensor | None = None, width: int | None = None) -> Tensor:
    """x: dense [rows, n], w: dense [blocks, q, p] -> [rows, blocks q], or the first `width` of these, plus b.

    Values of a block stand side by side, or, interleaved, `blocks` apart. An x of fewer than blocks p values has zeros behind its end.
    """
    blocks, q, p = w.shape
    y = torch.empty(x.shape[0], blocks * q if width is None else width, dtype=x.dtype, device=x.device)
    tiles = WIDE_TILES if x.dtype == torch.float32 else TILES if x.shape[1] % 16 == p % 16 == 0 else RAGGED_TILES
    tile = choose(tiles, x.shape[0], x)
    bn, bk = (max(LEAST, min(most, triton.next_power_of_2(size))) for most, size in ((tile.bn, q), (tile.bk, p)))
    x_place, y_place = ((1, blocks) if interleaved else (size, 1) for interleaved, size in ((x_interleaved, p), (y_interleaved, q)))
    grid = (triton.cdiv(x.shape[0], tile.bm) * triton.cdiv(q, bn) * blocks,)
    _block[grid](
        x, w, b, y, x.shape[0], q, p, blocks, x.shape[1], *x_place, y.shape[1], *y_place,
        BIAS=b is not None, UP=upcast(x.dtype), BM=tile.bm, BN=bn, BK=bk, **tile.options,
    )  # fmt: skip
    return y
