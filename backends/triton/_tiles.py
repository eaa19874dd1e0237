"""How large a program's tile is: literal tables, chosen by the number of rows, the dtype and the device's name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

ANY = 2**62

FLOAT32 = tl.constexpr("tf32x3")
"""How tl.dot takes float32: three products of tensor cores, off by some 2^-22. Triton 3.6 and 3.7 turn an "ieee" one into TF32 for sm_100."""


@dataclass(frozen=True)
class Tile:
    """A program computes `bm` rows and `bn` columns in steps of `bk`. Of a table the first that fits is taken."""

    rows: int
    """For calls of at most this many rows."""
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    device: str = ""
    """Part of the name of the device it was measured on; an empty one fits any."""

    @property
    def options(self) -> dict[str, int]:
        """For the launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def choose(tiles: tuple[Tile, ...], rows: int, like: Tensor) -> Tile:
    """The first tile of a table for this many rows on the device of `like`."""
    name = device_name(like.device)
    return next(t for t in tiles if rows <= t.rows and t.device in name)


@functools.cache
def device_name(device: torch.device) -> str:
    """'NVIDIA H200'; empty for what is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def upcast(dtype: torch.dtype) -> bool:
    """Whether products are to be in float32: in Triton's interpreter, whose bfloat16 arithmetic is wrong without a word."""
    return dtype == torch.bfloat16 and bool(knobs.runtime.interpret)
