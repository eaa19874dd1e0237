"""aten.sort.stable, which the exporter does not know, as TopK of all: among equal values the lower index comes first."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

op: Any = opset18  # its signatures call every result Optional


def translate(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """x: at least one axis -> its values in order, and their indices."""
    axis = dim % len(x.shape)
    count = op.Shape(x, start=axis, end=axis + 1)
    return op.TopK(x, count, axis=axis, largest=int(descending), sorted=1)
