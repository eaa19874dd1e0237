"""ternary_linear on a GPU: codes of 2 bits become -1, 0 and 1 on their way into the product, an int8 one for quantized x."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat
from ._packed import Packed, linear
from ._quantize import over_rows


def launch(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """y of the op."""
    weights = Packed("ternary", w.contiguous()[None], 2, scale.contiguous()[None])
    with torch.cuda.device_of(x):
        return linear(flat(x) if activations == "none" else over_rows(flat(x), "ternary", 127), weights, dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A vector and every tile, edges beside a tile's, both kinds of activations and of scale."""
    for m, n, k, scales, activations in [
        (2, 48, 640, 1, "int8-token"),
        (1, 24, 101, 24, "none"),
        (5, 40, 207, 40, "none"),
        (33, 24, 300, 1, "int8-token"),
        (70, 72, 128, 72, "int8-token"),
        (70, 72, 130, 72, "int8-token"),
        (130, 136, 192, 1, "int8-token"),
        (131, 130, 64, 1, "none"),
    ]:
        x = torch.randn(m, k, dtype=dtype, device=device) + 1
        w = torch.randint(0, 256, (n, -(-k // 4)), device=device, dtype=torch.uint8) & 0b10101010
        yield x, w, torch.rand(scales, device=device) + 0.01, torch.randn(n, dtype=dtype, device=device), activations
