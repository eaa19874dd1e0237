"""What depends on weights alone is computed once."""

from __future__ import annotations

import torch
from torch import nn

from rewright.ir.capture import capture
from rewright.passes.cleanup.fold_constants import FoldConstants
from rewright.passes.rewrite import Context


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * (1 + self.w).exp()


class _Grown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return x + self.w.expand(1000, 8).clone().sum(0)


class _Random(nn.Module):
    def forward(self, x):
        return x + torch.rand(8)


def test_folds_a_chain_into_one_weight_with_a_recipe(apply) -> None:
    done = apply(_Scaled(), (torch.randn(3, 8),), FoldConstants())
    assert done.after == {"mul": 1}
    done.graph.clean()
    (name,) = done.graph.weights()
    assert name in done.graph.recipes
    assert done.error(torch.randn(1, 8)) == 0


def test_the_recipe_fills_a_graph_without_weights() -> None:
    with torch.device("meta"):
        empty = _Scaled()
    graph = capture(empty, (torch.randn(3, 8, device="meta"),))
    FoldConstants().run(graph, Context())
    graph.clean()
    full = _Scaled()
    graph.materialize(dict(full.named_parameters()))
    graph.recompile()
    x = torch.randn(2, 8)
    assert torch.equal(graph(x), full(x))


def test_declines_what_grows_beyond_the_budget_and_says_the_bytes(apply) -> None:
    done = apply(_Grown(), (torch.randn(3, 8),), FoldConstants(budget_bytes=1000))
    assert done.reasons[0] == "the folded value needs 32,000 bytes, 32 are freed, and the budget is 1,000"
    assert apply(_Grown(), (torch.randn(3, 8),), FoldConstants()).after == {"add": 1}


def test_never_folds_random_numbers(apply) -> None:
    done = apply(_Random(), (torch.randn(3, 8),), FoldConstants())
    assert done.after["rand"] == 1


def test_a_part_of_a_split_weight_is_a_weight(apply) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 8))

        def forward(self, x):
            a, b = self.w.split([4, 8])
            return torch.nn.functional.linear(x, a).sum() + torch.nn.functional.linear(x, b)

    x = torch.randn(3, 8)
    done = apply(Split(), (x,), FoldConstants())
    done.graph.clean()
    assert sorted(tuple(t.shape) for t in done.graph.weights().values()) == [(4, 8), (8, 8)]
    assert all(done.graph.recipes[name].sources == ("w",) for name in done.graph.weights())
    assert done.error(x) == 0
