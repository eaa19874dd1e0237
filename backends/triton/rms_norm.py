"""rms_norm on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._rms import WIDTHS, rows


def launch(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """y of the op, of any width."""
    return rows(x, None, w, eps)[0]


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Every config, ragged rows, a weight of another dtype."""
    for d in WIDTHS:
        yield torch.randn(2, 3, d, dtype=dtype, device=device), torch.randn(d, dtype=dtype, device=device), 1e-5
    yield torch.randn(3, 40, dtype=dtype, device=device), torch.randn(40, device=device), 1e-5
