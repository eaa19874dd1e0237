"""Quantized linear layers as onnxruntime and its tools write them, with several nodes or one: found on the file's nodes, run as one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .constants import constant
from .quantized import dequantize, quantize
from .table import Op

# -- what they mean -------------------------------------------------------------------------------------------------


def dynamic_linear(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """x [..., K], w: int8 or uint8 around 128 [K, N], scale: a number or [N]."""
    return torch.ops.rewright.linear_int8_dynamic(x, _signed(w).t(), scale.reshape(-1).expand(w.shape[1]), b)


def static_linear(x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, scale: Tensor, *more: Tensor | None) -> Tensor:
    """The same for a grid that is known. more: see `static_linear_of_rows`."""
    return static_linear_of_rows(x, x_scale, x_zero, w.t(), scale, *more)


def static_linear_of_rows(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    b_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
) -> Tensor:
    """x [..., K], w [N, K]: floats, or codes of their grids; b [N]: floats, or int32 codes.

    x_zero: uint8, or int8 and then 128 less. b_scale: of the codes, None for that of the sums they are added to.
    y_scale, y_zero: the grid of which codes are given, None for floats.
    """
    x = x if x.is_floating_point() else dequantize(x, x_scale, x_zero)
    scale = scale.reshape(-1).expand(w.shape[0])
    w = quantize(w, scale, axis=0, output_dtype=torch.int8) if w.is_floating_point() else _signed(w)
    if b is not None:
        b = b.reshape(-1)
        b = b if b.is_floating_point() else b.to(scale.dtype) * (x_scale.reshape(()) * scale if b_scale is None else b_scale)
    zero = x_zero if x_zero.dtype == torch.uint8 else (x_zero.to(torch.int16) + 128).to(torch.uint8)
    y = torch.ops.rewright.linear_int8_static(x, x_scale.reshape(()), zero.reshape(()), w, scale, b)
    return y if y_scale is None else quantize(y, y_scale, y_zero)


def _signed(w: Tensor) -> Tensor:
    return w if w.dtype == torch.int8 else (w.to(torch.int16) - 128).to(torch.int8)


DYNAMIC = Op("MatMulInteger", dynamic_linear)
STATIC = Op("MatMul", static_linear)
STATIC_OF_ROWS = Op("Gemm", static_linear_of_rows)


# -- where they are -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The values, as onnx_ir has them, that a layer is made of."""

    op: Op
    x: Any
    w: Any
    scale: Any
    grid: tuple[Any, Any] | None = None
    """Scale and zero point of x, None where they are found as it comes."""
    bias: Any = None
    bias_scale: Any = None
    output: tuple[Any, Any] = (None, None)
    """Scale and zero point of the output; None for floats."""

    def inputs(self) -> tuple[str | None, ...]:
        """Their names, as the function takes them."""
        values = (self.x, self.w, self.scale, self.bias)
        if self.grid is not None:
            values = (self.x, *self.grid, self.w, self.scale, self.bias, self.bias_scale, *self.output)
        return tuple(None if v is None else v.name for v in values)


def quantized_linear(node: Any) -> Layer | None:
    """The linear layer that ends in this node, or None: 8-bit weights that are constants around zero, a scale for all or one a channel.

    From onnxruntime's quantize_dynamic: Mul(Cast(MatMulInteger(DynamicQuantizeLinear(x), w)), Mul(step, scale)), then perhaps Add(bias).
    From its quantize_static: MatMul or Gemm of two DequantizeLinear ("QDQ"), QLinearMatMul or QGemm ("QOperator").
    From its optimizer, and from our exporter: DynamicQuantizeMatMul, MatMulIntegerToFloat.
    """
    find = _FINDERS.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    return None if find is None else find(node)


def _add(node: Any) -> Layer | None:
    for product, bias in (node.inputs, reversed(node.inputs)):
        maker, held = _producer(product), _held(bias)
        if held is None or held.ndim != 1 or maker is None or maker.op_type not in ("Mul", "MatMul") or len(product.uses()) > 1:
            continue
        if (layer := quantized_linear(maker)) is not None and held.shape == _held(layer.w).shape[1:]:
            return replace(layer, bias=bias)
    return None


