"""y = x (sum_t diag(scale_t) w_t)^T + b, w_t of 0 and +-2^k      x: [..., in]   w: uint8 [terms, out, ceil(in/2)]   scale: [terms, out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import ACTIVATIONS, POWERS, codes, grid
from ..pot import VALUES, pack_codes, unpack_codes
from ._semantic import semantic

LARGEST = VALUES[-1]


@semantic("shift_linear(Tensor x, Tensor w, Tensor scale, Tensor? b, str activations) -> Tensor")
def shift_linear(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """Linear whose products are shifts (DeepShift, Elhoushi et al. 2021): weights are one or two power-of-two terms with a scale a row.

    w: packed codes of ir.pot, four bits each. activations: "int8-dynamic" (one range for all of x, as it comes), "int8-token"
    (one a row) or "none". With quantized activations products and sums are integers: x's codes shifted left and added,
    exact below 2^24 in float32 (2,000 inputs of the largest size) and in float64 always. Gradients pass straight through x's rounding.
    """
    return shift_product(x, [unpack_codes(part, x.shape[-1]) for part in w], scale, b, activations)


def shift_product(x: Tensor, terms: list[Tensor], scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """The same for terms [out, in] that are unpacked, and may carry gradients."""
    form = ACTIVATIONS[activations]
    if form is None:
        weight = sum((term.to(x.dtype) * s[:, None] for term, s in zip(terms, scale.to(x.dtype))), start=x.new_zeros(()))
        return torch.nn.functional.linear(x, weight, b)
    wide = x.float() if x.dtype.itemsize < 4 else x  # sums of integers need the bits
    on = grid(wide.detach(), form)
    q = codes(wide, on, form) - on.zero_point
    y = sum((torch.nn.functional.linear(q, term.to(wide.dtype)) * s for term, s in zip(terms, scale.to(wide.dtype))), start=wide.new_zeros(()))
    y = (y * on.scale).to(x.dtype)
    return y if b is None else y + b


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One and two terms, every kind of activations, an odd width, three axes, no bias, a row and a token of zeros, every code."""
    for shape, out, terms, activations, bias in [
        ((5, 64), 16, 1, "int8-dynamic", True),
        ((7, 123), 33, 2, "int8-token", False),
        ((2, 3, 256), 24, 1, "none", True),
        ((4, 31), 8, 2, "int8-dynamic", True),
    ]:
        x = torch.randn(shape, device=device, dtype=dtype)
        x[..., 0, :] = 0
        value = torch.tensor(VALUES, device=device)[torch.randint(0, POWERS + 1, (terms, out, shape[-1]), device=device)]
        value = value * torch.randint(0, 2, value.shape, device=device).mul(2).sub(1)
        value[:, 0] = 0
        scale = torch.rand(terms, out, device=device, dtype=dtype) * 0.02 + 0.001
        yield x, pack_codes(value), scale, torch.randn(out, device=device, dtype=dtype) if bias else None, activations
