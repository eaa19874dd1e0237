"""Real models that come with us, each with calibration batches and a judge: `zoo:minilm`, `zoo:digits-vit`, `zoo:stdlib-lm`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...ir.errors import UsageError, near
from ..score import Score

ZOO = ("minilm", "digits-vit", "stdlib-lm")
DATA = Path(__file__).parent / "data"

Batch = dict[str, Tensor]
Split = Literal["held_out", "calibration"]


@dataclass(frozen=True)
class ZooModel:
    """A trained model and what is needed to calibrate, to judge and to train it further; all other data is disjoint from the judge's."""

    name: str
    module: nn.Module
    example: Batch
    calibration: list[Batch]
    judge: Callable[..., list[Score]]
    """(run, most=None, split="held_out") -> scores, the model's own metric first; `most`: only so many items."""
    glance: int
    """Items of the judge that are enough for a look during a training run."""
    training_batch: Callable[[int, int], Batch]
    """(step, seed) -> a batch of training data, none of it the judge's or in `validation`."""
    validation: Callable[[], list[Batch]]
    """Batches to choose weights by during a training run, none of them the judge's."""


def load_zoo(name: str) -> ZooModel:
    """A zoo model by name. Raises UsageError for an unknown one or a missing package."""
    from . import digits_vit, minilm, stdlib_lm

    if name not in ZOO:
        raise UsageError(f"no zoo model {name!r}.{near(name, ZOO)} There are: {', '.join(ZOO)}")
    try:
        return {"minilm": minilm, "digits-vit": digits_vit, "stdlib-lm": stdlib_lm}[name].load()
    except ImportError as error:
        raise UsageError(f"zoo:{name} needs the package {error.name}; install rewright[zoo]") from error


def drawn(step: int, seed: int = 0) -> torch.Generator:
    """The random numbers of one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + 1 + step)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No network and no chatter from the hub libraries while a local model loads."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
