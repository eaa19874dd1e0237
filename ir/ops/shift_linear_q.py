"""shift_linear over float weights, rounded to powers of two at every call      x: [..., in]   w: [out, in]   largest: [terms, out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import nearest_power, straight_through
from ._semantic import semantic
from .shift_linear import LARGEST, shift_product

CLIPPED = 1.5 * LARGEST  # where the code after the largest one would begin


@semantic("shift_linear_q(Tensor x, Tensor w, Tensor largest, Tensor? b, str activations) -> Tensor")
def shift_linear_q(x: Tensor, w: Tensor, largest: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """The form in which shift_linear is trained (DeepShift-Q): w moves as any weight does and is seen rounded.

    largest: what the largest code of a row stands for, 2^6 times shift_linear's scale: a number of the weights' own size, so that
    one learning rate suits both. Gradients pass straight through the rounding to w, but for weights beyond 1.5 times `largest`, and to
    `largest` as in LSQ (Esser et al. 2020): of a weight that is clipped its sign, else the rounding error. Without that clip it falls to nothing.
    """
    scale = largest / LARGEST
    return shift_product(x, q_terms(w, scale), scale, b, activations)


def q_terms(w: Tensor, scale: Tensor) -> list[Tensor]:
    """Codes [out, in] of each term: the first of w, the next of what it leaves."""
    terms, rest = [], w
    for s in scale.to(w.dtype).split(1):
        terms.append(straight_through((rest / s.T).clamp(-CLIPPED, CLIPPED), nearest_power))
        rest = rest - terms[-1] * s.T
    return terms


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One and two terms, quantized and float activations, an odd width, no bias."""
    for shape, out, terms, activations, bias in [
        ((5, 64), 16, 1, "int8-dynamic", True),
        ((2, 3, 31), 8, 2, "int8-token", False),
        ((4, 16), 8, 1, "none", True),
    ]:
        x = torch.randn(shape, device=device, dtype=dtype)
        largest = torch.rand(terms, out, device=device, dtype=dtype) + 0.5
        largest[1:] /= 8
        yield x, torch.randn(out, shape[-1], device=device, dtype=dtype), largest, torch.randn(out, device=device, dtype=dtype) if bias else None, activations
