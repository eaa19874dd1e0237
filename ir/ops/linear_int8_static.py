"""y = x_scale (q(x) - x_zero_point) (diag(scale) w)^T + b      x: [..., in]   w: int8 [out, in]   scale: [out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import straight_through
from ._semantic import semantic


@semantic("linear_int8_static(Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor w, Tensor scale, Tensor? b=None) -> Tensor")
def linear_int8_static(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """W8A8 linear with a calibrated range: weights symmetric per output channel, x in uint8 codes of one fixed grid.

    x_scale: a float number; x_zero_point: a uint8 number. What lies outside the grid is clipped. The rounding is that of
    ONNX QuantizeLinear. Sums of uint8 times int8 products stay within int32 for in <= 66311.

    Gradients pass straight through the rounding (Bengio et al. 2013) and stop where x is clipped; x_scale learns by what
    is left: the rounding error inside the range, the limit outside (LSQ: Esser et al. 2020, eq. 3).
    """
    step, zero = x_scale.to(x.dtype), x_zero_point.to(x.dtype)
    steps = straight_through(torch.clamp(x / step, -zero, 255 - zero), torch.round)
    return torch.nn.functional.linear(steps * step, w.to(x.dtype) * scale.to(x.dtype)[:, None], b)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Values beyond both ends, a zero point at each end, ties, a ragged width, three axes, no bias."""
    for shape, out, zero, step, bias in [
        ((5, 64), 16, 128, 0.01, True),
        ((7, 123), 33, 0, 0.03, False),
        ((2, 3, 256), 64, 255, 0.03, True),
        ((4, 32), 8, 77, 0.5, True),
    ]:
        x = torch.randn(shape, device=device, dtype=dtype)
        x = (x * 4).round() / 4 if step == 0.5 else x  # halves of a step
        w = torch.randint(-127, 128, (out, shape[-1]), device=device, dtype=torch.int8)
        grid = torch.tensor(step, device=device), torch.tensor(zero, device=device, dtype=torch.uint8)
        yield x, *grid, w, torch.rand(out, device=device) * 0.01 + 0.001, torch.randn(out, device=device, dtype=dtype) if bias else None
