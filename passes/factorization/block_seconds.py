"""How long a linear takes as two block-diagonal products against as it is: a roofline of every kernel, no device needed."""

from __future__ import annotations

import math
from typing import Any

import torch

from .block_projection import Blocks
from .predicted import kernel_seconds, product_seconds

MOST_ROWS = 1 << 20


def dense_seconds(target: Any, rows: int, blocks: Blocks, dtype: torch.dtype) -> float:
    """Predicted seconds of the product with the dense matrix, on a backends.target.Target."""
    return product_seconds(target, rows, [(blocks.inputs, blocks.outputs)], dtype)


def block_seconds(target: Any, rows: int, blocks: Blocks, dtype: torch.dtype) -> float:
    """Predicted seconds of the two products and the copies that put their results in order (specs/structured_ffn.md 6.6)."""
    first = _batched(target, rows, blocks.ins, blocks.p, blocks.q, dtype) + _copy(target, rows * blocks.middle, dtype)
    second = _batched(target, rows, blocks.outs, blocks.middle // blocks.outs, blocks.s, dtype)
    return first + second + (_copy(target, rows * blocks.outputs, dtype) if blocks.outs > 1 else 0.0)


def threshold(target: Any, blocks: Blocks, dtype: torch.dtype) -> int | None:
    """T*: the fewest rows from which on the blocks are faster (6.3); None: not within a million rows."""

    def faster(rows: int) -> bool:
        return block_seconds(target, rows, blocks, dtype) < dense_seconds(target, rows, blocks, dtype)

    high = next((1 << i for i in range(int(math.log2(MOST_ROWS)) + 1) if faster(1 << i)), None)
    if high is None or high == 1:
        return high
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


def _batched(target: Any, rows: int, batch: int, inner: int, outer: int, dtype: torch.dtype) -> float:
    moved = batch * (rows * inner + inner * outer + rows * outer) * dtype.itemsize
    return kernel_seconds(target, 2 * batch * rows * inner * outer, moved, dtype)


def _copy(target: Any, elements: int, dtype: torch.dtype) -> float:
    return kernel_seconds(target, 0, 2 * elements * dtype.itemsize, dtype)
