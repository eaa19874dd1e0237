"""add_layer_norm on a CPU: one pass a row for h and its sum, one for the variance, one for y; the row stays in L1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .compat import T, llvm_target, tvm

LANES = 32
"""Independent partial sums: two AVX-512 registers hide the latency of an add; more measured slower."""

PARALLEL_FROM = 1 << 20
"""Values from which waking a second thread pays."""


@functools.cache
def _build(d: int, eps: float, parallel: bool) -> Callable[..., None]:
    rows = T.parallel if parallel else T.serial
    whole = d // LANES  # vectors a row; the columns from `tail` on are done one by one
    tail = whole * LANES

    # align=4: torch hands over views that start anywhere, and TVM's default of 64 crashes on them
    @T.prim_func
    def main(X: T.handle, R: T.handle, W: T.handle, B: T.handle, Y: T.handle, H: T.handle):
        n = T.int64()
        x = T.match_buffer(X, (n, d), "float32", align=4)
        r = T.match_buffer(R, (n, d), "float32", align=4)
        w = T.match_buffer(W, (d,), "float32", align=4)
        b = T.match_buffer(B, (d,), "float32", align=4)
        y = T.match_buffer(Y, (n, d), "float32", align=4)
        h = T.match_buffer(H, (n, d), "float32", align=4)

        @T.inline
        def clear(part, total):
            for lane in T.vectorized(LANES):
                part[lane] = T.float32(0)
            total[0] = T.float32(0)

        @T.inline
        def gather(part, total):  # as a tree: 32 dependent adds would cost as much as the row itself
            for lane in T.vectorized(16):
                part[lane] = part[lane] + part[lane + 16]
            for lane in T.vectorized(8):
                part[lane] = part[lane] + part[lane + 8]
            for lane in T.vectorized(4):
                part[lane] = part[lane] + part[lane + 4]
            for lane in T.serial(4):
                total[0] = total[0] + part[lane]

        for i in rows(n):
            part = T.alloc_buffer((LANES,), "float32", scope="local")
            mean = T.alloc_buffer((1,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")

            clear(part, mean)
            for k in T.serial(whole):
                for lane in T.vectorized(LANES):
                    h[i, k * LANES + lane] = x[i, k * LANES + lane] + r[i, k * LANES + lane]
                for lane in T.vectorized(LANES):
                    part[lane] = part[lane] + h[i, k * LANES + lane]
            for k in T.serial(d - tail):
                h[i, tail + k] = x[i, tail + k] + r[i, tail + k]
                mean[0] = mean[0] + h[i, tail + k]
            gather(part, mean)
            mean[0] = mean[0] / T.float32(d)

            clear(part, scale)
            for k in T.serial(whole):
                for lane in T.vectorized(LANES):
                    part[lane] = part[lane] + (h[i, k * LANES + lane] - mean[0]) * (h[i, k * LANES + lane] - mean[0])
            for k in T.serial(d - tail):
                scale[0] = scale[0] + (h[i, tail + k] - mean[0]) * (h[i, tail + k] - mean[0])
            gather(part, scale)
            scale[0] = T.float32(1) / T.sqrt(scale[0] / T.float32(d) + T.float32(eps))

            for k in T.serial(whole):
                for lane in T.vectorized(LANES):
                    y[i, k * LANES + lane] = (h[i, k * LANES + lane] - mean[0]) * scale[0] * w[k * LANES + lane] + b[k * LANES + lane]
            for k in T.serial(d - tail):
                y[i, tail + k] = (h[i, tail + k] - mean[0]) * scale[0] * w[tail + k] + b[tail + k]

    return tvm.compile(main, target=llvm_target())["main"]


def launch(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, h of the op in float32, contiguous, without a copy of contiguous operands. Compiled once a width and eps (0.05 s)."""
    if x.shape != r.shape:
        x, r = torch.broadcast_tensors(x, r)
    x, r, d = x.contiguous(), r.contiguous(), x.shape[-1]
    y, h = torch.empty_like(x), torch.empty_like(x)
    if h.numel():
        kernel = _build(d, eps, h.numel() >= PARALLEL_FROM and torch.get_num_threads() > 1)
        kernel(x.view(-1, d), r.view(-1, d), w.contiguous(), b.contiguous(), y.view(-1, d), h.view(-1, d))
    return y, h


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A call that runs in parallel, and one that broadcasts: run beside the op's own cases."""
    d = 1001
    x, r = torch.randn(2, PARALLEL_FROM // d + 1, d, dtype=dtype, device=device)
    w, b = torch.randn(2, d, dtype=dtype, device=device)
    yield x, r, w, b, 1e-5
    yield r[0], x[:6].view(2, 3, d), w, b, 1e-5