def _mul(node: Any) -> Layer | None:
    return _scaled(*node.inputs) or _scaled(*reversed(node.inputs))


def _scaled(product: Any, steps: Any) -> Layer | None:
    cast, scales = _maker(product, "Cast"), _maker(steps, "Mul")
    integer = _maker(cast and cast.inputs[0], "MatMulInteger")
    if scales is None or integer is None or cast.attributes["to"].value != 1:
        return None
    codes, w, zero, w_zero = _padded(integer.inputs, 4)
    for step, scale in (scales.inputs, reversed(scales.inputs)):
        if (x := _quantized_as_it_comes(codes, step, zero)) is not None and _is_symmetric(w, w_zero, scale, 1):
            return Layer(DYNAMIC, x, w, scale)
    return None


def _dynamic_quantize_matmul(node: Any) -> Layer | None:
    x, w, scale, w_zero, bias = _padded(node.inputs, 5)
    return Layer(DYNAMIC, x, w, scale, bias=bias) if _is_symmetric(w, w_zero, scale, 1) and _is_bias(bias, w, 1) else None


def _matmul_integer_to_float(node: Any) -> Layer | None:
    codes, w, step, scale, zero, w_zero, bias = _padded(node.inputs, 7)
    if not _is_symmetric(w, w_zero, scale, 1) or not _is_bias(bias, w, 1):
        return None
    if (x := _quantized_as_it_comes(codes, step, zero)) is not None:
        return Layer(DYNAMIC, x, w, scale, bias=bias)
    x = _before(codes, step, zero)
    return Layer(STATIC, x, w, scale, (step, zero), bias) if x is not codes and _is_grid(step, zero) else None


def _matmul(node: Any) -> Layer | None:
    a, w = node.inputs
    return _of_floats(a, w, channels=1)


def _gemm(node: Any) -> Layer | None:
    a, w, bias = _padded(node.inputs, 3)
    channels = 0 if _number(node, "transB", 0) else 1
    layer = _of_floats(a, w, channels=channels) if _is_plain(node) else None
    if layer is None or _is_bias(bias, layer.w, channels):
        return layer and replace(layer, bias=bias)
    codes = _maker(bias, "DequantizeLinear")
    if codes is None or not _is_bias(codes.inputs[0], layer.w, channels) or _held(codes.inputs[1]).size not in (1, _held(codes.inputs[0]).size):
        return None
    zero = _padded(codes.inputs, 3)[2]
    return replace(layer, bias=codes.inputs[0], bias_scale=codes.inputs[1]) if zero is None or not _held(zero).any() else None


def _of_floats(a: Any, b: Any, channels: int) -> Layer | None:
    """The product of two DequantizeLinear, the first behind a QuantizeLinear of the same grid. channels: the axis of w [K, N] or [N, K]."""
    activations, weights = _maker(a, "DequantizeLinear"), _maker(b, "DequantizeLinear")
    if activations is None or weights is None or "block_size" in weights.attributes:
        return None
    codes, step, zero = _padded(activations.inputs, 3)
    w, scale, w_zero = _padded(weights.inputs, 3)
    if (pair := _maker(w, "QuantizeLinear")) is not None and _number(pair, "axis", 1) == _number(weights, "axis", 1):
        w = _before(w, scale, w_zero)  # floats: what training with quantization in mind leaves
    held, axis, x = _held(scale), _number(weights, "axis", 1), _before(codes, step, zero)
    if x is codes or not _is_grid(step, zero) or held is None or held.size > 1 and axis not in (channels, channels - 2):
        return None
    if not _is_symmetric(w, w_zero, scale, channels):
        return None
    return Layer(STATIC_OF_ROWS if channels == 0 else STATIC, x, w, scale, (step, zero))


def _qlinear_matmul(node: Any) -> Layer | None:
    a, step, zero, w, scale, w_zero, *output = node.inputs
    if not _is_grid(step, zero) or not _is_symmetric(w, w_zero, scale, 1) or not _is_grid(*output):
        return None
    return Layer(STATIC, _before(a, step, zero), w, scale, (step, zero), output=(output[0], output[1]))


