"""A weight in a file beside its model -> a tensor over the file's own pages, which are read when used and copied when written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputFileError

ALIGNMENT = 64  # bytes; on weights that lie askew CPU kernels round otherwise and are slower
SMALLEST = 2**16  # bytes; less is copied: a mapping takes whole pages, and a process may have some 65,000 mappings


def external_tensor(tensor: Any, dtype: torch.dtype, what: str) -> Tensor:
    """An onnx_ir.ExternalTensor of whole bytes a value, mapped copy-on-write where it is large and aligned, else read.

    Training writes into copies of pages, never into the file. If another file takes its place by a rename, the old one stays as it is;
    one that is written over in place changes under its readers, as with every mapping.
    Raises InputFileError for a file that has become shorter, or a link, since it was checked.
    """
    shape = [int(n) for n in tensor.shape]
    path, offset, size = _contained(tensor, what), tensor.offset or 0, math.prod(shape) * dtype.itemsize
    try:
        held = _mapped(path, offset, size) if size >= SMALLEST and offset % ALIGNMENT == 0 else _read(path, offset, size)
    except (OSError, ValueError) as error:  # numpy's ValueError: the file is shorter
        raise InputFileError(f"{what} can't be read from {path}: {getattr(error, 'strerror', None) or error}") from error
    return held.view(dtype).reshape(shape)


def _contained(tensor: Any, what: str) -> Path:
    """The file, looked at again: between the check and now somebody may have put a link in its place."""
    path = Path(tensor.path)
    if path.resolve() != path or path.is_file() and path.stat().st_nlink > 1:
        raise InputFileError(f"{what} lies in {str(tensor.location)!r}, which has become a link since it was checked; copy the data beside the model")
    return path


def _mapped(path: Path, offset: int, size: int) -> Tensor:
    return torch.from_numpy(np.memmap(path, np.uint8, mode="c", offset=offset, shape=(size,)))


def _read(path: Path, offset: int, size: int) -> Tensor:
    held: Any = torch.empty(size, dtype=torch.uint8)  # in torch's own memory, which is aligned
    with open(path, "rb") as file:
        file.seek(offset)
        if file.readinto(held.numpy()) < size:
            raise ValueError(f"it ends before byte {offset + size}")
    return held
