"""Weight algorithms on synthetic layers: each keeps what it promises, and they come in the order of the literature."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from rewright.ir.formats import WEIGHTS, Format, Grid, grid
from rewright.passes.quantization.clip import clipped_grid, sampled
from rewright.passes.quantization.codes import Quantized, blocks, dequantized, flat, rounded
from rewright.passes.quantization.gptq import gptq_codes
from rewright.passes.quantization.hqq import P, hqq_grid
from rewright.passes.quantization.rtn import rtn

INT4, G = WEIGHTS["int4-group"], 128
FORMATS = pytest.mark.parametrize("name", WEIGHTS)


@cache
def layer() -> tuple[Tensor, Tensor]:
    """x [1024, 512], correlated (32 factors), channels of unequal size, 8 of them outliers; w [512, 512]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 32, generator=generator) @ torch.randn(32, 512, generator=generator) / 32**0.5
    x = (x + 0.5 * torch.randn(1024, 512, generator=generator)) * torch.exp(torch.randn(512, generator=generator))
    x[:, torch.randperm(512, generator=generator)[:8]] *= 10
    return x, torch.randn(512, 512, generator=generator)


def gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def weights_of(q: Quantized, width: int = 512) -> Tensor:
    return flat(dequantized(q.codes, q.on), width)


def on_grid(w: Tensor, on: Grid, form: Format = INT4) -> Tensor:
    """w rounded to the nearest codes of a grid."""
    return weights_of(Quantized(rounded(blocks(w, form, G), on, form), on), w.shape[1])


def error(w_q: Tensor) -> float:
    """Relative error of the layer's output."""
    x, w = layer()
    return ((x @ (w - w_q).T).norm() / (x @ w.T).norm()).item()


def awq(with_clip: bool = False) -> float:
    """The error with channels scaled by mean |x|^r before rounding, for the best r (Lin et al. 2024)."""
    x, w = layer()
    found = []
    for r in torch.arange(0, 1, 0.05):
        s = x.abs().mean(0).pow(r).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        on = clipped_grid(w * s, INT4, G, x / s) if with_clip else grid(blocks(w * s, INT4, G), INT4)
        found.append(error(on_grid(w * s, on) / s))
    return min(found)


def gptq(act_order: bool, form: Format = INT4) -> Tensor:
    x, w = layer()
    on = grid(blocks(w, form, G), form)
    return weights_of(Quantized(gptq_codes(w, on, form, G, gram(x), act_order=act_order), on))


def test_the_algorithms_come_in_the_order_of_the_specification() -> None:
    _, w = layer()
    nearest, half_quadratic = error(weights_of(rtn(w, INT4, G))), error(on_grid(w, hqq_grid(w, INT4, G)))
    found = [error(gptq(act_order=True)), error(gptq(act_order=False)), awq(with_clip=True), awq(), half_quadratic, nearest]
    assert found == sorted(found), found
    assert found[0] < found[1] * 0.9 and found[1] < found[3] * 0.9 and found[3] < found[4] * 0.9  # specs/quant_shiftadd.md 3.13: .062 .088 .104 .111 .132 .136


@FORMATS
def test_codes_are_in_range_whatever_the_algorithm(name: str) -> None:
    form, (x, w) = WEIGHTS[name], layer()
    w = w[:16]
    for on in (grid(blocks(w, form, G), form), hqq_grid(w, form, G), hqq_grid(w, form, G, real_zero_point=True), clipped_grid(w, form, G, x)):
        for q in (rounded(blocks(w, form, G), on, form), gptq_codes(w, on, form, G, gram(x))):
            if form.kind == "fp8":
                assert q.dtype == torch.float8_e4m3fn
                continue
            assert torch.equal(q, q.round()) and form.low <= q.min() and q.max() <= form.high


@FORMATS
def test_gptq_lowers_the_weighted_error_in_every_format(name: str) -> None:
    form, (_, w) = WEIGHTS[name], layer()
    assert error(gptq(act_order=True, form=form)) < 0.8 * error(weights_of(rtn(w, form, G)))


@FORMATS
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_of_uncorrelated_equal_channels_is_rounding_to_nearest(name: str, act_order: bool) -> None:
    form, w = WEIGHTS[name], layer()[1]
    on = grid(blocks(w, form, G), form)
    assert torch.equal(gptq_codes(w, on, form, G, torch.eye(512), act_order=act_order).float(), rounded(blocks(w, form, G), on, form).float())


