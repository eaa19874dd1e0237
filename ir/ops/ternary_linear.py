"""y = s_t scale (q(x_t / s_t) w^T) + b, w in {-1, 0, 1}, s_t = max |x_t| / 127     x: [..., in]   w: uint8 [out, ceil(in / 4)]   scale: [out] or [1]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import pack, straight_through, unpack
from ._semantic import semantic

LEAST = 1e-5
"""A token's largest value counts as no less."""


@semantic("ternary_linear(Tensor x, Tensor w, Tensor scale, Tensor? b, str activations) -> Tensor")
def ternary_linear(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """Linear whose weights are -1, 0 and 1: its sums only add and subtract, and are scaled afterwards (BitNet b1.58, MatMul-free LM).

    w: four 2-bit codes a byte, the value + 1, the first channel in the low bits; a short last byte is filled up with anything.
    activations: "none" adds up x as it is; "int8-token" the codes round(x_t (127 / max(|x_t|, 1e-5))), in float32 or x's own float64:
    exact sums up to 132,104 channels. That is BitLinear's rounding to the last bit (transformers' integrations/bitnet.py), and it is
    not linear_token's x / (max / 127), which falls to the other side of some ties.
    Gradients reach scale, b and x, straight through the rounding (Bengio et al. 2013).
    """
    if activations == "none":
        y = torch.nn.functional.linear(x, ternary(w, x)) * scale.to(x.dtype)
    elif activations == "int8-token":
        f = x if x.dtype == torch.float64 else x.float()
        codes, inverse = token_codes(f)
        y = (torch.nn.functional.linear(codes, ternary(w, f)) * (scale.to(f.dtype) / inverse)).to(x.dtype)
    else:
        raise ValueError(f"activations must be none or int8-token, got {activations!r}")
    return y if b is None else y + b


def ternary(w: Tensor, x: Tensor) -> Tensor:
    """Packed codes as -1, 0 and 1 in x's dtype: [out, in]."""
    return unpack(w, 2, x.shape[-1]).to(x.dtype) - 1


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of every token, and what its values were multiplied by to become them."""
    inverse = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=LEAST)
    return straight_through(x * inverse, lambda v: v.round().clamp(-128, 127)), inverse


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Tokens of very different size, one of zeros, one below 1e-5; a width that leaves one, two and three codes free; one scale; three axes; no bias."""
    for shape, out, activations, scales, bias in [
        ((5, 64), 16, "int8-token", 16, True),
        ((7, 123), 33, "none", 1, True),
        ((2, 3, 254), 64, "int8-token", 1, False),
        ((4, 129), 8, "none", 8, False),
        ((6, 40), 12, "int8-token", 12, True),
    ]:
        x = torch.randn(shape, device=device, dtype=dtype) * torch.logspace(-2, 2, shape[-2], device=device, dtype=dtype)[:, None]
        x[..., 0, :] *= 0 if out == 16 else 1e-5
        w = pack(torch.randint(0, 3, (out, shape[-1]), device=device), 2)
        b = torch.randn(out, device=device, dtype=dtype) if bias else None
        yield x, w, torch.rand(scales, device=device) + 0.01, b, activations
