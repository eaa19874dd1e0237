"""Indices that count from the start: negative ones, which ONNX counts from the end, need no arithmetic where none can occur."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .constants import constant
from .table import Op

_KEEP = ("Identity", "Slice", "Gather", "GatherElements", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Tile", "Split", "Cast")
"""Operators whose values are some of their first input's."""
_NEVER = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")


def never_negative(value: Any) -> bool:
    """Whether an integer value of a file is known to be 0 or more wherever it is."""
    while value is not None:
        if (tensor := constant(value)) is not None:
            return tensor.dtype.is_integer() and bool((tensor.numpy() >= 0).all())
        maker = value.producer()
        if maker is None or maker.domain not in ("", "ai.onnx"):
            return False
        if maker.op_type in _NEVER:
            return True
        if maker.op_type not in _KEEP:
            return False
        value = maker.inputs[0]
    return False


def _gather_elements(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, indices.long())


GATHER_FROM_START = Op("GatherElements", _gather_elements)
