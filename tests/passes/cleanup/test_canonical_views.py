"""Ten spellings of layout become reshape and permute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewright.passes.cleanup.canonical_views import CanonicalViews


class _View(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: x.view(x.shape[0], -1), "reshape"),
        (lambda x: x.flatten(1), "reshape"),
        (lambda x: x.flatten(0, 1), "reshape"),
        (lambda x: x.unflatten(-1, (2, 4)), "reshape"),
        (lambda x: x.transpose(-1, 1), "permute"),
        (lambda x: x.permute(0, -1, 1), "permute"),
        (lambda x: x[0].t(), "permute"),
        (lambda x: x.transpose(0, 1).reshape(6, -1), "reshape"),
    ],
)
def test_one_spelling(apply, function, op) -> None:
    done = apply(_View(function), (torch.randn(3, 6, 8),), CanonicalViews())
    assert done.after[op] == 1
    assert not {"view", "_unsafe_view", "flatten", "unflatten", "transpose", "t"} & set(done.after)
    for b in (1, 3, 5):
        assert done.error(torch.randn(b, 6, 8)) == 0


def test_two_in_a_row_are_one(apply) -> None:
    done = apply(_View(lambda x: x.transpose(1, 2).transpose(0, 2).reshape(-1, 4).view(-1, 2, 2)), (torch.randn(3, 6, 8),), CanonicalViews())
    done.graph.clean()
    assert (done.after["permute"], done.after["reshape"]) == (1, 1)
    assert done.error(torch.randn(5, 6, 8)) == 0


def test_a_second_run_finds_nothing(apply) -> None:
    done = apply(_View(lambda x: x.flatten(1).view(-1, 4, 12).transpose(1, 2)), (torch.randn(3, 6, 8),), CanonicalViews())
    from rewright.passes.rewrite import Context

    context = Context()
    done.graph.clean()
    CanonicalViews().run(done.graph, context)
    assert context.applied == []
