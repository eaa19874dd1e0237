"""Tensors by name, read from safetensors files one at a time when asked for, and written without holding a model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .encoding import weight_name
from .errors import InputFileError, ResourceError, UsageError
from .files import replacing

INDEX = "model.safetensors.index.json"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    nbytes: int


class WeightStore(Mapping[str, Tensor]):
    """Named tensors: in safetensors files, or held in memory.

    A tensor from a file is read into fresh memory each time it is asked for, so that dropping it frees it at once (pages of
    a mapped file would stay resident as long as the mapping lives).
    """

    def __init__(self, files: Iterable[Path | str] = (), held: Mapping[str, Tensor] | None = None) -> None:
        """files: safetensors files; held: tensors beside them, such as buffers a checkpoint lacks; these win.

        Raises InputFileError for a file that is damaged, or a name that two files hold.
        """
        self.held = dict(held or {})
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _read_header(Path(file)).items():
                if name in self.entries:
                    raise InputFileError(f"{name} is in both {self.entries[name].file.name} and {entry.file.name}; a weight must have one value")
                self.entries[name] = entry

    @classmethod
    def open(cls, place: Path | str, held: Mapping[str, Tensor] | None = None) -> WeightStore:
        """The store of a .safetensors file or of a folder: the shards its index lists, else all its .safetensors files.

        Raises InputFileError, in one sentence, if the place holds none, is damaged, or its index leaves the folder.
        """
        place = Path(place)
        if place.is_file():
            return cls([place], held)
        indexes = sorted(place.glob("*.safetensors.index.json"))
        if len(indexes) > 1:
            raise InputFileError(f"{place} holds {len(indexes)} indexes ({', '.join(i.name for i in indexes)}); give one model a folder")
        files = _files_of_index(indexes[0]) if indexes else sorted(place.glob("*.safetensors"))
        if not files:
            raise InputFileError(f"{place} holds no .safetensors file")
        return cls(files, held)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.held:
            return self.held[name]
        return _read(self.entries[name], name)

    def __iter__(self) -> Iterator[str]:
        yield from self.held
        yield from (name for name in self.entries if name not in self.held)

    def __len__(self) -> int:
        return len({*self.held, *self.entries})

    def __contains__(self, name: object) -> bool:
        return name in self.held or name in self.entries

    def digest(self, name: str) -> str:
        """What changes when the tensor does: a hash of the values held in memory, or of a file's place, size and time.

        A file is not read for it, so one that is rewritten within its clock's tick with the same layout looks unchanged.
        """
        if name in self.held:
            return digest(self.held[name])
        entry = self.entries[name]
        state = entry.file.stat()
        where = f"{entry.file.resolve()} {state.st_size} {state.st_mtime_ns} {entry.begin} {entry.dtype} {entry.shape}"
        return hashlib.blake2b(where.encode(), digest_size=16).hexdigest()


def digest(tensor: Tensor) -> str:
    """A hash of dtype, shape and values; computed once for a tensor that is not written to."""
    known = _known.get(tensor)
    if known is None or known[0] != tensor._version:
        flat = tensor.detach().cpu().contiguous().flatten()
        hashed = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
        if flat.numel():
            hashed.update(flat.view(torch.uint8).numpy().data)
        known = _known[tensor] = (tensor._version, hashed.hexdigest())
    return known[1]


_known: Any = WeakTensorKeyDictionary()


# -- reading --------------------------------------------------------------------------------------------------------


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputFileError(f"{index} is not a safetensors index: {error}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
            raise InputFileError(f"{index.name} lists {name!r}: a shard must be a plain file name in the index's own folder; the file is unsafe")
    return [index.parent / name for name in names]


def _read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a file, checked against the file's size before any is read."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {weight_name(name): _entry(file, data, 8 + length) for name, data in header.items()}
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda e: (e.begin, e.nbytes)):
            if entry.begin != end:
                raise ValueError("its tensors overlap or leave holes")
            end += entry.nbytes
        if end != size:
            raise ValueError(f"{size} bytes where its header tells of {end}")
        return entries
    except InputFileError:
        raise
    except FileNotFoundError as error:
        raise InputFileError(f"the weights file {file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise InputFileError(f"{file} is no safetensors file, or is damaged: {error}") from error


def _entry(file: Path, data: Mapping[str, Any], start: int) -> Entry:
    if data["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {data['dtype']!r}")
    dtype, shape, (begin, end) = _DTYPES[data["dtype"]], tuple(data["shape"]), data["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} in bytes {begin} to {end}")
    return Entry(file, dtype, shape, start + begin, end - begin)


def _read(entry: Entry, name: str) -> Tensor:
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    try:
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(entry.begin)
            view, done = buffer.numpy().data, 0
            while done < entry.nbytes:
                count = stream.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise InputFileError(f"{entry.file} ended within {name}; it was cut short after it was opened")
                done += count
    except OSError as error:
        raise InputFileError(f"{name} can't be read from {entry.file}: {error.strerror or error}") from error
    return buffer.view(entry.dtype).view(entry.shape)


# -- writing --------------------------------------------------------------------------------------------------------

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape, in the order the tensors are to be written."""


def write_tensors(file: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One safetensors file, tensor by tensor as `tensors` yields them, in the order of `layout`; atomic.

    Raises UsageError when a tensor is not as laid out, ResourceError when the disk is full.
    """
    with replacing(file) as path, open(path, "wb") as stream:
        _write_header(stream, layout)
        expected = iter(layout.items())
        for name, tensor in tensors:
            wanted, (dtype, shape) = next(expected)
            if name != wanted or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise UsageError(f"{name} came as {tensor.dtype}{list(tensor.shape)} where {wanted} was laid out as {dtype}{list(shape)}")
            if tensor.numel():
                stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if (missing := next(expected, None)) is not None:
            raise UsageError(f"{missing[0]} was laid out and never came")


def _write_header(stream: BinaryIO, layout: Layout) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _CODES:
            raise UsageError(f"{name} is {dtype}, which safetensors has no code for")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    stream.write(struct.pack("<Q", len(text)) + text)


def write_sharded(folder: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int | None = None) -> list[Path]:
    """`model.safetensors`, or shards of at most `shard_bytes` (one tensor may be larger) with the index that lists them.

    The files appear one by one, the index last: a folder without an index is unfinished. Returns the files written.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    used = 0
    for name, (dtype, shape) in layout.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shard_bytes is not None and shards[-1] and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, shape)
        used += nbytes
    stream = iter(tensors)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", layout, stream)
        return [folder / "model.safetensors"]
    files, where = [], {}
    for i, shard in enumerate(shards):
        file = folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(file, shard, (next(stream) for _ in range(len(shard))))
        files.append(file)
        where.update(dict.fromkeys(shard, file.name))
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    with replacing(folder / INDEX) as path:
        path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1), encoding="utf8")
    return files


def check_disk(folder: Path, nbytes: int) -> None:
    """Fail before the work: raises ResourceError when the disk has too little room for `nbytes` more."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if (free := shutil.disk_usage(nearest).free) < nbytes:
        raise ResourceError(f"{folder} needs {nbytes / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free; free some space or choose another place")
