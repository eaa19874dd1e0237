"""GPTQ: round one input channel after another, and let the channels to come make up for each error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ir.formats import Format, Grid
from .codes import blocks, dequantized, rounded

BLOCK = 128  # channels between two updates of all that follow
DAMP = 0.01  # of the mean of the Gram's diagonal

Rounding = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(channel, its weights [out]) -> codes [out, ...] and what they stand for [out]."""


def gptq_codes(
    w: Tensor,
    on: Grid,
    form: Format,
    group_size: int,
    gram: Tensor,
    damp: float = DAMP,
    act_order: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
) -> Tensor:
    """Codes [out, groups, group] of w [out, in] on a fixed grid [out, groups, 1]; groups stay where they are, since the grid is fixed before."""
    width, group = w.shape[1], blocks(w, form, group_size).shape[2]
    scale, zero_point = (t.squeeze(-1).repeat_interleave(group, 1)[:, :width].T.contiguous() for t in on)

    def rounding(channel: int, column: Tensor) -> tuple[Tensor, Tensor]:
        here = Grid(scale[channel], zero_point[channel])
        codes = rounded(column, here, form).to(w.dtype)
        return codes, dequantized(codes, here)

    placed = blocks(gptq(w, rounding, gram, damp, act_order, say).T, form, group_size)
    return placed.to(torch.float8_e4m3fn) if form.kind == "fp8" else placed


def gptq(w: Tensor, rounding: Rounding, gram: Tensor, damp: float = DAMP, act_order: bool = True, say: Callable[[str], None] = lambda sentence: None) -> Tensor:
    """Codes [in, out, ...] of w [out, in] that keep E |x (w - w_q)^T|^2 small (Frantar et al. 2023).

    gram: [in, in], E[x x^T]. Weights of channels that never fire become 0. act_order: channels with the largest E[x^2] first, while
    there are many left to make up for them. `say` hears of more damping than was asked for.
    """
    width = w.shape[1]
    gram = gram.double().clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = gram.diagonal().sum() / (width - dead.sum()) if not dead.all() else 1.0
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width)
    upper = _inverse_root(gram[order][:, order], damp, say).to(w.dtype)
    left = w.masked_fill(dead, 0).T[order]  # [in, out]: a channel is a row
    codes: list[Tensor] = []
    for begin in range(0, width, BLOCK):
        end = min(begin + BLOCK, width)
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            code, value = rounding(int(order[i]), left[i])
            codes.append(code)
            errors[i - begin] = (left[i] - value) / upper[i, i]
            left[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i - begin], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return torch.stack(codes)[order.argsort()]


def _inverse_root(gram: Tensor, damp: float, say: Callable[[str], None]) -> Tensor:
    """U, upper triangular, with U^T U = (gram + damp mean(diag) I)^-1; ten times more damping as often as it takes."""
    mean = gram.diagonal().mean()
    asked = damp
    while True:
        damped = gram + damp * mean * torch.eye(len(gram), dtype=gram.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            break
        damp = max(10 * damp, 1e-8)
        assert damp < 1e6, "with so much damping every finite Gram has a root"
    if damp != asked:
        say(f"its inputs are linearly dependent: damp = {asked:g} was too little, {damp:g} was used")
    return upper
