"""Ops that compute each value of the result from one value of every operand, as expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import arguments
from . import arithmetic
from .compat import tvm

tirx = tvm.tirx
aten, ours = torch.ops.aten, torch.ops.rewright

TYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.int64: "int64", torch.int32: "int32", torch.int16: "int16",
    torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip
"""What a value may be; half precision is computed by nobody here."""

Point = Callable[..., Any]


def constant(value: Any, dtype: str) -> Any:
    """A Python number or an expression as an expression of a dtype."""
    if isinstance(value, bool | int | float):
        if dtype == "bool":
            return tirx.const(bool(value), "bool")
        if isinstance(value, float) and math.isinf(value) and dtype.startswith("float"):
            return tirx.const(value, dtype)
        return tirx.const(float(value) if dtype.startswith("float") else int(value), dtype)
    return value if arithmetic.dtype_of(value) == dtype else value.astype(dtype)


def _sign(x: Any) -> Any:
    zero, one = (constant(n, arithmetic.dtype_of(x)) for n in (0, 1))
    return tirx.Select(x > zero, one, tirx.Select(x < zero, -one, zero))


def _accurate(ours_: Point, theirs: Point) -> Point:
    """Our fast function in float32, TVM's in float64."""
    return lambda x: ours_(x) if arithmetic.dtype_of(x) == "float32" else theirs(x)


def _power(x: Any, y: Any) -> Any:
    exponent = float(y.value) if hasattr(y, "value") else None
    if exponent is not None and exponent == int(exponent) and 1 <= exponent <= 4:
        found = x
        for _ in range(int(exponent) - 1):
            found = found * x
        return found
    return (
        tirx.rsqrt(x)
        if exponent == -0.5
        else tirx.sqrt(x)
        if exponent == 0.5
        else tirx.const(1, "float32").astype(arithmetic.dtype_of(x)) / x
        if exponent == -1
        else tirx.pow(x, y)
    )


exp = _accurate(arithmetic.exp, tirx.exp)

UNARY: dict[Any, Point] = {
    aten.neg.default: lambda x: -x,
    aten.abs.default: tirx.abs,
    aten.exp.default: exp,
    aten.log.default: tirx.log,
    aten.sqrt.default: tirx.sqrt,
    aten.rsqrt.default: tirx.rsqrt,
    aten.sin.default: tirx.sin,
    aten.cos.default: tirx.cos,
    aten.tanh.default: _accurate(arithmetic.tanh, tirx.tanh),
    aten.sigmoid.default: _accurate(arithmetic.sigmoid, tirx.sigmoid),
    aten.erf.default: _accurate(arithmetic.erf, tirx.erf),
    aten.relu.default: lambda x: tirx.max(x, constant(0, arithmetic.dtype_of(x))),
    aten.silu.default: arithmetic.silu,
    ours.quick_gelu.default: arithmetic.quick_gelu,
    aten.sign.default: _sign,
    aten.log1p.default: tirx.log1p,
    aten.hardsigmoid.default: arithmetic.hard_sigmoid,
    aten.hardswish.default: arithmetic.hard_swish,
    aten.relu6.default: arithmetic.relu6,
    aten.trunc.default: tirx.trunc,
    aten.floor.default: tirx.floor,
    aten.ceil.default: tirx.ceil,
    aten.reciprocal.default: lambda x: constant(1, arithmetic.dtype_of(x)) / x,
    aten.logical_not.default: lambda x: tirx.Not(x.astype("bool")),
    aten.bitwise_not.default: lambda x: tirx.Not(x) if arithmetic.dtype_of(x) == "bool" else tirx.bitwise_not(x),
}

