"""What exporters write with several nodes and torch has in one: found on the file's nodes, run as one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shapes import Sizes
from .shapes import reshape as plain_reshape
from .table import Op

# where(isnan(softmax(x)), 0, softmax(x)): what torch's exporter writes for rows in which every key is hidden
SAFE_SOFTMAX = Op("Softmax", lambda x, axis=-1: torch.ops.aten._safe_softmax(x, axis))


def transposed_heads(source: Tensor, turned: Tensor, sizes: Sizes) -> Tensor:
    """[B, H, T, D] -> [B * H, T, D] -> [B * H, D, T] -> [B, H, D, T]: a transpose of the last two axes."""
    shape = source.shape
    if source.dim() == 4 and turned.dim() == 3 and _equal(turned.shape[1:], (shape[3], shape[2])) and _equal(sizes, (shape[0], shape[1], shape[3], shape[2])):
        return source.transpose(2, 3)
    return plain_reshape(turned, sizes)


TRANSPOSED_HEADS = Op("Reshape", transposed_heads, numbers=(2,))


def safe_softmax(node: Any) -> Any | None:
    """The Softmax node of a Where that zeroes its rows of NaN, or None."""
    if node.op_type != "Where" or node.inputs[0] is None or node.inputs[2] is None:
        return None
    nan, softmax, zero = node.inputs[0].producer(), node.inputs[2].producer(), node.inputs[1]
    if nan is None or softmax is None or nan.op_type != "IsNaN" or softmax.op_type != "Softmax" or nan.inputs[0] is not node.inputs[2]:
        return None
    if zero.const_value is None and zero.producer() is not None and zero.producer().op_type == "Constant":
        value = zero.producer().attributes.get("value")
        held = None if value is None else value.value
    else:
        held = zero.const_value
    return softmax if held is not None and held.size == 1 and float(held.numpy().reshape(-1)[0]) == 0 else None


def before_merged_transpose(node: Any) -> Any | None:
    """x of Reshape(Transpose(Reshape(x), [0, 2, 1])), or None."""
    if node.op_type != "Reshape" or node.inputs[0] is None or node.attributes.get("allowzero") is not None and node.attributes["allowzero"].value:
        return None
    turned = node.inputs[0].producer()
    if turned is None or turned.op_type != "Transpose" or "perm" not in turned.attributes or tuple(turned.attributes["perm"].value) != (0, 2, 1):
        return None
    merged = turned.inputs[0].producer()
    return merged.inputs[0] if merged is not None and merged.op_type == "Reshape" else None


def _equal(a: Sizes, b: Sizes) -> bool:
    """Whether sizes are the same numbers or the same expressions; asks the trace nothing."""
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))
