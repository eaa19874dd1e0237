"""Clip search: the range of each row or group, shrunk as far as it lowers the output's error on sampled inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.formats import Format, Grid, grid
from .codes import blocks, dequantized, rounded

SHRINKS = tuple(1 - 0.05 * i for i in range(10))  # 1.0 .. 0.55
MOST_ROWS = 512


def clipped_grid(w: Tensor, form: Format, group_size: int, rows: Tensor) -> Grid:
    """The grid [out, groups, 1] for w [out, in] with the least E |x_group (w_group - w_q)|^2, each group alone (AWQ, Lin et al. 2024).

    rows: [n, in], sampled inputs of the layer; 512 of them, evenly spread, are used. The unshrunk range is among the candidates, so no
    group's error grows.
    """
    parts = blocks(w, form, group_size)
    roots = _roots(blocks(sampled(rows).to(w.dtype), form, group_size))
    best, least = grid(parts, form), None
    for shrink in SHRINKS:
        on = grid(parts, form, shrink)
        error = parts - dequantized(rounded(parts, on, form), on)
        error = torch.bmm(error.transpose(0, 1), roots.transpose(1, 2)).square().sum(-1).T[..., None]  # [out, groups, 1]
        if least is None:
            least = error
            continue
        better = error < least
        best = Grid(torch.where(better, on.scale, best.scale), torch.where(better, on.zero_point, best.zero_point))
        least = torch.where(better, error, least)
    return best


def sampled(rows: Tensor) -> Tensor:
    """At most MOST_ROWS of the rows, from every part of the calibration data: they come in its order."""
    return rows[:: -(-len(rows) // MOST_ROWS)]


def _roots(x: Tensor) -> Tensor:
    """[n, groups, group] -> R [groups, k, group] with |R d| = |x d| for every d, k the smaller of n and group."""
    x = x.transpose(0, 1)
    return x if x.shape[1] <= x.shape[2] else torch.linalg.qr(x, mode="r").R
