"""The same call on the same operands is made once."""

from __future__ import annotations

import torch
from torch import nn

from rewright.passes.cleanup.merge_duplicates import MergeDuplicates


class _F(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def _run(apply, function):
    done = apply(_F(function), (torch.randn(3, 8), torch.randn(3, 8)), MergeDuplicates())
    for b in (1, 3):
        assert done.error(torch.randn(b, 8), torch.randn(b, 8)) == 0
    return done


def test_merges_chains_of_equal_calls(apply) -> None:
    assert _run(apply, lambda x, y: x.exp().relu() + x.exp().relu()).after == {"exp": 1, "relu": 1, "add": 1}


def test_keeps_calls_that_differ_in_an_operand_or_a_literal(apply) -> None:
    assert _run(apply, lambda x, y: x.exp() + y.exp()).after["exp"] == 2
    assert _run(apply, lambda x, y: (x * 2) + (x * 2.0) + (x * 3)).after["mul"] == 3
    assert _run(apply, lambda x, y: x.sum(1) + x.sum(1, keepdim=True).squeeze(1)).after["sum"] == 2


def test_never_merges_random_numbers(apply) -> None:
    done = apply(_F(lambda x, y: x + torch.rand(8) + torch.rand(8)), (torch.randn(3, 8), torch.randn(3, 8)), MergeDuplicates())
    assert done.after["rand"] == 2


def test_one_node_per_dynamic_size(apply) -> None:
    done = _run(apply, lambda x, y: torch.zeros(x.shape[0], 8) + torch.ones(y.exp().shape[0], 8) + x + y.exp())
    assert done.after["sym_size"] == 1
