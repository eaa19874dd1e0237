"""The values of a file that are known from the start: weights that no caller may replace, and Constant nodes."""

from __future__ import annotations

from typing import Any


def constant(value: Any) -> Any | None:
    """The onnx_ir tensor a value always is, or None."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value
    maker = value.producer()
    held = maker.attributes.get("value") if maker is not None and maker.op_type == "Constant" else None
    return None if held is None else held.value
