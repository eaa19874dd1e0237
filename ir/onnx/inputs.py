"""The inputs a file declares: legal names, dynamic dims by their names, and example sizes for them."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputFileError
from .model import NIBBLES, torch_dtype


@dataclass(frozen=True)
class Input:
    """One input of the file."""

    name: str  # a legal Python name
    original: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


def declared_inputs(model: Any, file: str, notes: list[str]) -> dict[str, Input]:
    """The inputs of an onnx_ir.Model by their legal names. notes: what a user should know of them is added.

    Raises InputFileError for what torch has no tensors of.
    """
    inputs: dict[str, Input] = {}
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue  # before IR 4 weights are inputs with a default
        what = f"the input {value.name!r}"
        if value.dtype is not None and int(value.dtype) in NIBBLES:
            raise InputFileError(f"{file}: {what} is of 4-bit integers, which torch has no tensors of")
        if value.dtype is None or value.shape is None:
            raise InputFileError(f"{file}: {what} has no {'type' if value.dtype is None else 'shape'}; rewright reads tensors of known rank")
        new = legal(value.name, set(inputs), dots=False)
        shape = tuple(d if isinstance(d, int) else str(d.value) if d.value else f"{new}_{axis}" for axis, d in enumerate(value.shape))
        inputs[new] = Input(new, value.name, torch_dtype(value.dtype, what), shape)
    _name_batch(inputs, notes)
    return inputs


def _name_batch(inputs: dict[str, Input], notes: list[str]) -> None:
    """First axes that an exporter gave numbers for names (s72, s43) are the batch: one size, and the notes say so."""
    first = next((str(i.shape[0]) for i in inputs.values() if i.shape and _is_anonymous(i.shape[0])), None)
    for name, i in inputs.items():
        if first is not None and i.shape and i.shape[0] != first and _is_anonymous(i.shape[0]):
            notes.append(f"{name} axis 0 ({i.shape[0]}) is taken to be as long as {first}: neither has a name of its own")
            inputs[name] = Input(name, i.original, i.dtype, (first, *i.shape[1:]))


def dynamic_shapes(inputs: Mapping[str, Input]) -> dict[str, dict[int, str]]:
    """Input -> axis -> the file's name of its dynamic size."""
    return {i.name: {axis: d for axis, d in enumerate(i.shape) if isinstance(d, str)} for i in inputs.values()}


def example_inputs(inputs: Mapping[str, Input], apart: bool = True) -> dict[str, Tensor]:
    """Zeros of the declared shapes; sizes like 'past + 1' follow from their parts.

    apart: every named dynamic dim gets a size of its own, so that nothing finds two equal by chance. Dims without a name of
    their own (an exporter's s72, unk__3) have one size an axis: most often they must be equal, and the trace says which.
    """
    sizes: dict[str, int] = {}
    for axis_names in dynamic_shapes(inputs).values():
        for axis, name in axis_names.items():
            if name in sizes or not name.isidentifier():
                continue
            start = 2 if axis == 0 or "batch" in name.lower() else 16
            sizes[name] = start
            if apart and not _is_anonymous(name) and name not in (f"{i}_{axis}" for i in inputs):
                taken = set(sizes.values()) - {start} if list(sizes.values()).count(start) == 1 else set(sizes.values())
                sizes[name] = next(n for n in range(start, 10**6, 1 if start == 2 else 8) if n not in taken)
    made = {}
    for i in inputs.values():
        shape = [d if isinstance(d, int) else _size_of(d, sizes) for d in i.shape]
        made[i.name] = torch.zeros(shape, dtype=i.dtype)
    return made


_ANONYMOUS = re.compile(r"s\d+|unk__\d+|dim_?\d+|d\d+|dynamic_axes_\d+|None")


def _is_anonymous(size: int | str) -> bool:
    return isinstance(size, str) and _ANONYMOUS.fullmatch(size) is not None


_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def _size_of(expression: str, sizes: dict[str, int]) -> int:
    """The value of a dim's name, or of an expression of names such as 'past_sequence_length + 1'."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes.setdefault(node.id, 8 + 8 * len(sizes))
        raise ValueError(ast.dump(node))

    try:
        if len(expression) < 200:
            return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError):
        pass
    return sizes.setdefault(expression, 8 + 8 * len(sizes))


def legal(name: str, taken: set[str], dots: bool) -> str:
    """A name torch and Python take: letters, digits and underscores (and dots between parts), not used yet."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII)[:200] or "_" for part in (name.strip("/.").split(".") if dots else [name])]
    made = ".".join(parts)
    if not dots and (made[0].isdigit() or made in ("self",) or made.startswith("__")):
        made = f"_{made}" if made[0].isdigit() else f"x_{made}"
    candidate, n = made, 1
    while candidate in taken:
        candidate, n = f"{made}_{n}", n + 1
    return candidate
