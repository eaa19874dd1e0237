"""RMSNorm as Llama, T5, Gemma and aten spell it; its rounding is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewright.passes.cleanup.drop_no_ops import DropNoOps
from rewright.passes.cleanup.fold_constants import FoldConstants
from rewright.passes.cleanup.raise_rms_norm import RaiseRMSNorm


def llama(x, w):
    f = x.to(torch.float32)
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def t5(x, w):
    y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * (y.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else y)


def gemma(x, w):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + w.float())).type_as(x)


def divided(x, w):
    f = x.float()
    return (f / torch.sqrt((f * f).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def aten(x, w):
    return F.rms_norm(x, (16,), w, 1e-5)


def inverted(x, w):
    f = x.float()
    return w * (f * (1.0 / torch.sqrt(f.square().mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


class _Norm(nn.Module):
    def __init__(self, function, width=16) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.function(x, self.w)


def _run(apply, function, dtype=torch.float32, shape=(3, 16), width=16):
    return apply(_Norm(function, width).to(dtype), (torch.randn(shape).to(dtype),), DropNoOps(), FoldConstants(), RaiseRMSNorm())


@pytest.mark.parametrize("function", [llama, t5, gemma, divided, inverted, aten])
def test_raises_every_spelling_in_float32(apply, function) -> None:
    done = _run(apply, function)
    assert list(done.after.elements()) == ["rms_norm"]
    for x in (torch.randn(1, 16), torch.randn(5, 16) * 1e-3, torch.randn(2, 16) * 100):
        assert done.error(x) < 1e-6


@pytest.mark.parametrize(("function", "casts"), [(llama, 0), (t5, 0), (gemma, 2)])
def test_keeps_the_rounding_in_half_precision_bit_for_bit(apply, function, casts) -> None:
    done = _run(apply, function, torch.bfloat16)
    done.graph.clean()
    assert (done.after["rms_norm"], done.after["_to_copy"] + done.after["type_as"], done.after["rsqrt"]) == (1, casts, 0)
    assert done.error(torch.randn(64, 16).to(torch.bfloat16)) == 0


def test_the_weight_of_gemma_is_a_recipe_of_the_old_one(apply) -> None:
    done = _run(apply, gemma)
    done.graph.clean()
    (name,) = done.graph.weights()
    assert done.graph.recipes[name].sources == ("w",)
    assert torch.equal(done.graph.weight(name), 1 + done.module.w)


def test_declines_aten_in_half_precision_and_says_so(apply) -> None:
    assert _run(apply, aten, torch.bfloat16).reasons == ["aten.rms_norm applies the weight before it rounds to torch.bfloat16"]


def test_declines_a_mean_in_half_precision_and_says_so(apply) -> None:
    def half(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    assert _run(apply, half, torch.float16).reasons == ["the mean is taken in torch.float16, rms_norm takes it in float32"]


def test_declines_a_rounding_rms_norm_does_not_have(apply) -> None:
    def rounds(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(torch.bfloat16)

    assert _run(apply, rounds).reasons == ["it rounds to torch.bfloat16 before the weight, but x is torch.float32"]


def test_declines_a_mean_of_another_value(apply) -> None:
    def other(x, w):
        return w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5))

    assert _run(apply, other).reasons == ["the mean is of add, the product of x"]


def test_declines_another_axis(apply) -> None:
    def first(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))

    assert _run(apply, first, shape=(3, 5, 16)).reasons == ["the mean is over axes [1], rms_norm's over the last one"]


def test_declines_a_scale_that_is_no_vector_weight(apply) -> None:
    assert _run(apply, llama, width=1).reasons == ["the scale is of shape [1], not [16]"]
    assert _run(apply, lambda x, w: llama(x, w.sum() + x)).reasons[0].endswith("is not a weight")
