"""Calibration data of any kind as batches of inputs: iterables, a DataLoader, .npz, .jsonl, a text file with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import InputFileError, UsageError
from .zoo import offline

KINDS = (".npz", ".jsonl", ".txt")
LENGTH = 128
"""Tokens of the longest text, or of a window of text."""


def calibration(
    source: Any,
    transform: Callable[[Any], Any] | None = None,
    tokenizer: Any = None,
    batch: int = 8,
    length: int = LENGTH,
    most: int | None = None,
) -> list[Any]:
    """Batches of inputs, each as the model takes it: a dict of keyword arguments, a tuple of positional ones, or one tensor.

    source: an iterable of batches or a DataLoader; `transform(item)` makes inputs of an item, such as `lambda item: item[0]`
      for (images, labels). Or a file, by its suffix:
      .npz    arrays named like the inputs, each with a leading axis of batches.
      .jsonl  an object a line, one example: inputs by name as nested lists without the batch axis, or {"text": "..."}.
      .txt    a text a line; with a tokenizer that has no padding token, as language models' have none, the whole file
              is cut into windows instead.
    tokenizer: of transformers, or the path of its folder or of a tokenizer.json. batch: examples a batch, length: tokens of
      the longest text or of a window. most: batches at most (an endless iterable needs it).
    Raises InputFileError for a damaged file, UsageError for a missing tokenizer or an unknown kind.
    """
    if isinstance(source, str | Path):
        source = _from_file(Path(source), tokenizer, batch, length)
    elif not isinstance(source, Iterable) or isinstance(source, Mapping | Tensor):
        raise UsageError(f"calibration data is an iterable of batches or a file ({', '.join(KINDS)}); got one {type(source).__name__}, put it in a list")
    made = (item if transform is None else transform(item) for item in source)
    return list(islice(made, most))


def _from_file(path: Path, tokenizer: Any, batch: int, length: int) -> Iterator[Any]:
    if path.suffix not in KINDS:
        raise UsageError(f"calibration data {path} is of no known kind; expected {', '.join(KINDS)}")
    if not path.exists():
        raise InputFileError(f"no file {path}")
    if path.suffix == ".npz":
        return iter(_arrays(path))
    examples = list(_lines(path))
    if not examples:
        raise InputFileError(f"{path} is empty")
    if path.suffix == ".jsonl" and not isinstance(examples[0], str):
        return _stacked(path, examples, batch)
    if tokenizer is None:
        raise UsageError(f"{path} holds text: give the model's tokenizer (its folder or tokenizer.json)")
    return _tokenized(examples, load_tokenizer(tokenizer), batch, length)


def _arrays(path: Path) -> list[dict[str, Tensor]]:
    arrays = read_npz(path)
    if not arrays or any(a.dim() < 2 for a in arrays.values()):
        raise InputFileError(f"{path} must hold arrays named like the inputs, each [batches, batch, ...]")
    return [{name: a[i] for name, a in arrays.items()} for i in range(min(map(len, arrays.values())))]


def read_npz(path: str | Path) -> dict[str, Tensor]:
    """The arrays of an .npz file by name. Raises InputFileError if it is none, or would run code (pickles)."""
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path} is not a readable .npz file: {error}") from error


def _lines(path: Path) -> Iterator[Any]:
    """The texts of a .txt or {"text": ...} file, or the objects of a .jsonl file."""
    try:
        lines = path.read_text(encoding="utf8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path} can't be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        if path.suffix == ".txt":
            yield line
        elif line.strip():
            try:
                example = json.loads(line)
            except ValueError as error:
                raise InputFileError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(example, dict) or not example:
                raise InputFileError(f"{path} line {number} is not an object of inputs by name")
            yield example["text"] if isinstance(example.get("text"), str) else example


def _stacked(path: Path, examples: list[Any], batch: int) -> Iterator[dict[str, Tensor]]:
    """Examples of equal shapes together, in order; a run of another shape starts a new batch."""
    group: list[dict[str, Tensor]] = []
    for number, example in enumerate(examples, 1):
        try:
            tensors = {name: torch.tensor(value) for name, value in example.items()}
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputFileError(f"{path} example {number} is not numbers by input name: {error}") from error
        if group and (len(group) == batch or {k: t.shape for k, t in group[0].items()} != {k: t.shape for k, t in tensors.items()}):
            yield {name: torch.stack([g[name] for g in group]) for name in group[0]}
            group = []
        group.append(tensors)
    yield {name: torch.stack([g[name] for g in group]) for name in group[0]}


def _tokenized(texts: list[str], tokenizer: Any, batch: int, length: int) -> Iterator[dict[str, Tensor]]:
    if tokenizer.pad_token is None:
        ids = torch.tensor(tokenizer("".join(texts))["input_ids"])
        if len(ids) < length:
            raise InputFileError(f"the text is only {len(ids)} tokens; a window is {length}")
        yield from ({"input_ids": part} for part in ids[: len(ids) // length * length].view(-1, length).split(batch))
        return
    texts = [text.strip() for text in texts if text.strip()]
    for i in range(0, len(texts), batch):
        made = tokenizer(texts[i : i + batch], padding=True, truncation=True, max_length=length, return_tensors="pt")
        yield {name: made[name] for name in ("input_ids", "attention_mask")}


def load_tokenizer(place: Any) -> Any:
    """A transformers tokenizer from its folder or a tokenizer.json; anything but a path is taken to be one. Nothing is downloaded."""
    if not isinstance(place, str | Path):
        return place
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise UsageError("a tokenizer needs the package transformers; install rewright[hf]") from error
    try:
        with offline():
            if Path(place).is_file():
                return PreTrainedTokenizerFast(tokenizer_file=str(place))
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise plain Exceptions for damaged files
        raise InputFileError(f"{place} is not a tokenizer: expected its folder or a tokenizer.json ({str(error).splitlines()[0][:200]})") from error
