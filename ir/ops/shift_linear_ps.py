"""shift_linear over trainable exponents and signs      x: [..., in]   shift, sign: [out, in]   largest: [1, out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import POWERS, straight_through
from ._semantic import semantic
from .shift_linear import LARGEST, shift_product


@semantic("shift_linear_ps(Tensor x, Tensor shift, Tensor sign, Tensor largest, Tensor? b, str activations) -> Tensor")
def shift_linear_ps(x: Tensor, shift: Tensor, sign: Tensor, largest: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """The form in which shift_linear is trained on its exponents and signs themselves (DeepShift-PS): w = 2^round(shift) sign(round(sign)).

    shift: kept within 0 to 6. sign: from -0.5 to 0.5 the weight is 0. largest: as in shift_linear_q. Gradients pass straight through both roundings.
    """
    return shift_product(x, [ps_codes(shift, sign)], largest / LARGEST, b, activations)


def ps_codes(shift: Tensor, sign: Tensor) -> Tensor:
    """The codes [out, in]."""
    exponent = straight_through(shift.clamp(0, POWERS - 1), torch.round)
    return torch.exp2(exponent) * straight_through(sign, lambda s: s.round().sign())


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Exponents beyond both ends, signs that round to 0, quantized and float activations, an odd width, no bias."""
    for shape, out, activations, bias in [((5, 64), 16, "int8-dynamic", True), ((2, 3, 31), 8, "none", False)]:
        x = torch.randn(shape, device=device, dtype=dtype)
        shift = torch.rand(out, shape[-1], device=device, dtype=dtype) * 9 - 1.5
        largest = torch.rand(1, out, device=device, dtype=dtype) + 0.5
        yield x, shift, torch.randn_like(shift), largest, torch.randn(out, device=device, dtype=dtype) if bias else None, activations
