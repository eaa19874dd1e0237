"""add_layer_norm on a GPU: one program a row, every value read and written once while a row fits in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((256, 1), (1024, 4), (4096, 8), (8192, 16))
"""(widest row, num_warps): at most 16 values a thread."""
LONG_BLOCK, LONG_WARPS = 4096, 8
"""A row beyond the last config is walked in blocks of this size."""


@triton.jit
def _sum_of(X, R, H, at, inside):
    # float32 first: the interpreter is wrong in bf16 arithmetic. Then rounded, as x + r is.
    x = tl.load(X + at, mask=inside, other=0).to(tl.float32)
    r = tl.load(R + at, mask=inside, other=0).to(tl.float32)
    return (x + r).to(H.dtype.element_ty)


@triton.jit
def _store_y(Y, W, B, at, col, inside, normal):
    w = tl.load(W + col, mask=inside, other=0).to(tl.float32)
    b = tl.load(B + col, mask=inside, other=0).to(tl.float32)
    tl.store(Y + at, (normal * w + b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _row(X, R, W, B, Y, H, eps, d, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    inside = col < d
    at = tl.program_id(0).to(tl.int64) * d + col
    h = _sum_of(X, R, H, at, inside)
    tl.store(H + at, h, mask=inside)

    f = h.to(tl.float32)
    mean = tl.sum(f) / d
    centred = tl.where(inside, f - mean, 0.0)  # masked columns hold -mean, which is no deviation
    scale = tl.rsqrt(tl.sum(centred * centred) / d + eps)
    _store_y(Y, W, B, at, col, inside, centred * scale)


@triton.jit
def _long_row(X, R, W, B, Y, H, eps, d, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    # h is computed three times rather than read back: no thread waits for what another has stored
    row = tl.program_id(0).to(tl.int64) * d
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        col = step * BLOCK + tl.arange(0, BLOCK)
        h = _sum_of(X, R, H, row + col, col < d)
        tl.store(H + row + col, h, mask=col < d)
        total += h.to(tl.float32)
    mean = tl.sum(total) / d

    square = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        col = step * BLOCK + tl.arange(0, BLOCK)
        f = _sum_of(X, R, H, row + col, col < d).to(tl.float32)
        centred = tl.where(col < d, f - mean, 0.0)
        square += centred * centred
    scale = tl.rsqrt(tl.sum(square) / d + eps)

    for step in range(STEPS):
        col = step * BLOCK + tl.arange(0, BLOCK)
        f = _sum_of(X, R, H, row + col, col < d).to(tl.float32)
        _store_y(Y, W, B, row + col, col, col < d, (f - mean) * scale)


def launch(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, h of the op, contiguous. Any width; x and r may broadcast and differ in dtype."""
    if x.shape != r.shape:
        x, r = torch.broadcast_tensors(x, r)
    x, r, w, b, d = x.contiguous(), r.contiguous(), w.contiguous(), b.contiguous(), x.shape[-1]
    dtype = torch.promote_types(x.dtype, r.dtype)
    y, h = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    if not h.numel():
        return y, h
    grid = (h.numel() // d,)
    warps = next((warps for width, warps in CONFIGS if d <= width), None)
    with torch.cuda.device_of(h):  # Triton launches on the current device, wherever the tensors are
        if warps is None:
            _long_row[grid](x, r, w, b, y, h, eps, d, BLOCK=LONG_BLOCK, STEPS=triton.cdiv(d, LONG_BLOCK), num_warps=LONG_WARPS)  # type: ignore[call-arg]
        else:
            _row[grid](x, r, w, b, y, h, eps, d, BLOCK=triton.next_power_of_2(d), num_warps=warps)  # type: ignore[call-arg]
    return y, h


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Calls that reach every config, ragged rows, a broadcast: what is compiled offline and run beside the op's own cases."""
    for d in (*(width for width, _ in CONFIGS), 1001, CONFIGS[-1][0] + 2 * LONG_BLOCK - 5):
        x, r = torch.randn(2, 3, d, dtype=dtype, device=device) + 2  # a mean, which masked columns must not bring in
        w, b = torch.randn(2, d, dtype=dtype, device=device)
        yield x, r, w, b, 1e-5
    yield r[0], x, w, b, 1e-5
