"""add_layer_norm on a CPU: the row-wise kernel of compiled programs, by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..target import cpu_features
from .compat import llvm_target, tvm
from .gemm import lanes_of
from .rows import Norm


@functools.cache
def _build(d: int, eps: float) -> Callable[..., None]:
    what = Norm(d, eps, residual=True, keep_sum=True)
    return tvm.compile(what.build(lanes_of(cpu_features()), "main"), target=llvm_target())["main"]


def launch(x: Tensor, r: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, h of the op in float32, contiguous, without a copy of contiguous operands. Compiled once a width and eps (0.05 s)."""
    if x.shape != r.shape:
        x, r = torch.broadcast_tensors(x, r)
    x, r, d = x.contiguous(), r.contiguous(), x.shape[-1]
    y, h = torch.empty_like(x), torch.empty_like(x)
    if h.numel():
        _build(d, eps)(x.view(-1, d), r.view(-1, d), w.contiguous(), b.contiguous(), y.view(-1, d), h.view(-1, d))
    return y, h


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Many rows of a ragged width, and a call that broadcasts: run beside the op's own cases."""
    x, r = torch.randn(2, 1040, 1001, dtype=dtype, device=device)
    w, b = torch.randn(2, 1001, dtype=dtype, device=device)
    yield x, r, w, b, 1e-5
    yield r[0], x[:6].view(2, 3, -1), w, b, 1e-5
