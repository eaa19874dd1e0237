"""linear_nbits on a GPU: codes of 2, 4 or 8 bits become floats on their way into the product; for few rows memory traffic is theirs alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat
from ._packed import Packed, linear


def launch(x: Tensor, w: Tensor, scale: Tensor, zero_point: Tensor | None, b: Tensor | None, bits: int, group_size: int) -> Tensor:
    """y of the op."""
    weights = Packed("uniform", w.contiguous().view(1, w.shape[0], -1), bits, scale.contiguous(), dense(zero_point), group_size)
    with torch.cuda.device_of(x):
        return linear(flat(x), weights, dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A vector and every tile; groups shorter and longer than a step, and of 48; every kind of zero point and of width."""
    for m, n, k, bits, group, zeros in [
        (2, 48, 640, 4, 128, "packed"),
        (5, 40, 192, 2, 16, "float"),
        (5, 40, 208, 2, 16, "float"),
        (70, 72, 320, 4, 32, "packed"),
        (70, 72, 330, 4, 32, "packed"),
        (130, 136, 256, 4, 128, "none"),
        (33, 24, 100, 8, 48, "packed"),
        (1, 24, 100, 2, 48, "packed"),
    ]:
        groups = -(-k // group)
        w = torch.randint(0, 256, (n, groups, group * bits // 8), device=device, dtype=torch.uint8)
        scale = torch.rand(n, groups, device=device, dtype=dtype) * 0.1 + 0.01
        packed = torch.randint(0, 256, (n, -(-groups * bits // 8)), device=device, dtype=torch.uint8)
        zero = {"packed": packed, "float": torch.rand(n, groups, device=device, dtype=dtype) * 2**bits, "none": None}[zeros]
        yield torch.randn(m, k, dtype=dtype, device=device), w, scale, zero, torch.randn(n, dtype=dtype, device=device), bits, group
