"""An ONNX file as onnx_ir reads it, checked: a whole file, external data inside its folder and as long as declared, functions inlined."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputFileError
from ..files import digest
from .checks import check, external_files
from .external import external_tensor
from .opaque import bodies_of

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
NIBBLES = (21, 22)
"""UINT4 and INT4 as ONNX numbers them: weights of them are read a code a byte, and only DequantizeLinear may read those."""
_AS_BYTES = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read and found sound."""

    path: Path
    model: Any
    """onnx_ir.Model; weights in files beside it stay there until read, the others are in memory of their own. Functions are inlined."""
    digests: dict[str, str]
    """sha256 of the file and of those its weights lie in, by name."""
    remarks: tuple[str, ...] = ()

    def unchanged(self) -> None:
        """Raises InputFileError if the file, or one its weights lie in, is another than when it was read."""
        for name, known in self.digests.items():
            if _digest(self.path.resolve().parent / name) != known:
                raise InputFileError(f"{self.path.parent / name} was changed while rewright worked on it; run it again")


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file: a whole one, sound, with external data inside its folder. Raises InputFileError, in one sentence."""
    import onnx
    import onnx_ir

    from . import table

    path = Path(path)
    content = _content(path)
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError, also for graphs nested too deep
        raise InputFileError(f"{path} is not an ONNX model, or is damaged: it looks like {what_is(content)}") from error
    digests = {path.resolve().name: hashlib.sha256(content).hexdigest()}
    del content  # as large as the weights in it
    remarks = check(path, proto, {(op.domain, op.name) for op in table.OPS})
    folder = path.resolve().parent
    digests |= {file.relative_to(folder).as_posix(): _digest(file) for file in external_files(path, proto)}
    try:
        model = onnx_ir.from_proto(proto)
        move_out(model)
    except Exception as error:
        raise InputFileError(f"{path} can't be read: {_first_line(error)}") from error
    del proto
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        try:
            InlinePass()(model)
        except Exception as error:
            raise InputFileError(f"the functions of {path} can't be inlined: {_first_line(error)}") from error
    onnx_ir.external_data.set_base_dir(model.graph, folder)  # now that constants of functions stand in it too
    return OnnxFile(path, model, digests, tuple(dict.fromkeys(remarks)))


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise InputFileError(f"{path} is a folder; expected an ONNX model")
    try:
        size = path.stat().st_size
        if not 0 < size < LARGEST_PROTOBUF:
            raise InputFileError(f"{path} has {size} bytes; an ONNX model has 1 to {LARGEST_PROTOBUF - 1} (larger weights go into a file beside it)")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputFileError(f"no file {path}") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name with NUL
        raise InputFileError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError:
        return "missing"


def what_is(content: bytes) -> str:
    """What the beginning of a file that is not an ONNX model looks like."""
    for magic, what in (
        (b"PK\x03\x04", "a zip archive (.pt, .pt2, .npz or .keras?)"),
        (b"GGUF", "a GGUF file"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x80\x02", "a pickle"),
        (b"\x80\x04", "a pickle"),
    ):
        if content.startswith(magic):
            return what
    if not content:
        return "an empty file"
    return "a text file" if all(32 <= b < 127 or b in b"\t\n\r" for b in content[:8]) else "binary data of an unknown kind, or half a file"


def torch_dtype(dtype: Any, what: str) -> torch.dtype:
    """The torch dtype of an onnx_ir one (or its number). Raises InputFileError for strings and what torch lacks."""
    import onnx_ir

    name = onnx_ir.DataType(int(dtype)).name
    if name not in _DTYPES:
        raise InputFileError(f"{what} is of type {name.lower()}, which torch has no tensors of")
    return _DTYPES[name]


def move_out(model: Any) -> None:
    """Give every tensor memory of its own, not the parsed protobuf's, which lives as long as a single one is in it."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, onnx_ir.serde.TensorProtoTensor) and tensor.dtype.name in _DTYPES and int(tensor.dtype) not in NIBBLES:
            value.const_value = TorchTensor(torch_tensor(tensor, f"the weight {value.name!r}"), tensor.name, tensor.doc_string)
            value.const_value.metadata_props.update(tensor.metadata_props)
    graphs = [model.graph, *model.functions.values()]
    while graphs:
        graph = graphs.pop()
        for value in getattr(graph, "initializers", {}).values():
            value.const_value = _moved(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                graphs += bodies_of(attribute)
                if not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.TENSOR:
                    node.attributes[name] = onnx_ir.AttrTensor(name, _moved(attribute.value), doc_string=attribute.doc_string)


def _moved(tensor: Any) -> Any:
    import onnx_ir

    if not isinstance(tensor, onnx_ir.serde.TensorProtoTensor):
        return tensor
    own: dict[str, Any] = {"name": tensor.name, "doc_string": tensor.doc_string, "metadata_props": tensor.metadata_props}
    if tensor.dtype.bitwidth < 8:
        return onnx_ir.PackedTensor(np.frombuffer(tensor.tobytes(), np.uint8), tensor.dtype, shape=tensor.shape, **own)
    return onnx_ir.Tensor(np.array(tensor.numpy()), tensor.dtype, shape=tensor.shape, **own)


def torch_tensor(tensor: Any, what: str) -> Tensor:
    """An onnx_ir tensor's data: a torch tensor's own, pages of a file beside the model, or in memory of its own. May be written."""
    import onnx_ir

    dtype = torch_dtype(tensor.dtype, what)
    if isinstance(getattr(tensor, "raw", None), Tensor):
        return tensor.raw
    if isinstance(tensor, onnx_ir.ExternalTensor) and int(tensor.dtype) not in NIBBLES:
        return external_tensor(tensor, dtype, what)
    try:
        array = tensor.numpy()
    except Exception as error:
        raise InputFileError(f"{what} can't be read: {_first_line(error)}") from error
    if tuple(array.shape) != tuple(tensor.shape):
        raise InputFileError(f"{what} is declared as {list(tensor.shape)} and holds {list(array.shape)}")
    if dtype in _AS_BYTES:
        array = np.ascontiguousarray(array).view(np.uint16 if dtype.itemsize == 2 else np.uint8)
        return _from_numpy(array).view(dtype)
    if int(tensor.dtype) in NIBBLES:
        array = array.astype(np.int8 if dtype == torch.int8 else np.uint8)
    return _from_numpy(array)


def _from_numpy(array: np.ndarray) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that can't be written
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).clone()  # the file's pages can't be written, and training writes


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
