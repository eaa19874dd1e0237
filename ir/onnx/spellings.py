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


# -- quantized linear layers ----------------------------------------------------------------------------------------


def dynamic_linear(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """x [..., K], w: int8 or uint8 around 128 [K, N], scale: a number or [N]."""
    return torch.ops.rewright.linear_int8_dynamic(x, _signed(w).t(), _by_channel(scale, w), b)


def static_linear(x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """The same for a grid that is known: x_zero is uint8, or int8 and then 128 less."""
    zero = x_zero if x_zero.dtype == torch.uint8 else (x_zero.to(torch.int16) + 128).to(torch.uint8)
    return torch.ops.rewright.linear_int8_static(x, x_scale.reshape(()), zero.reshape(()), _signed(w).t(), _by_channel(scale, w), b)


def _signed(w: Tensor) -> Tensor:
    return w if w.dtype == torch.int8 else (w.to(torch.int16) - 128).to(torch.int8)


def _by_channel(scale: Tensor, w: Tensor) -> Tensor:
    return scale.reshape(-1).expand(w.shape[1])


DYNAMIC_LINEAR = Op("MatMulInteger", dynamic_linear)
STATIC_LINEAR = Op("MatMul", static_linear)


def quantized_linear(node: Any) -> tuple[Op, tuple[str, ...]] | None:
    """The function and the names of the inputs of a linear layer that ends in this node, with or without the Add of its bias, or None.

    Mul(Cast(MatMulInteger(DynamicQuantizeLinear(x), w)), Mul(step, scale)): what onnxruntime's quantize_dynamic writes.
    MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(w)): what its quantize_static writes, in the QDQ format.
    """
    if node.op_type == "Add" and not node.domain:
        for product, bias in (node.inputs, reversed(node.inputs)):
            held, maker = _held(bias), _producer(product)
            if maker is not None and held is not None and held.ndim == 1 and len(product.uses()) == 1 and (found := quantized_linear(maker)) is not None:
                weight = held_weight(maker, found[1])
                if len(found[1]) in (3, 5) and weight is not None and held.shape == weight.shape[1:]:
                    return found[0], (*found[1], bias.name)
        return None
    if node.op_type == "Mul" and not node.domain:
        return _dynamic(*node.inputs) or _dynamic(*reversed(node.inputs))
    return _static(node) if node.op_type == "MatMul" and not node.domain else None


def held_weight(node: Any, names: tuple[str, ...]) -> Any | None:
    """The 8-bit weight of a layer that `quantized_linear` found, by its name."""
    found, todo = None, [v for v in node.inputs if v is not None]
    while todo and found is None:
        value = todo.pop()
        if value.name in names and (held := _held(value)) is not None and held.ndim == 2:
            found = held
        elif value.producer() is not None and value.producer().op_type in ("Cast", "MatMulInteger", "DequantizeLinear"):
            todo += [v for v in value.producer().inputs if v is not None]
    return found


def _dynamic(product: Any, steps: Any) -> tuple[Op, tuple[str, ...]] | None:
    cast, scales = _maker(product, "Cast"), _maker(steps, "Mul")
    integer = _maker(cast and cast.inputs[0], "MatMulInteger")
    if scales is None or integer is None or len(integer.inputs) < 3 or cast.attributes["to"].value != 1:
        return None
    codes, w = integer.inputs[:2]
    quantize = _maker(codes, "DynamicQuantizeLinear")
    if quantize is None or codes is not quantize.outputs[0] or integer.inputs[2] is not quantize.outputs[2]:
        return None
    scale: Any = next((b for a, b in (scales.inputs, reversed(scales.inputs)) if a is quantize.outputs[1]), None)
    if not _symmetric(w, integer.inputs[3] if len(integer.inputs) > 3 else None, scale):
        return None
    return DYNAMIC_LINEAR, (quantize.inputs[0].name, w.name, scale.name)


def _static(node: Any) -> tuple[Op, tuple[str, ...]] | None:
    activations, weights = (_maker(v, "DequantizeLinear") for v in node.inputs)
    quantize = _maker(activations and activations.inputs[0], "QuantizeLinear")
    if quantize is None or weights is None or len(quantize.inputs) < 3 or len(activations.inputs) < 3:
        return None
    step, zero = (_held(v) for v in quantize.inputs[1:3])
    if step is None or zero is None or step.size != 1 or str(zero.dtype) not in ("uint8", "int8") or "block_size" in weights.attributes:
        return None
    if any(not _same(a, b) for a, b in zip(quantize.inputs[1:3], activations.inputs[1:3])):
        return None
    w, scale = weights.inputs[:2]
    held = _held(scale)
    axis = weights.attributes["axis"].value if "axis" in weights.attributes else 1
    if held is None or held.size > 1 and axis not in (1, -1) or not _symmetric(w, weights.inputs[2] if len(weights.inputs) > 2 else None, scale):
        return None
    return STATIC_LINEAR, (quantize.inputs[0].name, quantize.inputs[1].name, quantize.inputs[2].name, w.name, scale.name)


def _producer(value: Any) -> Any:
    return None if value is None else value.producer()


def _maker(value: Any, op_type: str) -> Any:
    """The node that makes a value, if it is of this type, or None."""
    maker = _producer(value)
    return maker if maker is not None and maker.op_type == op_type and maker.domain in ("", "com.microsoft") else None


def _held(value: Any) -> Any:
    """A constant's numbers, or None."""
    if value is None:
        return None
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value.numpy()
    maker = value.producer()
    held = maker.attributes.get("value") if maker is not None and maker.op_type == "Constant" else None
    return None if held is None else held.value.numpy()


def _same(a: Any, b: Any) -> bool:
    x, y = _held(a), _held(b)
    return a is b or x is not None and y is not None and x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())


def _symmetric(w: Any, zero: Any, scale: Any) -> bool:
    """Whether 8-bit weights [K, N] have their zero in the middle, and one scale or one a column."""
    codes, zeros, held = _held(w), _held(zero), _held(scale)
    if codes is None or held is None or codes.ndim != 2 or str(codes.dtype) not in ("int8", "uint8") or held.size not in (1, codes.shape[1]):
        return False
    if zeros is None:
        return zero is None and str(codes.dtype) == "int8"
    return bool((zeros == (0 if str(codes.dtype) == "int8" else 128)).all())
