"""y_t = c_t . h_t,  h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t        x, dt: [B, d, L]   a: [d, N]   b, c: [B, N, L]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import opaque


def _shape(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@opaque("selective_scan(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c) -> Tensor", _shape)
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's recurrence (Gu & Dao 2023, algorithm 2), step by step as in transformers, with a zero state before it. Returns [B, d, L]."""
    decay, drive = discretised(x, dt, a, b)
    state = torch.zeros(x.shape[0], x.shape[1], a.shape[1], dtype=x.dtype, device=x.device)  # [B, d, N]
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append((state.to(x.dtype) @ c[:, :, t, None])[:, :, 0])
    return torch.stack(outputs, -1)


def discretised(x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What the state is multiplied by and what is added to it at every step, both [B, d, L, N]."""
    decay = torch.exp(a[None, :, None, :] * dt[:, :, :, None])
    drive = dt[:, :, :, None] * b.transpose(1, 2)[:, None].float() * x[:, :, :, None].float()
    return decay, drive


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One step (no memory), a ragged batch, a long one in which only slow states remember."""
    for batch, d, length, n in [(1, 3, 1, 2), (2, 4, 5, 3), (1, 2, 40, 8)]:
        x, b, c = (torch.randn(s, device=device, dtype=dtype) for s in ((batch, d, length), (batch, n, length), (batch, n, length)))
        dt = torch.rand(batch, d, length, device=device, dtype=dtype)
        yield x, dt, -torch.rand(d, n, device=device, dtype=dtype) * 2, b, c
