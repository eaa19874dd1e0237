"""LayerNorm in parts becomes one node, scale and shift included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewright.passes.cleanup.raise_layer_norm import RaiseLayerNorm


def _pow_sqrt(x):
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5)


def _product_rsqrt(x):
    d = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(1e-5 + (d * d).mean(-1, keepdim=True)) * d


def _var(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def _var_correction(x):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5)


def _reciprocal(x):
    d = x - x.mean(-1, keepdim=True)
    return d * (1.0 / torch.sqrt(torch.square(d).mean(-1, keepdim=True) + 1e-5))


def _unbiased(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)


class _Norm(nn.Module):
    def __init__(self, normal, scale=True, shift=True, width=16) -> None:
        super().__init__()
        self.normal, self.scale, self.shift = normal, scale, shift
        self.w, self.b = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = self.normal(x)
        y = y * self.w if self.scale else y
        return y + self.b if self.shift else y


@pytest.mark.parametrize("normal", [_pow_sqrt, _product_rsqrt, _var, _var_correction, _reciprocal])
@pytest.mark.parametrize(("scale", "shift"), [(True, True), (True, False), (False, False)])
def test_raises_every_spelling_with_what_follows(apply, normal, scale, shift) -> None:
    done = apply(_Norm(normal, scale, shift), (torch.randn(3, 16),), RaiseLayerNorm())
    assert list(done.after.elements()) == ["layer_norm"]
    for x in (torch.randn(1, 16), torch.randn(5, 16) * 1e-3, torch.randn(2, 16) + 30):
        assert done.error(x) < 2e-5


def test_leaves_the_unbiased_variance(apply) -> None:
    assert apply(_Norm(_unbiased), (torch.randn(3, 16),), RaiseLayerNorm()).after["layer_norm"] == 0


def test_declines_another_axis_and_says_so(apply) -> None:
    def first(x):
        d = x - x.mean(1, keepdim=True)
        return d * torch.rsqrt(d.pow(2).mean(1, keepdim=True) + 1e-5)

    done = apply(_Norm(first), (torch.randn(3, 4, 16),), RaiseLayerNorm())
    assert done.reasons == ["it normalises axes [1], layer_norm the last one"]


def test_declines_half_precision_and_says_so(apply) -> None:
    done = apply(_Norm(_pow_sqrt).to(torch.bfloat16), (torch.randn(3, 16).to(torch.bfloat16),), RaiseLayerNorm())
    assert done.reasons == ["each step rounds to torch.bfloat16, layer_norm rounds once"]


def test_keeps_a_scale_of_another_shape_outside_and_says_so(apply) -> None:
    done = apply(_Norm(_pow_sqrt, width=1), (torch.randn(3, 16),), RaiseLayerNorm())
    assert done.after == {"layer_norm": 1, "mul": 1, "add": 1}
    assert done.reasons == ["the scale is of shape [1], not [16]"]
    assert done.error(torch.randn(2, 16)) < 1e-6
