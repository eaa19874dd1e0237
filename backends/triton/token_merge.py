"""token_merge on a GPU: one program a token that stays, which looks up who joins it and adds them in their order, without atomics."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 256
"""Most places of tokens that go which a program looks through at a time."""


@triton.jit
def _size(SIZES, at, SIZED: tl.constexpr):
    return tl.load(SIZES + at).to(tl.float32) if SIZED else at.to(tl.float32) * 0 + 1


@triton.jit
def _merge(X, KEEP, SOURCE, SLOT, SIZES, Y, T, n, c, m, r, SIZED: tl.constexpr, MLERP: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    place, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK)
    stays = batch * n + tl.load(KEEP + batch * m + place)
    stay = tl.load(X + stays * c + col, mask=col < c, other=0).to(tl.float32)
    heavy = _size(SIZES, stays, SIZED)
    total = heavy
    for first in range(0, r, SLOTS):
        s = first + tl.arange(0, SLOTS)
        joins = tl.load(SLOT + batch * r + s, mask=s < r, other=-1) == place
        if SIZED:
            size = tl.load(SIZES + batch * n + tl.load(SOURCE + batch * r + s, mask=joins, other=0), mask=joins, other=0).to(tl.float32)
        else:
            size = joins.to(tl.float32)
        total += tl.sum(size, 0)
    share = 1 / tl.where(total > 0, total, 1.0)
    y, norm = stay, 0.0
    if MLERP:
        norm = tl.where((heavy > 0) | (total == 0), tl.sqrt(tl.sum(stay * stay, 0)), 0.0)
    for first in range(0, r, SLOTS):
        s = first + tl.arange(0, SLOTS)
        joins = tl.load(SLOT + batch * r + s, mask=s < r, other=-1) == place
        last = -1
        for _ in range(tl.sum(joins.to(tl.int32), 0)):
            last = tl.min(tl.where(joins & (s > last), s, first + SLOTS), 0)
            goes = batch * n + tl.load(SOURCE + batch * r + last)
            x = tl.load(X + goes * c + col, mask=col < c, other=0).to(tl.float32)
            light = _size(SIZES, goes, SIZED)
            y += (x - stay) * (light * share)
            if MLERP:
                norm = tl.maximum(norm, tl.where(light > 0, tl.sqrt(tl.sum(x * x, 0)), 0.0))
    if MLERP:
        y *= norm / tl.maximum(tl.sqrt(tl.sum(y * y, 0)), 1e-12)
    tl.store(Y + (batch * m + place) * c + col, y.to(Y.dtype.element_ty), mask=col < c)
    tl.store(T + batch * m + place, total)


def launch(x: Tensor, keep: Tensor, source: Tensor, slot: Tensor, sizes: Tensor | None = None, mlerp: bool = False) -> tuple[Tensor, Tensor]:
    """y, t of the op."""
    (batch, n, c), m, r = x.shape, keep.shape[1], source.shape[1]
    x, keep, source, slot = (t.contiguous() for t in (x, keep, source, slot))
    sizes = None if sizes is None else sizes.contiguous()
    y, total = torch.empty(batch, m, c, dtype=x.dtype, device=x.device), torch.empty(batch, m, dtype=torch.float32, device=x.device)
    block, slots = triton.next_power_of_2(c), min(SLOTS, triton.next_power_of_2(max(r, 1)))
    with torch.cuda.device_of(x):
        _merge[(m, batch)](
            x, keep, source, slot, sizes, y, total, n, c, m, r,
            SIZED=sizes is not None, MLERP=mlerp, SLOTS=slots, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return y, total


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Several blocks of slots, wide and narrow tokens, sizes and none, both means."""
    for b, n, c, r, sized, mlerp in [(1, 40, 768, 16, True, False), (1, 9, 3000, 4, True, True), (2, 12, 40, 6, False, False)]:
        order = torch.arange(n, device=device).expand(b, n)
        keep, source = order[:, r:], order[:, :r]
        slot = torch.randint(n - r, (b, r), device=device)
        yield torch.randn(b, n, c, dtype=dtype, device=device), keep, source, slot, torch.rand(b, n, device=device) + 0.5 if sized else None, mlerp
    n, r = SLOTS + 20, SLOTS + 10
    order = torch.arange(n, device=device)[None]
    yield torch.randn(1, n, 16, dtype=dtype, device=device), order[:, r:], order[:, :r], torch.randint(10, (1, r), device=device), None, True
