"""y = s_x (q(x) - z_x) (diag(scale) w)^T + b      x: [..., in]   w: int8 [out, in]   scale: [out]   b: [out]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import ACTIVATIONS, fake_quantize
from ._semantic import semantic


@semantic("linear_int8_dynamic(Tensor x, Tensor w, Tensor scale, Tensor? b=None) -> Tensor")
def linear_int8_dynamic(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    """W8A8 linear: weights symmetric per output channel, x quantized to 8 bits over its present range (all of x, one scale).

    The rounding is that of ONNX DynamicQuantizeLinear, so torch and onnxruntime agree but for ties. Gradients pass
    straight through the rounding (Bengio et al. 2013), so a quantized module can be fine-tuned.
    """
    return torch.nn.functional.linear(fake_quantize(x, ACTIVATIONS["int8-dynamic"]), w.to(x.dtype) * scale.to(x.dtype)[:, None], b)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One sign only (the zero point sits at an end), a wide channel, three axes, no bias, all zeros."""
    for shape, out, sign, bias in [((5, 64), 16, 1, True), ((7, 123), 33, 0, True), ((2, 3, 256), 64, -1, False), ((4, 32), 8, 0, True)]:
        x = torch.randn(shape, device=device, dtype=dtype)
        x = x.abs() * sign if sign else x
        x = x * 0 if out == 8 else x
        x[..., 0] *= 20
        w = torch.randint(-127, 128, (out, shape[-1]), device=device, dtype=torch.int8)
        yield x, w, torch.rand(out, device=device, dtype=torch.float32) + 0.01, torch.randn(out, device=device, dtype=dtype) if bias else None
