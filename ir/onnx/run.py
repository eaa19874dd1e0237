"""One node of a file, run: its inputs as its torch function takes them, numbers computed ahead, unsigned arithmetic on wider integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import table
from .values import LARGEST, Known, NeedsValue, Value


@dataclass(frozen=True)
class Step:
    """One node of the file, ready to run."""

    op: table.Op
    label: str
    """As in "MatMul node 'encoder/q'", for messages."""
    inputs: tuple[str | None, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[str | None, ...]
    layer: str
    """The module it came from, as far as the file says."""


def arguments(step: Step, inputs: list[Any], tensor: Any) -> list[Any]:
    """The node's inputs as its function takes them: lists of numbers, scalars, `Known` or tensors."""
    op = step.op
    some_tensor = any(isinstance(v, Tensor) for v in inputs)
    made = []
    for i, v in enumerate(inputs):
        if v is None:
            made.append(None)
        elif i in op.numbers:
            made.append(_numbers(v, i))
        elif i in op.known and isinstance(v, Known):
            made.append(v)
        elif op.scalars and some_tensor and isinstance(v, Known) and v.array.size == 1 and _lends_itself(v, inputs):
            made.append(v.scalar())
        else:
            made.append(tensor(v))
    return made


_UNSIGNED = (torch.uint16, torch.uint32)
_WIDENED = {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "BitShift", "BitwiseNot", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Clip"}


def run_op(step: Step, given: list[Any]) -> Any:
    """The step's function; arithmetic on unsigned integers, which torch has little of, runs on wider ones."""
    if step.op.name in _WIDENED and any(isinstance(v, Tensor) and v.dtype == torch.uint64 for v in given):
        raise NeedsValue("it computes with unsigned 64-bit integers, which torch does not")
    narrow = next((v.dtype for v in given if isinstance(v, Tensor) and v.dtype in _UNSIGNED), None)
    if narrow is None or step.op.name not in _WIDENED:
        return step.op.function(*given, **step.attributes)
    made = step.op.function(*(v.to(torch.int64) if isinstance(v, Tensor) and v.dtype == narrow else v for v in given), **step.attributes)
    return made.to(narrow) if made.dtype == torch.int64 else made


def _numbers(value: Value, index: int) -> list[Any]:
    if isinstance(value, Known):
        return value.flat()
    raise NeedsValue(f"its input {index} is computed from data, and must be known while tracing")


def _lends_itself(value: Known, inputs: list[Any]) -> bool:
    """Whether a single number as a Python scalar gives the tensors' own shape and dtype."""
    tensors = [v for v in inputs if isinstance(v, Tensor) and v.dtype != torch.bool or isinstance(v, Tensor) and len(inputs) == 2]
    rank = max((v.dim() for v in tensors), default=0)
    return bool(tensors) and value.dim() <= rank and all(v.dtype == value.dtype for v in tensors)


def stays_small(op: table.Op, inputs: list[Any]) -> bool:
    """Whether the output of an operator that grows its input has few numbers for certain."""
    if op.name == "Range":
        start, limit, delta = (v.scalar() for v in inputs)
        return delta != 0 and (limit - start) / delta <= LARGEST
    if op.name not in ("ConstantOfShape", "Expand", "Tile"):
        return False
    numbers = math.prod(max(n, 1) for n in inputs[op.numbers[0]].flat())
    return numbers * (1 if op.name == "ConstantOfShape" else inputs[0].array.size) <= LARGEST


def ahead(step: Step, inputs: list[Any]) -> tuple[Known, ...] | None:
    """The node's outputs, computed now because all inputs are plain numbers; None if they are too many to carry as such."""
    with _disable_current_modes(), torch.no_grad():
        made = run_op(step, arguments(step, inputs, lambda v: v.tensor() if isinstance(v, Known) else v))
    outputs = tuple(made) if isinstance(made, tuple | list) else (made,)
    if any(isinstance(v, Tensor) and (v.numel() > LARGEST or v.dtype.itemsize == 1 and v.is_floating_point() or v.is_complex()) for v in outputs):
        return None
    return tuple(Known.from_tensor(v) if isinstance(v, Tensor) else v for v in outputs)
