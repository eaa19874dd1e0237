"""Root-mean-square norms of rows, of a sum or of one tensor: one program a row, read and written once while it fits in registers."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((256, 1), (1024, 4), (4096, 8), (8192, 16))
"""(widest row, num_warps): at most 16 values a thread."""
LONG_BLOCK, LONG_WARPS = 4096, 8
"""A row beyond the last config is walked in blocks of this size."""


@triton.jit
def _load(X, R, H, at, inside, ADD: tl.constexpr):
    x = tl.load(X + at, mask=inside, other=0).to(tl.float32)
    if ADD:  # rounded, as x + r is
        x = (x + tl.load(R + at, mask=inside, other=0).to(tl.float32)).to(H.dtype.element_ty)
        tl.store(H + at, x, mask=inside)
    return x.to(tl.float32)


@triton.jit
def _rows(X, R, W, Y, H, eps, d, ADD: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64) * d, tl.arange(0, BLOCK)
    f = _load(X, R, H, row + at, at < d, ADD)
    square = f * f
    for start in range(BLOCK, d, BLOCK):
        more = _load(X, R, H, row + start + at, start + at < d, ADD)
        square += more * more
    scale = tl.rsqrt(tl.sum(square) / d + eps)
    for start in range(0, d, BLOCK):
        inside = start + at < d
        if not ONE:  # the sum again, rather than read back: no thread waits for what another has stored
            f = tl.load(X + row + start + at, mask=inside, other=0).to(tl.float32)
            if ADD:
                f = (f + tl.load(R + row + start + at, mask=inside, other=0).to(tl.float32)).to(H.dtype.element_ty).to(tl.float32)
        w = tl.load(W + start + at, mask=inside, other=0).to(tl.float32)
        normal = (f * scale).to(X.dtype.element_ty if not ADD else H.dtype.element_ty).to(tl.float32)  # rounded before w, as in Llama
        tl.store(Y + row + start + at, (normal * w).to(Y.dtype.element_ty), mask=inside)


def rows(x: Tensor, r: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, h) of add_rms_norm, or with r None y of rms_norm and x."""
    if r is not None and x.shape != r.shape:
        x, r = torch.broadcast_tensors(x, r)
    x, r, w, d = x.contiguous(), None if r is None else r.contiguous(), w.contiguous(), x.shape[-1]
    h = x if r is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, r.dtype))
    y = torch.empty_like(x, dtype=torch.promote_types(h.dtype, w.dtype))
    if not y.numel():
        return y, h
    warps = next((warps for width, warps in CONFIGS if d <= width), None)
    block = LONG_BLOCK if warps is None else triton.next_power_of_2(d)
    with torch.cuda.device_of(x):
        _rows[(x.numel() // d,)](x, r, w, y, h, eps, d, ADD=r is not None, BLOCK=block, ONE=warps is not None, num_warps=warps or LONG_WARPS)
    return y, h


WIDTHS = (*(width for width, _ in CONFIGS), 1001, CONFIGS[-1][0] + 2 * LONG_BLOCK - 5)
"""Reach every config, ragged rows and long ones."""
