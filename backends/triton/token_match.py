"""token_match on a GPU: scores stay in registers, of which each candidate keeps its best; ranks are counted rather than sorted."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir.ops.token_match import GRID
from ._quantize import round_even

ROWS, COLUMNS, FEATURES = 32, 64, 32
"""Of a tile of scores. So low that no GPU takes the float32 products for TF32 (_tiles.FLOAT32), with which ties would not be ties."""
RANKED = 64
"""Tokens whose ranks a program counts."""
WARPS = 8


@triton.jit
def _lengths(X, INVERSE, d, BLOCK: tl.constexpr):
    """What makes rows of length 1: one program a row."""
    row, square = tl.program_id(0).to(tl.int64) * d, tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + row + at, mask=at < d, other=0).to(tl.float32)
        square += x * x
    tl.store(INVERSE + tl.program_id(0), tl.rsqrt(tl.maximum(tl.sum(square, 0), 1e-12)))


@triton.jit
def _match(
    X, INVERSE, CANDIDATES, TARGETS, SIZES, BEST, PARTNER, n, d, a, t, grid,
    SIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Of so many candidates the highest cosine with a target, in steps of 1 / grid, and the first target that has it."""
    batch = tl.program_id(1).to(tl.int64) * n
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = batch + tl.load(CANDIDATES + i, mask=i < a, other=0)
    own_scale = tl.load(INVERSE + own, mask=i < a, other=0)
    best, partner = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.int32)
    for first in range(0, t, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        other = batch + tl.load(TARGETS + j, mask=j < t, other=0)
        other_scale = tl.load(INVERSE + other, mask=j < t, other=0)
        scores = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, d, FEATURES):
            f = start + tl.arange(0, FEATURES)
            x = tl.load(X + own[:, None] * d + f[None, :], mask=(i[:, None] < a) & (f[None, :] < d), other=0).to(tl.float32) * own_scale[:, None]
            y = tl.load(X + other[None, :] * d + f[:, None], mask=(j[None, :] < t) & (f[:, None] < d), other=0).to(tl.float32) * other_scale[None, :]
            scores = tl.dot(x, y, scores, input_precision="ieee")
        scores = round_even(scores * grid)
        seen = j < t
        if SIZED:
            seen = seen & (tl.load(SIZES + other, mask=j < t, other=0) != 0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        top, place = tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        partner = tl.where(top > best, first + place, partner)  # the first of equals stays
        best = tl.maximum(best, top)
    if SIZED:
        best = tl.where(tl.load(SIZES + own, mask=i < a, other=1) == 0, float("inf"), best)
    row = tl.program_id(1).to(tl.int64) * a
    tl.store(BEST + row + i, best, mask=i < a)
    tl.store(PARTNER + row + i, partner, mask=i < a)


@triton.jit
def _rank(BEST, PARTNER, CANDIDATES, RANK, SOURCE, SLOT, a, r, behind, BLOCK: tl.constexpr):
    """A candidate's rank: how many are nearer to their partners, or as near and before it. The first r go."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(BEST + row * a + i, mask=i < a, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, a, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(BEST + row * a + j, mask=j < a, other=0)
        before = (other[None, :] > own[:, None]) | (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum((before & (j[None, :] < a)).to(tl.int32), 1)
    tl.store(RANK + row * a + i, rank, mask=i < a)
    gone = (i < a) & (rank < r)
    tl.store(SOURCE + row * r + rank, tl.load(CANDIDATES + i, mask=i < a, other=0), mask=gone)
    tl.store(SLOT + row * r + rank, (tl.load(PARTNER + row * a + i, mask=i < a, other=0) + behind).to(tl.int64), mask=gone)


@triton.jit
def _keep(RANK, CANDIDATES, TARGETS, KEEP, prefix, a, t, r, BLOCK: tl.constexpr):
    """The tokens that stay: the prefix, the candidates that do not go, in order, the targets."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gone = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, a, BLOCK):
        j = start + tl.arange(0, BLOCK)
        going = (tl.load(RANK + row * a + j, mask=j < a, other=0) < r) & (j < a)
        gone += tl.sum((going[None, :] & (j[None, :] < i[:, None])).to(tl.int32), 1)
    out = KEEP + row * (prefix + a - r + t)
    left = (i < a) & (tl.load(RANK + row * a + i, mask=i < a, other=0) >= r)
    tl.store(out + prefix + i - gone, tl.load(CANDIDATES + i, mask=i < a, other=0), mask=left)
    tl.store(out + i, i.to(tl.int64), mask=i < prefix)
    tl.store(out + prefix + a - r + i, tl.load(TARGETS + i, mask=i < t, other=0), mask=i < t)


def launch(
    metric: Tensor, r: int, prefix: int = 0, sizes: Tensor | None = None, candidates: Tensor | None = None, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """keep, source, slot of the op, in memory linear in the tokens."""
    batch, n, d = metric.shape
    if candidates is None or targets is None:
        candidates, targets = (torch.arange(prefix + i, n, 2, device=metric.device) for i in (0, 1))
    metric, candidates, targets = metric.contiguous(), candidates.contiguous(), targets.contiguous()
    sizes = None if sizes is None else sizes.contiguous()
    a, t = candidates.shape[0], targets.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device=metric.device)

    keep, source, slot = empty(n - r), empty(r), empty(r)
    scale, best, partner, rank = empty(n, dtype=torch.float32), empty(a, dtype=torch.float32), empty(a, dtype=torch.int32), empty(a, dtype=torch.int32)
    with torch.cuda.device_of(metric):
        _lengths[(batch * n,)](metric, scale, d, BLOCK=min(1024, triton.next_power_of_2(d)), num_warps=1)
        _match[(triton.cdiv(a, ROWS), batch)](
            metric, scale, candidates, targets, sizes, best, partner, n, d, a, t, float(GRID),
            SIZED=sizes is not None, ROWS=ROWS, COLUMNS=COLUMNS, FEATURES=FEATURES, num_warps=WARPS, num_stages=2,
        )  # fmt: skip
        _rank[(triton.cdiv(a, RANKED), batch)](best, partner, candidates, rank, source, slot, a, r, n - t - r, BLOCK=RANKED)
        _keep[(triton.cdiv(max(a, t, prefix), RANKED), batch)](rank, candidates, targets, keep, prefix, a, t, r, BLOCK=RANKED)
    return keep, source, slot


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Several tiles of candidates, of targets, of features and of ranks; equal rows across tiles; padding; targets all of padding; a long prefix; opposites."""
    yield torch.randn(1, 197, 64, dtype=dtype, device=device), 16, 1, None
    yield torch.randn(1, 240, 40, dtype=dtype, device=device), 60, 71, None
    twins = torch.randn(1, 50, 40, dtype=dtype, device=device).repeat(1, 4, 1)
    yield twins, 60, 0, None
    sizes = torch.ones(1, 200, device=device)
    sizes[0, 120:] = 0
    yield twins, 60, 1, sizes
    apart = torch.tensor([1.0, -1.0], dtype=dtype, device=device).repeat(10)[None, :, None]  # no cosine is as high as the 0 of a target that is not there
    yield apart + 0.1 * torch.randn(1, 20, 8, dtype=dtype, device=device), 4, 0, None
    yield twins[:, :6], 2, 0, torch.arange(6, device=device)[None] % 2 == 0
