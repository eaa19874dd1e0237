"""ONNX operators that work element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Number = Tensor | float | int | bool


def divide(a: Any, b: Any) -> Tensor:
    floating = any(x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float) for x in (a, b))
    a = a if isinstance(a, Tensor) else torch.full((), a, dtype=b.dtype)
    return torch.div(a, b) if floating else torch.div(a, b, rounding_mode="trunc")


def power(x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.pow(x, y)
    return torch.pow(x, y).to(x.dtype)


def modulo(a: Any, b: Any, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def add_all(*values: Any) -> Tensor:
    return reduce(torch.add, values)


def mean_of(*values: Any) -> Tensor:
    return add_all(*values) / len(values)


def maximum(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


def minimum(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


def clip(x: Tensor, low: Any = None, high: Any = None, min: float | None = None, max: float | None = None) -> Tensor:
    low, high = min if low is None else low, max if high is None else high
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, _like(low, x))
        return x if high is None else torch.minimum(x, _like(high, x))
    return torch.clamp(x, low, high)


def _like(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype)


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    return torch.where(condition, x, y)


def shift(x: Tensor, y: Tensor, direction: str) -> Tensor:
    return torch.bitwise_left_shift(x, y) if direction == "LEFT" else torch.bitwise_right_shift(x, y)


def is_infinite(x: Tensor, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    found = torch.isneginf(x) if detect_negative else torch.isposinf(x)
    return found if detect_negative or detect_positive else torch.zeros_like(x, dtype=torch.bool)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def selu(x: Tensor, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


def celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def leaky_relu(x: Tensor, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def hard_sigmoid(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def swish(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def swiglu(gate: Tensor, up: Tensor, alpha: float = 1.0) -> Tensor:
    return swish(gate, alpha) * up


def thresholded_relu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


def shrink(x: Tensor, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    kept = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return kept.to(x.dtype)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, axis: int = -1) -> Tensor:
    return F.one_hot(x.argmax(axis), x.shape[axis]).movedim(-1, axis).to(x.dtype)


def _as_matrix(function: Any) -> Any:
    """Before opset 13 these work on the input as a matrix: the axes before `axis` its rows, the others its columns."""

    def run(x: Tensor, axis: int = 1) -> Tensor:
        axis = axis % max(x.dim(), 1)
        if axis == x.dim() - 1:
            return function(x, -1)
        return function(x.flatten(axis), -1).reshape(x.shape)

    return run


softmax_matrix, log_softmax_matrix, hardmax_matrix = _as_matrix(softmax), _as_matrix(log_softmax), _as_matrix(hardmax)


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(x: Tensor, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def erf(x: Tensor) -> Tensor:
    return torch.erf(x)


WINDOWS = {"Hann": (0.5, 0.5), "Hamming": (25 / 46, 21 / 46), "Blackman": (0.42, 0.5, 0.08)}
"""sum of a_k cos(2 pi k n / N), signs alternating."""


def window(*terms: float) -> Callable[..., Tensor]:
    def run(size: list[int], output_datatype: int = 1, periodic: int = 1) -> Tensor:
        n = torch.arange(size[0], dtype=torch.float64)
        length = size[0] if periodic else size[0] - 1
        made = torch.zeros_like(n)
        for k, a in enumerate(terms):
            made = made + (-1) ** k * a * torch.cos(2 * math.pi * k * n / length)
        return made.to({1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}[output_datatype])

    return run
