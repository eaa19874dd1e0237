"""Indices that count from the start: negative ones, which ONNX counts from the end, need no arithmetic where none can occur."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .table import Op

_KEEP = ("Identity", "Slice", "Gather", "GatherElements", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Tile", "Split", "Cast")
"""Operators whose values are some of their first input's."""
_NEVER = ("Shape", "Size", "NonZero", "ArgMax", "ArgMin")


def never_negative(value: Any) -> bool:
    """Whether an integer value of a file is known to be 0 or more wherever it is."""
    while value is not None:
        if value.const_value is not None and not value.is_graph_input():
            return _is_positive(value.const_value)
        maker = value.producer()
        if maker is None or maker.domain not in ("", "ai.onnx"):
            return False
        if maker.op_type == "Constant":
            held = maker.attributes.get("value")
            return held is not None and _is_positive(held.value)
        if maker.op_type in _NEVER:
            return True
        if maker.op_type not in _KEEP:
            return False
        value = maker.inputs[0]
    return False


def _is_positive(tensor: Any) -> bool:
    return tensor.dtype.is_integer() and bool((tensor.numpy() >= 0).all())


def _gather_elements(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, indices.long())


GATHER_FROM_START = Op("GatherElements", _gather_elements)