def _qgemm(node: Any) -> Layer | None:
    a, step, zero, w, scale, w_zero, bias, *output = _padded(node.inputs, 9)
    channels = 0 if _number(node, "transB", 0) else 1
    if not _is_plain(node) or not _is_grid(step, zero) or not _is_symmetric(w, w_zero, scale, channels) or not _is_bias(bias, w, channels):
        return None
    if output[0] is not None and not _is_grid(*output):
        return None
    op = STATIC_OF_ROWS if channels == 0 else STATIC
    return Layer(op, _before(a, step, zero), w, scale, (step, zero), bias, output=(output[0], output[1]))


_FINDERS: dict[tuple[str, str], Callable[[Any], Layer | None]] = {
    ("", "Add"): _add,
    ("", "Mul"): _mul,
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "QLinearMatMul"): _qlinear_matmul,
    ("com.microsoft", "QGemm"): _qgemm,
    ("com.microsoft", "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): _matmul_integer_to_float,
}


# -- what must hold -------------------------------------------------------------------------------------------------


def _is_symmetric(w: Any, zero: Any, scale: Any, channels: int) -> bool:
    """Whether weights are constant 8-bit codes with their zero in the middle, or floats that become int8, and one scale or one an index of `channels`."""
    codes, zeros, held = _held(w), _held(zero), _held(scale)
    if codes is None or held is None or codes.ndim != 2 or held.size not in (1, codes.shape[channels]):
        return False
    kinds = (str(codes.dtype), None if zeros is None else str(zeros.dtype))
    if kinds not in (("int8", "int8"), ("uint8", "uint8"), ("float32", "int8")):
        return kinds == ("int8", None) and zero is None
    return bool((zeros == (128 if kinds[1] == "uint8" else 0)).all())


def _is_bias(bias: Any, w: Any, channels: int) -> bool:
    """Whether it is missing, or a constant number a channel."""
    held = _held(bias)
    return bias is None or held is not None and held.shape in ((_held(w).shape[channels],), (1, _held(w).shape[channels]))


def _is_grid(scale: Any, zero: Any) -> bool:
    """Whether it is one constant grid of 8-bit codes."""
    step, origin = _held(scale), _held(zero)
    return step is not None and step.size == 1 and origin is not None and origin.size == 1 and str(origin.dtype) in ("uint8", "int8")


def _is_plain(node: Any) -> bool:
    """Whether a Gemm adds the product itself of what it is given to the whole bias."""
    return not _number(node, "transA", 0) and _number(node, "alpha", 1.0) == _number(node, "beta", 1.0) == 1


def _quantized_as_it_comes(codes: Any, step: Any, zero: Any) -> Any:
    """The x of which a DynamicQuantizeLinear made these three, or None."""
    maker = _maker(codes, "DynamicQuantizeLinear")
    return maker.inputs[0] if maker is not None and all(a is b for a, b in zip(maker.outputs, (codes, step, zero))) else None


def _before(codes: Any, step: Any, zero: Any) -> Any:
    """The x that a QuantizeLinear made these codes of, with the same grid; the codes where there is none."""
    maker = _maker(codes, "QuantizeLinear")
    return maker.inputs[0] if maker is not None and all(_same(a, b) for a, b in zip(_padded(maker.inputs, 3)[1:], (step, zero))) else codes


def _padded(values: Any, count: int) -> list[Any]:
    """A node's inputs, those it leaves out as None."""
    return [*values, *[None] * (count - len(values))]


def _number(node: Any, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default


def _producer(value: Any) -> Any:
    return None if value is None else value.producer()


def _maker(value: Any, op_type: str) -> Any:
    """The node that makes a value, if it is of this type, or None."""
    maker = _producer(value)
    return maker if maker is not None and maker.op_type == op_type and maker.domain in ("", "com.microsoft") else None


def _held(value: Any) -> Any:
    """A constant's numbers, or None."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def _same(a: Any, b: Any) -> bool:
    x, y = _held(a), _held(b)
    return a is b or x is not None and y is not None and x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())
