"""add_rms_norm on a GPU: the residual sum crosses memory once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rms import WIDTHS, rows


def launch(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, h of the op, of any width; x and r may broadcast and differ in dtype."""
    return rows(x, r, w, eps)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every config, ragged rows, a broadcast."""
    for d in WIDTHS:
        x, r = torch.randn(2, 2, 3, d, dtype=dtype, device=device)
        yield x, r, torch.randn(d, dtype=dtype, device=device), 1e-5
    yield r[0], x, torch.randn(d, dtype=dtype, device=device), 1e-5
