"""Outputs appear whole or not at all: written under a temporary name beside the target, then renamed; what is read again is known by its hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ResourceError


@contextlib.contextmanager
def replacing(path: Path, *companions: str) -> Iterator[Path]:
    """A path in a temporary folder beside `path`, with the same name; renamed to `path` when the block ends well.

    companions: names of further files the block may write in that folder (external data); they are moved first.
    A folder written there replaces `path` as a folder. On any failure the old output stays and nothing is left behind.
    Raises ResourceError, in one sentence, when the place can't be written or the disk is full.
    """
    path = Path(path)
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield folder / path.name
        for name in companions:
            if (folder / name).exists():
                _sync(folder / name)
                os.replace(folder / name, path.parent / name)
        made = folder / path.name
        if made.is_dir():
            _replace_folder(made, path, folder)
        else:
            _sync(made)
            os.replace(made, path)
    except OSError as error:
        raise ResourceError(_sentence(path, error)) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Fail early: raises ResourceError when `path` could not be written at the end of a long run."""
    path = Path(path)
    nearest = path.parent
    try:
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
    except OSError as error:
        raise ResourceError(_sentence(path, error)) from error
    if not nearest.is_dir():
        raise ResourceError(f"can't write {path}: {nearest} is a file, not a folder; choose another output path")
    if not os.access(nearest, os.W_OK):
        raise ResourceError(f"can't write {path}: no permission to write in {nearest}; choose another output path")
    if path.suffix and path.is_dir():
        raise ResourceError(f"can't write {path}: it is a folder; choose another output path")


def _replace_folder(made: Path, path: Path, scratch: Path) -> None:
    old = scratch / "previous"
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(made, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sentence(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"can't write {path}: the disk is full; free some space or choose another output path (nothing was changed)"
    return f"can't write {path}: {(error.strerror or str(error)).lower()}; choose another output path (nothing was changed)"


def digest(path: Path) -> str:
    """sha256 of a file, read in blocks. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
