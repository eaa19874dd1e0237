"""A weight matrix as one or two terms of power-of-two codes, each with a scale a row: what shift_linear stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ir.formats import POWERS, nearest_power
from ...ir.pot import pack_codes
from ..quantization.gptq import DAMP, gptq

REACHES = tuple(0.4 + 0.05 * i for i in range(19))
"""Of a row's largest weight: where the largest code may lie, 0.4 to 1.3."""
ROWS = 64  # fitted at once: their candidates stay in the cache


def shift_tensors(
    w: Tensor,
    terms: int = 1,
    importance: Tensor | None = None,
    gram: Tensor | None = None,
    damp: float = DAMP,
    act_order: bool = True,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Tensor]:
    """w [out, in] float32 -> "w" uint8 [terms, out, ceil(in / 2)] and "scale" [terms, out] of shift_linear. Shapes only on meta.

    Of each row: the scale of 19 with the least squared error, codes nearest to the row on it, then the scale anew by least
    squares; a second term does the same for what the first left over (specs/quant_shiftadd.md 4.1).
    importance: [in], E[x^2]: weighs the errors. gram: [in, in], E[x x^T]: codes are chosen one channel after the other, the
    channels to come making up for the error (GPTQ), and the least squares are of the layer's output.
    """
    out, width = w.shape
    if w.is_meta:
        return {"w": w.new_empty(terms, out, (width + 1) // 2, dtype=torch.uint8), "scale": w.new_empty(terms, out)}
    scale = fitted_scales(w, terms, importance)
    codes = power_terms(w, scale) if gram is None else gptq(w, lambda _, column: _rounded(column, scale), gram, damp, act_order, say).permute(2, 1, 0)
    scale = _refitted(w, codes, scale, importance if gram is None else gram)
    return {"w": pack_codes(codes), "scale": scale}


def fitted_scales(w: Tensor, terms: int = 1, importance: Tensor | None = None, levels: int = POWERS) -> Tensor:
    """[terms, out]: for each row and term the scale with the least squared error, among those that put the largest code at 0.4 to 1.3 of the largest weight."""
    return torch.cat([_fitted(rows, terms, importance, levels) for rows in w.split(ROWS)], 1)


def power_terms(w: Tensor, scale: Tensor, levels: int = POWERS) -> Tensor:
    """Codes [terms, out, in]: the first nearest to w, the next to what is left over."""
    found, rest = [], w
    for s in scale[..., None]:
        found.append(nearest_power(rest / s, levels))
        rest = rest - found[-1] * s
    return torch.stack(found)


def _fitted(w: Tensor, terms: int, importance: Tensor | None, levels: int) -> Tensor:
    found, rest = [], w
    for _ in range(terms):
        largest = rest.abs().amax(1, keepdim=True) / 2 ** (levels - 1)
        largest = torch.where(largest == 0, 1.0, largest)
        best, least = largest, torch.full_like(largest, torch.inf)
        for reach in REACHES:
            scale = reach * largest
            error = (rest - nearest_power(rest / scale, levels) * scale).square()
            error = error.sum(1, keepdim=True) if importance is None else error @ importance.to(w.dtype)[:, None]
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        found.append(best.squeeze(1))
        rest = rest - nearest_power(rest / best, levels) * best
    return torch.stack(found)


def _rounded(column: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One channel's weights [out] -> codes [out, terms] and their values [out]."""
    codes = power_terms(column[:, None], scale)[..., 0]
    return codes.T, (codes * scale).sum(0)


def _refitted(w: Tensor, codes: Tensor, scale: Tensor, weigh: Tensor | None) -> Tensor:
    """Scales by least squares for given codes, one term after the other; `weigh`: E[x^2] [in], E[x x^T] [in, in], or nothing."""
    scale = scale.clone()
    for t, q in enumerate(codes):
        rest = w - sum((codes[i] * scale[i, :, None] for i in _others(len(codes), t)), start=torch.zeros_like(w))
        side = q if weigh is None else q * weigh.to(w.dtype) if weigh.dim() == 1 else q @ weigh.to(w.dtype)
        fitted = (rest * side).sum(1) / (q * side).sum(1)
        scale[t] = torch.where(fitted.isfinite(), fitted, scale[t])
    return scale


def _others(count: int, left_out: int) -> Sequence[int]:
    return [i for i in range(count) if i != left_out]