def test_gptq_equals_the_method_one_channel_at_a_time() -> None:
    """Optimal brain surgery as it is written down: each error goes to all channels left, whose inverse Hessian then shrinks by one."""
    x, w = (t[:, 100:400] for t in layer())
    w, on = w[:8], grid(blocks(w[:8], INT4, G), INT4)
    scale, zero_point = (t.expand(-1, -1, G).flatten(1)[:, :300] for t in on)
    hessian = gram(x)
    inverse = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(300)).inverse()
    left, codes = w.double(), torch.empty(8, 300)
    for i in hessian.diagonal().argsort(descending=True).tolist():
        here = Grid(scale[:, i], zero_point[:, i])
        codes[:, i] = rounded(left[:, i].float(), here, INT4)
        error = (left[:, i] - dequantized(codes[:, i], here)) / inverse[i, i]
        left = left - error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i] / inverse[i, i]
    found = flat(gptq_codes(w, on, INT4, G, gram(x)), 300)
    assert (found == codes).float().mean() > 0.99  # float32 against float64: a tie may fall the other way


def test_gptq_keeps_groups_in_place_and_a_short_last_one() -> None:
    x, w = (t[:, :300] for t in layer())
    on = grid(blocks(w, INT4, G), INT4)
    q = gptq_codes(w, on, INT4, G, gram(x))
    assert q.shape == (512, 3, 128)
    ours = flat(dequantized(q, on), 300)
    assert (x @ (w - ours).T).norm() < 0.6 * (x @ (w - weights_of(rtn(w, INT4, G), 300)).T).norm()
    assert (ours - w).abs().mean() < 2 * on.scale.mean()  # each weight is near its own value, not another channel's


def test_channels_that_never_fire_get_weight_zero() -> None:
    x, w = layer()
    x = x.clone()
    x[:, [3, 200]] = 0
    on = grid(blocks(w, INT4, G), INT4)
    said: list[str] = []
    for damp in (0.01, 0.0):
        w_q = weights_of(Quantized(gptq_codes(w, on, INT4, G, gram(x), damp, say=said.append), on))
        assert w_q[:, [3, 200]].abs().max() == 0
        assert w_q[:, 4].abs().max() > 0
    assert not said  # they are no reason for damping
    assert gptq_codes(w, on, INT4, G, torch.zeros(512, 512)).isfinite().all()


def test_more_damping_is_used_where_it_must_and_said() -> None:
    x, w = layer()
    said: list[str] = []
    on = grid(blocks(w, INT4, G), INT4)
    singular = gram(x[:20])  # rank 20 of 512
    q = gptq_codes(w, on, INT4, G, singular, damp=0.0, say=said.append)
    assert q.isfinite().all()
    assert len(said) == 1 and said[0].startswith("its inputs are linearly dependent: damp = 0 was too little, ")
    gptq_codes(w, on, INT4, G, singular, say=said.append)
    assert len(said) == 1


@FORMATS
@pytest.mark.parametrize("real_zero_point", [False, True])
def test_hqq_lowers_the_p_norm_of_the_error_in_every_group(name: str, real_zero_point: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    form, w = WEIGHTS[name], torch.randn(128, 300, generator=generator) / (torch.randn(4, 128, 300, generator=generator).square().sum(0) / 4).sqrt()
    parts = blocks(w, form, G)

    def p_norm(on: Grid) -> Tensor:
        return (parts - dequantized(rounded(parts, on, form), on)).abs().pow(P).sum(-1)

    on = hqq_grid(w, form, G, real_zero_point)
    assert (p_norm(on) <= p_norm(grid(parts, form))).all()
    assert p_norm(on).sum() < p_norm(grid(parts, form)).sum()
    assert torch.equal(on.zero_point, on.zero_point.round()) is not (real_zero_point and not form.symmetric)


def test_hqq_does_not_depend_on_the_size_of_the_weights() -> None:
    w = layer()[1]
    small, large = hqq_grid(w / 64, INT4, G), hqq_grid(w, INT4, G)
    assert (small.scale * 64 == large.scale).float().mean() > 0.98  # a power of two: the same bits but where two grids are equally good


@pytest.mark.parametrize(("name", "rows"), [("int4-group", 1024), ("int4-group", 60), ("int4-channel", 1024)])
def test_clipping_raises_the_sampled_error_of_no_group(name: str, rows: int) -> None:
    form, (x, w) = WEIGHTS[name], layer()
    x, parts = x[:rows], blocks(w, form, G)
    samples = blocks(sampled(x), form, G)  # [rows, groups, group]
    assert len(samples) == min(rows, 512)

    def errors(on: Grid) -> Tensor:
        return torch.einsum("rgk,ogk->ogr", samples, parts - dequantized(rounded(parts, on, form), on)).square().sum(-1)

    plain, clipped = errors(grid(parts, form)), errors(clipped_grid(w, form, G, x))
    assert (clipped <= plain * 1.0001).all()
    assert clipped.sum() < 0.9 * plain.sum()
    best = torch.stack([errors(grid(parts, form, 1 - 0.05 * i)) for i in range(10)]).amin(0)
    assert torch.allclose(clipped, best, rtol=1e-3)
