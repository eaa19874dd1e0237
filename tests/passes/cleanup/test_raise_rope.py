"""The rotation of two halves becomes rope; other rotations stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewright.passes.cleanup.canonical_views import CanonicalViews
from rewright.passes.cleanup.drop_no_ops import DropNoOps
from rewright.passes.cleanup.raise_rope import RaiseRope


def _by_slices(x):
    h = x.shape[-1] // 2
    return torch.cat((-x[..., h:], x[..., :h]), dim=-1)


def _by_chunk(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _third(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


def _other_axis(x):
    return torch.cat((-x[:, 2:], x[:, :2]), dim=1)


class _Rope(nn.Module):
    def __init__(self, half, swapped=False) -> None:
        super().__init__()
        self.half, self.swapped = half, swapped

    def forward(self, x, cos, sin):
        return sin * self.half(x) + cos * x if self.swapped else (x * cos) + (self.half(x) * sin)


def _run(apply, module, d=8, **more):
    static = {"x": {0: "b"}, "cos": {}, "sin": {}}
    return apply(
        module, (torch.randn(3, 4, d), torch.randn(4, d), torch.randn(4, d)), CanonicalViews(), DropNoOps(), RaiseRope(), dynamic_shapes=static, **more
    )


@pytest.mark.parametrize("half", [_by_slices, _by_chunk])
@pytest.mark.parametrize("swapped", [False, True])
def test_raises_either_way_to_halve(apply, half, swapped) -> None:
    done = _run(apply, _Rope(half, swapped))
    assert list(done.after.elements()) == ["rope"]
    for b in (1, 3):
        assert done.error(torch.randn(b, 4, 8), torch.randn(4, 8), torch.randn(4, 8)) == 0


def test_declines_parts_that_are_no_halves_and_says_so(apply) -> None:
    done = _run(apply, _Rope(_third), d=12)
    assert done.reasons == ["the parts are not the two halves of 12 channels"]


def test_declines_another_axis_and_says_so(apply) -> None:
    done = _run(apply, _Rope(_other_axis))
    assert done.reasons == ["it turns along axis 1, not along the last one"]
