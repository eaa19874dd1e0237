"""Every spelling of GELU becomes one node."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rewright.passes.cleanup.raise_gelu import RaiseGELU

C = math.sqrt(2 / math.pi)
ERF = {
    "bert": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "half last": lambda x: 0.5 * (x * (torch.erf(x * 0.7071067811865476) + 1)),
    "half in the gate": lambda x: x * ((1 + torch.erf(x / 1.4142135623730951)) * 0.5),
    "divided by two": lambda x: x / 2 * (1 + torch.erf(x / 1.4142135623730951)),
    "onnx": lambda x: x * (torch.erf(x / torch.tensor(1.4142135)) + torch.tensor(1.0)) * torch.tensor(0.5),
}
TANH = {
    "gpt2": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "cube by products": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * x * x * x))),
    "cube alone": lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.044715 * (x * x * x)))),
    "bloom": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
}
QUICK = {"clip": lambda x: x * torch.sigmoid(1.702 * x), "swapped": lambda x: torch.sigmoid(x * 1.702) * x}


class _Act(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("spellings", "name", "approximate"), [(ERF, "gelu", None), (TANH, "gelu", "tanh"), (QUICK, "quick_gelu", None)], ids=["erf", "tanh", "quick"]
)
def test_raises_every_spelling(apply, spellings, name, approximate) -> None:
    for spelling, function in spellings.items():
        done = apply(_Act(function), (torch.randn(3, 16),), RaiseGELU())
        assert done.after[name] == 1, spelling
        assert sum(done.after.values()) - done.after["lift_fresh_copy"] == 1, spelling
        assert done.graph.nodes[-1].kwargs.get("approximate") == approximate, spelling
        for shape in [(3, 16), (1, 16), (7, 16)]:
            assert done.error(torch.randn(shape) * 3) < 2e-6, spelling


def test_leaves_other_constants(apply) -> None:
    for function in (
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: 0.5 * x * (1.0 + torch.erf(x)),
        lambda x: 0.5 * x * (1 + torch.tanh(C * (x + 0.04 * x**3))),
    ):
        done = apply(_Act(function), (torch.randn(3, 16),), RaiseGELU())
        assert done.after == done.before


def test_declines_a_constant_that_promotes_and_says_so(apply) -> None:
    half = torch.randn(3, 16).to(torch.float16)
    done = apply(_Act(lambda x: x * torch.tensor([0.5]) * (1.0 + torch.erf(x / math.sqrt(2.0)))), (half,), RaiseGELU())
    assert done.reasons == ["a constant promotes torch.float16 to torch.float32"]


def test_declines_a_constant_that_broadcasts_and_says_so(apply) -> None:
    done = apply(_Act(lambda x: x * torch.full((1, 1, 1), 0.5) * (1.0 + torch.erf(x / math.sqrt(2.0)))), (torch.randn(3, 16),), RaiseGELU())
    assert done.after["gelu"] == 0
    assert all("a constant broadcasts" in why for why in done.reasons)
