"""y_t = s_t q(x_t / s_t) (diag(scale) w)^T + b, s_t = max |x_t| / (2^(bits-1) - 1)      x: [..., in]   w: int8 [out, in]   scale: [out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import Format, fake_quantize
from ._semantic import semantic


@semantic("linear_token(Tensor x, Tensor w, Tensor scale, Tensor? b=None, int bits=8) -> Tensor")
def linear_token(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, bits: int = 8) -> Tensor:
    """Linear whose tokens (rows of x) each have a range of their own, symmetric, in `bits` bits as they come.

    w: codes of 8 bits or fewer, symmetric with one scale an output channel. The sum of a row's products is scaled twice, by
    its token's step and its channel's. Gradients pass straight through the rounding (Bengio et al. 2013).
    """
    return torch.nn.functional.linear(fake_quantize(x, Format("int", bits, "row")), w.to(x.dtype) * scale.to(x.dtype)[:, None], b)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Tokens of very different size, a token of zeros, 8, 6 and 4 bits, a ragged width, three axes, no bias."""
    for shape, out, bits, bias in [((5, 64), 16, 8, True), ((7, 123), 33, 6, False), ((2, 3, 256), 64, 4, True)]:
        x = torch.randn(shape, device=device, dtype=dtype) * torch.logspace(-2, 2, shape[-2], device=device, dtype=dtype)[:, None]
        x[..., 0, :] = 0
        high = 2 ** (bits - 1) - 1
        w = torch.randint(-high, high + 1, (out, shape[-1]), device=device, dtype=torch.int8)
        yield x, w, torch.rand(out, device=device) + 0.01, torch.randn(out, device=device, dtype=dtype) if bias else None, bits
