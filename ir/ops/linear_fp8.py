"""y_t = s_t q(x_t / s_t) (diag(scale) w)^T + b, s_t = max |x_t| / 448      x: [..., in]   w: float8_e4m3fn [out, in]   scale: [out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import ACTIVATIONS, FP8_MAX, fake_quantize
from ._semantic import semantic


@semantic("linear_fp8(Tensor x, Tensor w, Tensor scale, Tensor? b=None) -> Tensor")
def linear_fp8(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """Linear in float8 E4M3: weights scaled per output channel, every token (row of x) over its own range as it comes.

    Gradients pass straight through the rounding of x (Bengio et al. 2013); the codes w have none, their scale has.
    """
    weight = w.detach().to(x.dtype) * scale.to(x.dtype)[:, None]
    return torch.nn.functional.linear(fake_quantize(x, ACTIVATIONS["fp8-token"]), weight, b)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Tokens of very different size, a token of zeros, codes from the smallest to the largest, three axes, no bias."""
    for shape, out, bias in [((5, 64), 16, True), ((7, 123), 33, False), ((2, 3, 256), 64, True)]:
        x = torch.randn(shape, device=device, dtype=dtype) * torch.logspace(-2, 2, shape[-2], device=device, dtype=dtype)[:, None]
        x[..., 0, :] = 0
        w = torch.randn(out, shape[-1], device=device)
        w = (w / w.abs().amax() * FP8_MAX * torch.logspace(-5, 0, out, device=device)[:, None]).to(torch.float8_e4m3fn)
        yield x, w, torch.rand(out, device=device) * 0.01 + 0.001, torch.randn(out, device=device, dtype=dtype) if bias else None
