"""ONNX operators that reduce axes. `axes` is an attribute in older opsets and an input in newer ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor], identity: Any = None) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes:
            if noop_with_empty_axes:
                return function(x[None], [0], False)  # of one element each: sums stay, squares are squared
            axes = range(x.dim())
        axes = [int(a) % max(x.dim(), 1) for a in axes]
        if not axes:
            return function(x[None], [0], False)
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes if x.dim()) and identity is not None:
            kept = [1 if i in axes else s for i, s in enumerate(x.shape) if keepdims or i not in axes]
            return torch.full(kept, _lowest(identity, x.dtype), dtype=x.dtype)
        return function(x, axes, bool(keepdims)).to(x.dtype)

    return run


def _lowest(identity: str, dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return float(identity)
    if dtype == torch.bool:
        return identity == "inf"
    return torch.iinfo(dtype).max if identity == "inf" else torch.iinfo(dtype).min


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _maximum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.any(axes, keepdim=keep) if x.dtype == torch.bool else x.amax(axes, keepdim=keep)


def _minimum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.all(axes, keepdim=keep) if x.dtype == torch.bool else x.amin(axes, keepdim=keep)


def _float(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


reduce_sum = _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep))
reduce_mean = _reduction(lambda x, axes, keep: _float(x).mean(axes, keepdim=keep))
reduce_prod = _reduction(_product)
reduce_max = _reduction(_maximum, "-inf")
reduce_min = _reduction(_minimum, "inf")
reduce_l1 = _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep))
reduce_l2 = _reduction(lambda x, axes, keep: _float(x).square().sum(axes, keepdim=keep).sqrt())
reduce_log_sum = _reduction(lambda x, axes, keep: _float(x).sum(axes, keepdim=keep).log())
reduce_log_sum_exp = _reduction(lambda x, axes, keep: torch.logsumexp(_float(x), axes, keepdim=keep))
reduce_sum_square = _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep))


def _arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return function(x, axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=bool(keepdims))

    return run


arg_max, arg_min = _arg(torch.argmax), _arg(torch.argmin)
