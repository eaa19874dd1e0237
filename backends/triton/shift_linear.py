"""shift_linear on a GPU: codes of 4 bits become 0 and +-2^k on their way into one product (an int8 one for quantized x), or two with two terms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._gemm import dense, flat
from ._packed import Packed, linear
from ._quantize import over_all, over_rows


def launch(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, activations: str) -> Tensor:
    """y of the op."""
    weights = Packed("shift", w.contiguous(), 4, scale.contiguous())
    with torch.cuda.device_of(x):
        if activations == "none":
            return linear(flat(x), weights, dense(b), x)
        return linear(over_all(flat(x)) if activations == "int8-dynamic" else over_rows(flat(x), "int", 127), weights, dense(b), x)


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A vector and every tile, edges beside a tile's, odd widths, one and two terms, every kind of activations."""
    for m, n, k, terms, activations in [
        (2, 48, 640, 2, "int8-dynamic"),
        (2, 24, 101, 1, "int8-dynamic"),
        (1, 24, 100, 1, "none"),
        (5, 40, 207, 2, "none"),
        (33, 24, 300, 1, "int8-token"),
        (5, 40, 192, 2, "int8-token"),
        (70, 72, 128, 2, "int8-dynamic"),
        (70, 72, 130, 2, "int8-dynamic"),
        (130, 136, 192, 1, "int8-dynamic"),
        (131, 130, 96, 1, "none"),
        (131, 130, 96, 2, "none"),
    ]:
        x = torch.randn(m, k, dtype=dtype, device=device) + 1
        w = torch.randint(0, 256, (terms, n, -(-k // 2)), device=device, dtype=torch.uint8)
        scale = torch.rand(terms, n, dtype=dtype, device=device) * 0.02 + 0.001
        yield x, w, scale, torch.randn(n, dtype=dtype, device=device), activations
