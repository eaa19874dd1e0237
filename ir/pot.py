"""Power-of-two codes: 0 and +-1, 2, 4 ... 64, whose products are shifts. Four bits a code: its sign, and 0 for zero or 1 + its exponent."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import POWERS, pack

BITS = 4
VALUES = (0, *(2**i for i in range(POWERS)))
"""Of the 3 bits below the sign."""


def pack_codes(codes: Tensor) -> Tensor:
    """Codes [..., in] -> uint8 [..., ceil(in / 2)], the first in the low bits."""
    size = codes.abs()
    exponent = sum((size >= v).to(torch.uint8) for v in VALUES[1:])
    return pack((codes < 0).to(torch.uint8) * 2 ** (BITS - 1) + exponent, BITS)


def unpack_codes(packed: Tensor, width: int) -> Tensor:
    """uint8 [..., ceil(in / 2)] -> codes [..., in] as int8: the weights' exact 8-bit form. float8 (E4M3, E5M2) and bfloat16 hold them exactly too."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.int8, device=packed.device)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)  # [256, 2]: of a byte, the low half first
    return torch.nn.functional.embedding(packed.to(torch.int32), pairs).flatten(-2)[..., :width]


def shift_add(x: Tensor, codes: Tensor) -> Tensor:
    """x codes^T by left shifts, additions and subtractions of integers alone: x [n, in], codes [out, in] -> int64 [n, out].

    What every faster form must equal. Left shifts lose nothing; right shifts of products scaled the other way would round towards -inf.
    """
    total = torch.zeros(len(x), len(codes), dtype=torch.int64)
    for i, value in enumerate(VALUES[1:]):
        shifted = torch.bitwise_left_shift(x.to(torch.int64), i)
        for row, out in zip(codes, total.T):
            out += shifted[:, row == value].sum(1) - shifted[:, row == -value].sum(1)
    return total
