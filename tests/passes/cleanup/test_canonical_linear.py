"""Products with a weight become linear."""

from __future__ import annotations

import torch
from torch import nn

from rewright.passes.cleanup.canonical_linear import CanonicalLinear
from rewright.passes.cleanup.canonical_views import CanonicalViews


class _Product(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.w, self.v, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.function(self, x)


def _run(apply, function, shape=(3, 8)):
    done = apply(_Product(function), (torch.randn(shape),), CanonicalViews(), CanonicalLinear())
    done.graph.clean()
    for b in (1, 3, 5):
        assert done.error(torch.randn(b, *shape[1:])) < 1e-6
    return done


def test_products_with_a_weight(apply) -> None:
    assert _run(apply, lambda m, x: x @ m.w).after == {"linear": 1}
    assert _run(apply, lambda m, x: x.mm(m.w)).after == {"linear": 1}
    assert _run(apply, lambda m, x: torch.addmm(m.b, x, m.w)).after == {"linear": 1}
    assert _run(apply, lambda m, x: x @ m.w + m.b, (3, 4, 8)).after == {"linear": 1}


def test_the_transposed_weight_is_a_recipe_and_a_transposed_one_is_taken_as_it_is(apply) -> None:
    assert _run(apply, lambda m, x: x @ m.w).graph.recipes["w_t"].sources == ("w",)
    straight = _run(apply, lambda m, x: x @ m.v.t())
    assert (straight.after, list(straight.graph.weights()), straight.graph.recipes) == ({"linear": 1}, ["v"], {})


def test_reshapes_around_a_conv1d_go(apply) -> None:
    def conv1d(m, x):
        return torch.addmm(m.b, x.view(-1, 8), m.w).view(*x.shape[:-1], 6)

    assert _run(apply, conv1d, (3, 4, 8)).after["linear"] == 1
    assert "reshape" not in _run(apply, conv1d, (3, 4, 8)).after


def test_a_conv1d_after_merging_heads_keeps_one_reshape(apply) -> None:
    def conv1d(m, x):
        y = x.transpose(1, 2).reshape(x.shape[0], 4, 8)
        return torch.addmm(m.b, y.view(-1, 8), m.w).view(*y.shape[:-1], 6)

    done = _run(apply, conv1d, (3, 2, 4, 4))
    assert (done.after["reshape"], done.after["linear"]) == (1, 1)
    assert done.graph.nodes[-1].target is torch.ops.aten.linear.default


def test_declines_and_says_why(apply) -> None:
    assert _run(apply, lambda m, x: torch.addmm(m.b, x, m.w, alpha=2)).reasons == ["addmm scales its terms (beta 1, alpha 2)"]
    assert _run(apply, lambda m, x: torch.addmm(x[:, :6], x, m.w)).reasons == ["the added term is not a bias vector"]
    assert _run(apply, lambda m, x: (y := x @ m.w).relu() + (y + m.b)).reasons == ["linear is also read without the bias"]
    assert _run(apply, lambda m, x: torch.add(x @ m.w, m.b, alpha=2)).reasons == ["the add scales its second term"]
    assert _run(apply, lambda m, x: x @ x.t()).after["linear"] == 0
