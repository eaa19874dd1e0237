"""Numbers known while tracing: what Shape, constants and their arithmetic give, kept as Python numbers and symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CaptureError

LARGEST = 4096  # numbers; more stay tensors

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class NeedsValue(CaptureError):
    """An operator wants as a number what only running the model would tell."""


@dataclass(frozen=True, eq=False)
class Known:
    """A small array of numbers: ints, floats and bools, or symbolic sizes.

    weight: the name of the initialiser it is, which stands for it where a tensor is wanted.
    """

    array: np.ndarray  # of objects
    dtype: torch.dtype
    weight: str | None = None

    @classmethod
    def of(cls, values: Any, dtype: torch.dtype = torch.int64) -> Known:
        """From a number or a (nested) list of numbers."""
        return cls(as_objects(values), dtype)

    @classmethod
    def from_tensor(cls, tensor: Tensor, weight: str | None = None) -> Known:
        return cls(as_objects(tensor.tolist()).reshape(tuple(tensor.shape)), tensor.dtype, weight)

    @property
    def concrete(self) -> bool:
        return not any(isinstance(v, SYMBOLIC) for v in self.array.flat)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def dim(self) -> int:
        return self.array.ndim

    def flat(self) -> list[Any]:
        return list(self.array.flat)

    def scalar(self) -> Any:
        return self.array.flat[0]

    def tensor(self) -> Tensor:
        if self.concrete:
            return torch.tensor(self.array.tolist(), dtype=self.dtype).reshape(self.shape)
        parts = [v if isinstance(v, Tensor) else torch.scalar_tensor(v, dtype=self.dtype) for v in self.array.flat]
        return torch.stack(parts).reshape(self.shape)


Value = Tensor | Known


def as_objects(values: Any) -> np.ndarray:
    """An array of objects; numpy must not look into symbolic numbers."""
    if isinstance(values, np.ndarray) and values.dtype == object:
        return values
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list | tuple):
        if any(isinstance(v, list | tuple) for v in values):
            return np.stack([as_objects(v) for v in values])
        made = np.empty(len(values), dtype=object)
        made[:] = values
        return made
    made = np.empty((), dtype=object)
    made[()] = values
    return made


def dtype_of(value: Value | int | float | bool) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor | Known) else torch.int64


# -- arithmetic on symbolic sizes -----------------------------------------------------------------------------------


def _elementwise(function: Callable[..., Any]) -> Callable[..., Known]:
    def run(*inputs: Known, **_: Any) -> Known:
        arrays = np.broadcast_arrays(*(i.array for i in inputs), subok=False)
        made = np.empty(arrays[0].shape, dtype=object)
        for at in np.ndindex(made.shape):
            made[at] = function(*(a[at] for a in arrays))
        return Known(made, inputs[0].dtype)

    return run


def _comparison(function: Callable[..., Any]) -> Callable[..., Known]:
    run = _elementwise(function)
    return lambda *inputs, **kwargs: Known(run(*inputs, **kwargs).array, torch.bool)


def _divide(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat) else a // b  # sizes are not negative


def cast_number(value: Any, dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return value != 0
    if dtype.is_floating_point:
        return torch.sym_float(value)
    return torch.sym_int(value)


def _where(condition: Known, x: Known, y: Known) -> Known:
    if not condition.concrete:
        chosen = [bool(c) for c in condition.flat()]  # the trace settles it by a guard on the sizes
        condition = Known(as_objects(chosen).reshape(condition.shape), torch.bool)
    return Known(_elementwise(lambda c, a, b: a if c else b)(condition, x, y).array, x.dtype)


def _concat(*inputs: Known, axis: int = 0) -> Known:
    return Known(np.concatenate([i.array for i in inputs], axis), inputs[0].dtype)


def _gather(x: Known, indices: Known, axis: int = 0) -> Known:
    return Known(as_objects(np.take(x.array, np.array(indices.array.tolist(), dtype=np.int64), axis)), x.dtype)


def _slice(x: Known, starts: Known, ends: Known, axes: Known | None = None, steps: Known | None = None) -> Known:
    at: list[slice] = [slice(None)] * x.dim()
    where = axes.flat() if axes else list(range(len(starts.flat())))
    for start, end, axis, step in zip(starts.flat(), ends.flat(), where, steps.flat() if steps else [1] * len(where)):
        at[axis] = slice(int(start), None if step < 0 and end < -x.shape[axis] else int(end), int(step))
    return Known(x.array[tuple(at)], x.dtype)


def _axes(axes: Known | Sequence[int] | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(axes.flat() if isinstance(axes, Known) else axes)


def _unsqueeze(x: Known, axes: Any = None) -> Known:
    return Known(np.expand_dims(x.array, _axes(axes) or ()), x.dtype)


def _squeeze(x: Known, axes: Any = None) -> Known:
    return Known(as_objects(np.squeeze(x.array, _axes(axes))), x.dtype)


def _reshape(x: Known, shape: Known, allowzero: int = 0) -> Known:
    sizes = [x.shape[i] if s == 0 and not allowzero else int(s) for i, s in enumerate(shape.flat())]
    return Known(x.array.reshape(sizes), x.dtype)


def _expand(x: Known, shape: Known) -> Known:
    return Known(np.broadcast_to(x.array, np.broadcast_shapes(x.shape, tuple(int(s) for s in shape.flat()))), x.dtype)


def _product(x: Known, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Known:
    return Known(as_objects(np.multiply.reduce(x.array, _axes(axes), keepdims=bool(keepdims))), x.dtype)


def _sum(x: Known, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Known:
    return Known(as_objects(np.add.reduce(x.array, _axes(axes), keepdims=bool(keepdims))), x.dtype)


def _cast(x: Known, to: torch.dtype, **_: Any) -> Known:
    return Known(_elementwise(lambda v: cast_number(v, to))(x).array, to)


ELEMENTWISE: dict[str, Callable[..., Known]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(lambda a, b: a % b),
    "Neg": _elementwise(lambda a: -a),
    "Min": _elementwise(lambda *v: _fold(torch.sym_min, v)),
    "Max": _elementwise(lambda *v: _fold(torch.sym_max, v)),
    "Floor": _elementwise(lambda a: torch.sym_float(math.floor(a))),
    "Ceil": _elementwise(lambda a: torch.sym_float(math.ceil(a))),
    "Sqrt": _elementwise(lambda a: torch.sym_float(a) ** 0.5),
    "Equal": _comparison(lambda a, b: a == b),
    "Less": _comparison(lambda a, b: a < b),
    "LessOrEqual": _comparison(lambda a, b: a <= b),
    "Greater": _comparison(lambda a, b: a > b),
    "GreaterOrEqual": _comparison(lambda a, b: a >= b),
    "Not": _comparison(lambda a: torch.sym_not(a)),
    "Where": _where,
    "Concat": _concat,
    "Cast": _cast,
    "Identity": lambda x: x,
}
"""Operator -> the same on numbers of which some are symbolic. On plain numbers the torch functions themselves run."""

BY_PLACE: dict[str, Callable[..., Known]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "ReduceProd": _product,
    "ReduceSum": _sum,
}
"""The same for operators whose other inputs say where: these must be plain numbers."""


def _fold(function: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result
