"""An ONNX file as onnx_ir reads it, checked: a whole file, external data inside its folder and as long as declared, functions inlined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputFileError

OPSETS = range(7, 27)
"""Versions of the standard domain that we read."""

MOST_NODES = 1_000_000
LARGEST_PROTOBUF = 2**31  # bytes; the format's own limit

_DTYPES = {
    "FLOAT": torch.float32,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "UINT16": torch.uint16,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "FLOAT16": torch.float16,
    "DOUBLE": torch.float64,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "COMPLEX64": torch.complex64,
    "COMPLEX128": torch.complex128,
    "BFLOAT16": torch.bfloat16,
    "FLOAT8E4M3FN": torch.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": torch.float8_e4m3fnuz,
    "FLOAT8E5M2": torch.float8_e5m2,
    "FLOAT8E5M2FNUZ": torch.float8_e5m2fnuz,
    "INT4": torch.int8,  # torch has no arithmetic on nibbles: a code a byte
    "UINT4": torch.uint8,
}
_AS_BYTES = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


def read_onnx(path: Path) -> Any:
    """The file as an onnx_ir.Model whose weights stay in the file until read. Raises InputFileError, in one sentence, if it can't be trusted."""
    import onnx_ir

    if not path.exists():
        raise InputFileError(f"no file {path}")
    if path.is_dir():
        raise InputFileError(f"{path} is a folder; expected an ONNX model")
    if not 0 < path.stat().st_size < LARGEST_PROTOBUF:
        raise InputFileError(f"{path} has {path.stat().st_size} bytes; an ONNX model has 1 to {LARGEST_PROTOBUF - 1} (larger weights go into a file beside it)")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's DecodeError, and whatever else damaged bytes lead to
        raise InputFileError(f"{path} is not an ONNX model, or is damaged: {_first_line(error)}") from error
    if not model.graph.outputs:
        raise InputFileError(f"{path} is not an ONNX model: it has no graph with outputs")
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is not None and version not in OPSETS:
        raise InputFileError(f"{path} is of opset {version}; rewright reads {OPSETS.start} to {OPSETS.stop - 1} (onnx.version_converter moves a file)")
    for name, tensor in _external(model):
        _check_external(path, name, tensor)
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass()(model)
        except Exception as error:
            raise InputFileError(f"the functions of {path} can't be inlined: {_first_line(error)}") from error
    nodes = sum(1 for _ in model.graph)
    if nodes > MOST_NODES:
        raise InputFileError(f"{path} has {nodes} nodes; rewright reads {MOST_NODES}")
    return model


def _external(model: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor that lies in another file: initialisers, attributes, in subgraphs and functions too."""
    import onnx_ir

    graphs = [model.graph, *(f.graph for f in model.functions.values())]
    while graphs:
        graph = graphs.pop()
        yield from ((v.name, v.const_value) for v in graph.initializers.values() if isinstance(v.const_value, onnx_ir.ExternalTensor))
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == onnx_ir.AttributeType.GRAPH:
                    graphs.append(attribute.value)
                elif attribute.type == onnx_ir.AttributeType.GRAPHS:
                    graphs.extend(attribute.value)
                else:
                    values = attribute.value if isinstance(attribute.value, tuple | list) else [attribute.value]
                    yield from ((f"{node.name}.{attribute.name}", v) for v in values if isinstance(v, onnx_ir.ExternalTensor))


def _check_external(path: Path, name: str, tensor: Any) -> None:
    """Resolve, contain, refuse links, and bound by the real file's size."""
    place, folder = str(tensor.location), path.resolve().parent
    what = f"{path}: the weight {name!r} lies in {place!r}"
    parts = place.replace("\\", "/").split("/")
    if "\0" in place or not place or place.startswith(("/", "\\")) or ".." in parts or (len(place) > 1 and place[1] == ":"):
        raise InputFileError(f"{what}, which leaves the model's folder; the file is unsafe")
    step = folder
    for part in parts:
        step = step / part
        if step.is_symlink():
            raise InputFileError(f"{what}, which goes through a symbolic link; copy the data beside the model")
    if not step.is_file():
        raise InputFileError(f"{what}, which is missing; it belongs beside the model")
    state = os.stat(step)
    if state.st_nlink > 1:
        raise InputFileError(f"{what}, which is a hard link to another file; copy the data beside the model")
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length < 0 or offset + max(length, tensor.nbytes) > state.st_size:
        raise InputFileError(f"{what} at bytes {offset} to {offset + max(length, tensor.nbytes)}; that file has {state.st_size}")


def torch_dtype(dtype: Any, what: str) -> torch.dtype:
    """The torch dtype of an onnx_ir one (or its number). Raises InputFileError for strings and what torch lacks."""
    import onnx_ir

    name = onnx_ir.DataType(int(dtype)).name
    if name not in _DTYPES:
        raise InputFileError(f"{what} is of type {name.lower()}, which torch has no tensors of")
    return _DTYPES[name]


def torch_tensor(tensor: Any, what: str) -> Tensor:
    """An onnx_ir tensor's data, in memory of its own."""
    dtype = torch_dtype(tensor.dtype, what)
    try:
        array = tensor.numpy()
    except Exception as error:
        raise InputFileError(f"{what} can't be read: {_first_line(error)}") from error
    if tuple(array.shape) != tuple(tensor.shape):
        raise InputFileError(f"{what} is declared as {list(tensor.shape)} and holds {list(array.shape)}")
    if dtype in _AS_BYTES:
        array = np.ascontiguousarray(array).view(np.uint16 if dtype.itemsize == 2 else np.uint8)
        return _from_numpy(array).view(dtype)
    if tensor.dtype.name in ("INT4", "UINT4"):
        array = array.astype(np.int8 if dtype == torch.int8 else np.uint8)
    return _from_numpy(array)


def _from_numpy(array: np.ndarray) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that can't be written
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).clone()  # the file's pages can't be written, and training writes


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
