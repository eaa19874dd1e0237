"""Which hidden channels of which layers stay, as a safetensors file says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...ir.errors import InputFileError, UsageError, near


def read_mask(path: str | Path, layers: Sequence[tuple[tuple[str, ...], int, int | None]]) -> list[Tensor | None]:
    """int64 indices of what stays, [kept] or [experts, kept], of each layer; None where the file says nothing of it.

    layers: (names it may go by, hidden channels, experts) each.
    Raises InputFileError for what is no safetensors file, UsageError for a layer that is not there and for shapes that do not fit.
    """
    try:
        masks = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputFileError(f"{path} is no safetensors file with masks: {error}") from error
    known = [name for names, _, _ in layers for name in names]
    for name in masks:
        if known.count(name) != 1:
            why = "there is no such feed-forward block" if name not in known else f"{known.count(name)} blocks go by that name: use their down weights'"
            raise UsageError(f"the mask {path} names {name!r}, and {why}.{near(name, known)}")
    return [next((_indices(masks, name, hidden, experts) for name in names if name in masks), None) for names, hidden, experts in layers]


def _indices(masks: Mapping[str, Tensor], name: str, hidden: int, experts: int | None) -> Tensor:
    mask = masks[name]
    if mask.dtype == torch.bool:
        wanted = (hidden,) if experts is None else (experts, hidden)
        if tuple(mask.shape) != wanted:
            raise UsageError(f"the mask of {name} is bool{list(mask.shape)}; expected bool{list(wanted)}, true for channels that stay")
        counts = mask.sum(-1)
        if int(counts.min()) != int(counts.max()):
            raise UsageError(f"the mask of {name} keeps {int(counts.min())} to {int(counts.max())} channels; all experts of a layer need as many")
        kept = mask.nonzero()[:, -1].view(*wanted[:-1], -1)
    elif mask.dtype == torch.int64 and mask.dim() == (1 if experts is None else 2) and (experts is None or len(mask) == experts):
        kept = mask.sort(-1).values
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= hidden) or bool((kept.diff() == 0).any()):
            raise UsageError(f"the mask of {name} holds indices twice, or others than 0 to {hidden - 1}")
    else:
        shape = "" if experts is None else f"{experts}, "
        raise UsageError(f"the mask of {name} is {mask.dtype}{list(mask.shape)}; expected bool[{shape}{hidden}] or int64[{shape}kept]")
    if not kept.numel():
        raise UsageError(f"the mask of {name} keeps no channel at all")
    return kept
