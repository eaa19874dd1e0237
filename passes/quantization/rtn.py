"""Round to nearest: every weight alone, on the grid over its row's or group's range."""

from __future__ import annotations

from torch import Tensor

from ...ir.formats import Format, grid
from .codes import Quantized, blocks, rounded


def rtn(w: Tensor, form: Format, group_size: int = 128) -> Quantized:
    """[out, in] -> its nearest codes. No data, one pass over the weights."""
    parts = blocks(w, form, group_size)
    on = grid(parts, form)
    return Quantized(rounded(parts, on, form), on)
