"""Weights [out, in] as codes on a grid, whatever algorithm chose them: blocks, rounding, and how an op stores them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.formats import FP8_MAX, Format, Grid, grouped, pack


class Quantized(NamedTuple):
    """codes: [out, groups, group], float8 for fp8 formats, else whole numbers held as floats. on: [out, groups, 1], what they stand for."""

    codes: Tensor
    on: Grid


def blocks(w: Tensor, form: Format, group_size: int) -> Tensor:
    """[out, in] -> [out, groups, group]: what shares a scale is the last axis. A row is one group; a short last group is filled with zeros."""
    return grouped(w, form, group_size) if form.per == "group" else w[:, None]


def rounded(parts: Tensor, on: Grid, form: Format) -> Tensor:
    """The nearest codes of blocks (or of anything the grid broadcasts against), half to even; one copy of `parts` at a time."""
    q = parts / on.scale
    if form.kind == "fp8":
        return q.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if not form.symmetric:
        q.add_(on.zero_point)  # before rounding: it may lie between two codes
    return q.round_().clamp_(form.low, form.high)


def dequantized(q: Tensor, on: Grid) -> Tensor:
    """What codes stand for, in the grid's dtype."""
    return (q.to(on.scale.dtype) - on.zero_point) * on.scale


def flat(parts: Tensor, width: int) -> Tensor:
    """[out, groups, group] -> [out, width]: the inverse of `blocks`."""
    return parts.flatten(1)[:, :width]


def as_rows(q: Quantized, width: int) -> dict[str, Tensor]:
    """One scale a row: w int8 or float8 [out, in], scale [out]."""
    codes = flat(q.codes, width)
    return {"w": codes if codes.dtype == torch.float8_e4m3fn else codes.to(torch.int8), "scale": q.on.scale.flatten()}


def as_nbits(q: Quantized, form: Format, width: int, group_size: int, real_zero_point: bool = False) -> dict[str, Tensor]:
    """Packed groups, the layout of linear_nbits: w uint8 [out, groups, bytes], scale [out, groups], zero_point packed or real.

    A format by row becomes groups that share their row's scale. Symmetric codes are stored from 0 on, which the op's default zero point undoes.
    """
    out = len(q.codes)
    if form.per == "row":
        as_group = Format(form.kind, form.bits, "group")
        codes = grouped(flat(q.codes, width), as_group, group_size)
        scale = q.on.scale.expand(out, codes.shape[1], 1)
    else:
        codes, scale = q.codes, q.on.scale
    stored = {"w": pack(codes + 2 ** (form.bits - 1) if form.symmetric else codes, form.bits), "scale": scale.squeeze(-1).contiguous()}
    if not form.symmetric:
        zero = q.on.zero_point.squeeze(-1)
        stored["zero_point"] = zero if real_zero_point else pack(zero, form.bits)
    return stored
