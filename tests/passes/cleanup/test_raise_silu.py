"""x * sigmoid(x) becomes silu, and nothing else does."""

from __future__ import annotations

import torch
from torch import nn

from rewright.passes.cleanup.raise_silu import RaiseSiLU


class _Act(nn.Module):
    def forward(self, x, y):
        return torch.sigmoid(x) * x + y * torch.sigmoid(x + 1)


def test_raises_silu_and_leaves_a_gate_by_another_value(apply) -> None:
    done = apply(_Act(), (torch.randn(3, 8), torch.randn(3, 8)), RaiseSiLU())
    assert (done.before["silu"], done.after["silu"]) == (0, 1)
    assert done.after["sigmoid"] == 1
    for b in (1, 3):
        assert done.error(torch.randn(b, 8), torch.randn(b, 8)) < 1e-6
