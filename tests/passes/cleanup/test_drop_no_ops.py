"""What changes nothing goes; what changes something stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewright.passes.cleanup.drop_no_ops import DropNoOps


class _Through(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.drop = function, nn.Dropout(0.5)

    def forward(self, x):
        return self.function(self, x).relu()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.drop(x),
        lambda m, x: x.contiguous().clone(),
        lambda m, x: x.to(torch.float32).float(),
        lambda m, x: x[:, :],
        lambda m, x: x[:, 0:],
        lambda m, x: x.view(x.shape),
        lambda m, x: x.expand(-1, 8),
        lambda m, x: x.permute(0, 1).detach(),
        lambda m, x: x * 1.0 / 1,
        lambda m, x: torch.cat([x]),
        lambda m, x: torch.cat([torch.tensor([]), x], -2),
        lambda m, x: torch.cat([x, torch.zeros(0, 8)]),
    ],
)
def test_drops(apply, function) -> None:
    done = apply(_Through(function), (torch.randn(3, 8),), DropNoOps())
    done.graph.clean()
    assert list(done.after.elements()) == ["relu"]
    assert done.error(torch.randn(1, 8)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.double(),
        lambda m, x: x[:, ::2],
        lambda m, x: x[:, 1:],
        lambda m, x: x.t(),
        lambda m, x: x.expand(2, -1, -1),
        lambda m, x: x + 0,
        lambda m, x: x * 1.5,
        lambda m, x: torch.cat([x, torch.zeros(1, 8)]),
    ],
)
def test_keeps(apply, function) -> None:
    done = apply(_Through(function), (torch.randn(3, 8),), DropNoOps())
    assert sum(done.after.values()) >= 2
    assert done.error(torch.randn(5, 8)) == 0


def test_keeps_a_cat_with_nothing_of_a_wider_type(apply) -> None:
    done = apply(_Through(lambda m, x: torch.cat([torch.zeros(0, dtype=torch.float64), x])), (torch.randn(3, 8),), DropNoOps())
    assert done.after["cat"] == 1
    assert done.error(torch.randn(5, 8)) == 0
