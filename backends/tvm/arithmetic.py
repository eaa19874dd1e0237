"""Elementary functions as TIR expressions of any number of lanes: TVM's own call libm for every single value.

Each takes a float32 expression, a scalar or a vector, and gives one of the same type. Errors are the largest over all of float32's
finite values, against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .compat import tvm

tirx = tvm.tirx

Expression = Any
"""A tirx.PrimExpr."""


def const(value: float, x: Expression) -> Expression:
    """A constant with the type and the lanes of an expression."""
    name, _, lanes = dtype_of(x).partition("x")
    found = tirx.const(value, name)
    return tirx.Broadcast(found, int(lanes)) if lanes else found


def dtype_of(x: Expression) -> str:
    """Its type, with its lanes behind: "float32x16"."""
    return str(x.ty.dtype)


def like(dtype: str, x: Expression) -> str:
    """A type with the lanes of an expression."""
    return "x".join([dtype, *dtype_of(x).split("x")[1:]])


def _polynomial(x: Expression, *coefficients: float) -> Expression:
    """c0 + c1 x + c2 x^2 + ... by Horner's rule."""
    found = const(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        found = found * x + const(c, x)
    return found


def exp(x: Expression) -> Expression:
    """e^x, relative error 2e-7; 0 below -87.3, about 1.7e38 above 88."""
    return tirx.Select(x < const(-87.3, x), const(0.0, x), exp_negative(tirx.min(x, const(88.0, x))))


def exp_negative(x: Expression) -> Expression:
    """e^x for x <= 0, relative error 2e-7; 1.2e-38 below -87.3."""
    # x = n ln 2 + f with |f| <= ln 2 / 2; ln 2 in two parts, so that n ln 2 keeps its last bits (Cody and Waite 1980)
    clipped = tirx.max(x, const(-87.3, x))
    n = tirx.floor(clipped * const(1 / math.log(2), x) + const(0.5, x))
    f = clipped - n * const(0.693359375, x) + n * const(2.12194440e-4, x)
    near = _polynomial(f, 1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720)
    whole = n.astype(like("int32", x))
    return near * tirx.reinterpret(dtype_of(x), tirx.shift_left(whole + const(127, whole), const(23, whole)))


def erf(x: Expression) -> Expression:
    """The error function, error 2e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size = tirx.abs(x)
    t = const(1.0, x) / (const(1.0, x) + const(0.3275911, x) * size)
    tail = t * _polynomial(t, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429) * exp_negative(-(x * x))
    found = const(1.0, x) - tail
    return tirx.Select(x < const(0.0, x), -found, found)


def sigmoid(x: Expression) -> Expression:
    """1 / (1 + e^-x)."""
    return const(1.0, x) / (const(1.0, x) + exp(-x))


def tanh(x: Expression) -> Expression:
    """tanh x, error 2e-7; near 0 a polynomial, where 1 - 2 / (e^2x + 1) cancels."""
    far = const(1.0, x) - const(2.0, x) / (exp(x + x) + const(1.0, x))
    square = x * x
    near = x * _polynomial(square, 1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)
    return tirx.Select(tirx.abs(x) < const(0.25, x), near, far)


def gelu(x: Expression) -> Expression:
    """x Phi(x) (Hendrycks and Gimpel 2016)."""
    return const(0.5, x) * x * (const(1.0, x) + erf(x * const(math.sqrt(0.5), x)))


def gelu_tanh(x: Expression) -> Expression:
    """torch's gelu(approximate="tanh"), through the sigmoid it is."""
    return x * sigmoid(x * (const(math.sqrt(8 / math.pi), x) + const(math.sqrt(8 / math.pi) * 0.044715, x) * x * x))


def silu(x: Expression) -> Expression:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def relu(x: Expression) -> Expression:
    """max(x, 0)."""
    return tirx.max(x, const(0.0, x))


def quick_gelu(x: Expression) -> Expression:
    """x sigmoid(1.702 x)."""
    return x * sigmoid(const(1.702, x) * x)


def hard_sigmoid(x: Expression) -> Expression:
    """clip((x + 3) / 6, 0, 1) (Howard et al. 2019)."""
    return tirx.min(tirx.max(x + const(3.0, x), const(0.0, x)), const(6.0, x)) * const(1 / 6, x)


def hard_swish(x: Expression) -> Expression:
    """x hard_sigmoid(x)."""
    return x * hard_sigmoid(x)


def relu6(x: Expression) -> Expression:
    """clip(x, 0, 6)."""
    return tirx.min(relu(x), const(6.0, x))


ACTIVATIONS: dict[str, Callable[[Expression], Expression]] = {
    "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "relu": relu, "tanh": tanh, "sigmoid": sigmoid, "quick_gelu": quick_gelu,
    "hard_sigmoid": hard_sigmoid, "hard_swish": hard_swish, "relu6": relu6,
}  # fmt: skip
"""What a matrix product can have in its epilogue."""