BINARY: dict[str, Point] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": tirx.div,
    "pow": _power,
    "maximum": tirx.max,
    "minimum": tirx.min,
    "max": tirx.max,
    "min": tirx.min,
    "floor_divide": lambda x, y: tirx.floor(x / y) if arithmetic.dtype_of(x).startswith("float") else tirx.floordiv(x, y),
    "remainder": lambda x, y: x - tirx.floor(x / y) * y if arithmetic.dtype_of(x).startswith("float") else tirx.floormod(x, y),
    "eq": lambda x, y: x.equal(y),
    "ne": lambda x, y: tirx.NE(x, y),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "logical_and": tirx.And,
    "logical_or": tirx.Or,
    "bitwise_and": lambda x, y: tirx.And(x, y) if arithmetic.dtype_of(x) == "bool" else tirx.bitwise_and(x, y),
    "bitwise_or": lambda x, y: tirx.Or(x, y) if arithmetic.dtype_of(x) == "bool" else tirx.bitwise_or(x, y),
    "__and__": lambda x, y: tirx.And(x, y) if arithmetic.dtype_of(x) == "bool" else tirx.bitwise_and(x, y),
    "__or__": lambda x, y: tirx.Or(x, y) if arithmetic.dtype_of(x) == "bool" else tirx.bitwise_or(x, y),
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
LOGICAL = {"logical_and", "logical_or"}
CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default}


SPECIAL = {aten.gelu.default, aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.clamp.default}


def why_not(node: fx.Node) -> str | None:
    """Why a node can't be computed here, or None."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return "its result is no tensor"
    target = node.target
    if target in UNARY or target in CASTS or target in SPECIAL:
        return None
    if not isinstance(target, torch._ops.OpOverload) or target._overloadname not in ("Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor", "default", "other"):
        return f"{target} is not known"
    name = target._schema.name.split("::")[1]
    name = "sub" if name == "rsub" else name
    if name not in BINARY or target._schema.is_mutable or len(arguments(node)) > 3:
        return f"{target} is not known"
    return None


def of(node: fx.Node) -> tuple[Point, list[Any]]:
    """(a function of one value of every operand, the operands: nodes or numbers)."""
    a, out = arguments(node), TYPES[node.meta["val"].dtype]
    target, floating = node.target, TYPES[node.meta["val"].dtype].startswith("float")
    operands = list(a.values())
    if target in CASTS:
        return (lambda x: cast(x, out)), [operands[0]]
    if target is aten.gelu.default:
        return (arithmetic.gelu_tanh if a["approximate"] == "tanh" else arithmetic.gelu), operands[:1]
    if target in UNARY:
        return (lambda x: UNARY[target](constant(x, out) if floating else x)), operands[:1]
    if target in (aten.where.self, aten.where.ScalarOther):
        return (lambda c, x, y: tirx.Select(c, constant(x, out), constant(y, out))), operands
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return (lambda x, m, v: tirx.Select(m, constant(v, out), constant(x, out))), operands
    if target is aten.clamp.default:
        low, high = a["min"], a["max"]

        def clamp(x: Any) -> Any:
            x = x if low is None else tirx.max(x, constant(low, out))
            return x if high is None else tirx.min(x, constant(high, out))

        return clamp, operands[:1]
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.split("::")[1]
    if name in LOGICAL:
        return (lambda x, y: BINARY[name](constant(x, "bool"), constant(y, "bool"))), operands[:2]
    kind = _common(operands[:2]) if name in COMPARISONS else out
    alpha = a.get("alpha", 1)
    if name == "rsub":  # y - alpha x
        name, operands = "sub", operands[1::-1]

    def both(x: Any, y: Any) -> Any:
        y = constant(y, kind)
        return BINARY[name](constant(x, kind), y if alpha == 1 else y * constant(alpha, kind))

    return both, operands[:2]


def cast(x: Any, dtype: str) -> Any:
    """x in a dtype; a number is true where it is not 0."""
    return tirx.NE(x, constant(0, arithmetic.dtype_of(x))) if dtype == "bool" and arithmetic.dtype_of(x) != "bool" else constant(x, dtype)


def _common(operands: list[Any]) -> str:
    """The type two operands are compared in."""
    found = [o.meta["val"] if isinstance(o, fx.Node) else o for o in operands]
    found = [0 if isinstance(v, torch.SymInt) else v for v in found]
    return TYPES[torch.result_type(*found)]
