"""Two ONNX models on the same made inputs in onnxruntime: do they give the same?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IN_MEMORY = 1_500_000_000
"""Bytes of weights up to which a model is handed to onnxruntime in memory."""

CLOSE = 1e-4
"""Largest difference that rounding explains, relative to the largest value of an output in float32 (one in 100 in half precision)."""

SIZES = ({}, {"batch": 1})
"""What dynamic dims get: 2, 3, 4 ... by name, then with batches of 1."""


@dataclass
class Agreement:
    """What a comparison showed."""

    ran: bool = False
    """False: onnxruntime can't run the original, or no input could be made for it."""
    inputs: int = 0
    error: float = 0.0
    """Largest difference relative to the largest value."""
    why_not: str | None = None
    """What differs, or None."""

    def as_dict(self) -> dict[str, Any]:
        """For records; `note` where nothing could be run."""
        if not self.ran:
            return {"note": "structure only: onnxruntime can't run the original on made inputs"}
        return {"inputs": self.inputs, "relative_error": self.error, "bit_equal": self.error == 0}


def agreement(original: Any, changed: Any, source: Path | bytes | None = None, written: Path | bytes | None = None) -> Agreement:
    """Run two onnx_ir models on made inputs. source, written: the two as onnxruntime reads them, where they are files."""
    with contextlib.ExitStack() as stack:
        try:
            one = session(source if source is not None else stack.enter_context(runnable(original)))
        except Exception:  # onnxruntime raises its own classes: custom operators, opsets of the future
            return Agreement()
        try:
            other = session(written if written is not None else stack.enter_context(runnable(changed)))
        except Exception as error:
            return Agreement(True, why_not=f"onnxruntime refuses the result: {_line(error)}")
        if [(i.name, i.type) for i in one.get_inputs()] != [(i.name, i.type) for i in other.get_inputs()]:
            return Agreement(True, why_not="the inputs are no longer the same")
        if [(o.name, o.type) for o in one.get_outputs()] != [(o.name, o.type) for o in other.get_outputs()]:
            return Agreement(True, why_not="the outputs are no longer the same")
        return _run(one, other)


def _run(one: Any, other: Any) -> Agreement:
    found = Agreement()
    for feeds in made_inputs(one.get_inputs()):
        try:
            wanted, again = one.run(None, feeds), one.run(None, feeds)
        except Exception:  # sizes or numbers it does not take
            continue
        try:
            got = other.run(None, feeds)
        except Exception as error:
            return Agreement(True, found.inputs, why_not=f"the result does not run: {_line(error)}")
        found.ran, found.inputs = True, found.inputs + 1
        for name, a, repeated, b in zip((o.name for o in one.get_outputs()), wanted, again, got):
            found.error = max(found.error, error := difference(a, b, same_numbers=_equal(a, repeated)))
            if error > allowed(a):
                found.why_not = f"the output {name!r} differs by {error:.2g} (relative)"
                return found
    return found


def allowed(value: Any) -> float:
    """How far rounding may move an output."""
    return 1e-2 if isinstance(value, np.ndarray) and value.dtype.itemsize <= 2 and value.dtype.kind not in "iub" else CLOSE


def difference(a: Any, b: Any, same_numbers: bool = True) -> float:
    """Largest |a - b| relative to the largest |a|; infinite where kind, shape, dtype, NaNs or texts differ. Random numbers differ and may."""
    if isinstance(a, list) or isinstance(b, list):
        if type(a) is not type(b) or len(a) != len(b):
            return np.inf
        return max((difference(x, y, same_numbers) for x, y in zip(a, b)), default=0.0)
    if isinstance(a, dict):
        return 0.0 if a == b else np.inf
    if a is None or b is None:
        return 0.0 if a is b else np.inf
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if not same_numbers or a.size == 0:
        return 0.0
    if a.dtype.kind not in "fciu" or a.dtype.kind in "iu":
        return 0.0 if np.array_equal(a, b) else np.inf
    x, y = (v.astype(np.complex128 if a.dtype.kind == "c" else np.float64) for v in (a, b))
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    x, y = x[finite], y[finite]
    return float(np.abs(x - y).max(initial=0) / max(np.abs(x).max(initial=0), 1e-30))


def _equal(a: Any, b: Any) -> bool:
    return difference(a, b) == 0


def session(model: Path | bytes) -> Any:
    """The model as it is written: no rewriting of onnxruntime's own, one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def runnable(model: Any) -> Iterator[Path | bytes]:
    """An onnx_ir model as onnxruntime takes it: bytes, or a temporary file with its weights beside it."""
    import onnx_ir

    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    if sum(t.nbytes for t in tensors) < IN_MEMORY and not any(isinstance(t, onnx_ir.ExternalTensor) for t in tensors):
        yield onnx_ir.to_proto(model).SerializeToString()
        return
    with tempfile.TemporaryDirectory() as folder:
        onnx_ir.save(model, Path(folder) / "m.onnx", external_data="m.onnx.data")
        yield Path(folder) / "m.onnx"


def made_inputs(inputs: list[Any]) -> Iterator[dict[str, Any]]:
    """Feeds for what a session declares: unit normal floats, small integers, both bools; dims by name, at two batches."""
    for given in SIZES:
        rng, sizes = np.random.default_rng(0), dict(given)
        feeds = {}
        for i in inputs:
            shape = [d if isinstance(d, int) else sizes.setdefault(str(d), 2 + len(sizes)) for d in i.shape] if i.shape is not None else [2]
            made = _array(i.type, [max(d, 0) for d in shape], rng)
            if made is None:
                return
            feeds[i.name] = made
        yield feeds
        if all(isinstance(d, int) for i in inputs for d in i.shape or ()):
            return


_KINDS = {"float": np.float32, "double": np.float64, "float16": np.float16, **{k: np.dtype(k).type for k in ("int8", "int16", "int32", "int64", "uint8")}}
_KINDS |= {k: np.dtype(k).type for k in ("uint16", "uint32", "uint64")}


def _array(kind: str, shape: list[int], rng: np.random.Generator) -> Any:
    if kind.startswith("seq(") and (one := _array(kind[4:-1], shape or [2], rng)) is not None:
        return [one, one]
    if kind.startswith("optional("):
        return _array(kind[9:-1], shape, rng)
    inner = kind.removeprefix("tensor(").removesuffix(")")
    if inner == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if inner == "string":
        return np.full(shape, "a", dtype=object)
    if inner not in _KINDS:
        return None
    dtype = np.dtype(_KINDS[inner])
    return np.asarray(rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype)


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
