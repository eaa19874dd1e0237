"""Affine correction: what it is fitted on never gets worse, what it has not seen gets better where there is something to correct."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.ir.formats import WEIGHTS, fake_quantize
from rewright.passes.quantization.affine_correction import affine_correction


def quantized_layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [400, 128] with a mean, w [32, 128], w in 4 bits per row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 16, generator=generator) @ torch.randn(16, 128, generator=generator) + torch.randn(128, generator=generator) * 2
    w = torch.randn(32, 128, generator=generator)
    return x, w, fake_quantize(w, WEIGHTS["int4-channel"])


@pytest.mark.parametrize("rows", [2, 30, 200])
def test_the_error_on_what_it_is_fitted_on_grows_in_no_channel(rows: int) -> None:
    for seed in range(5):
        x, w, w_q = quantized_layer(seed)
        y, y_q = x[:rows] @ w.T, x[:rows] @ w_q.T
        a, c = affine_correction(y, y_q)
        assert ((a * y_q + c - y).square().sum(0) <= (y_q - y).square().sum(0) * (1 + 1e-9)).all()


def test_the_error_on_held_out_rows_falls() -> None:
    before = after = 0.0
    for seed in range(5):
        x, w, w_q = quantized_layer(seed)
        a, c = affine_correction(x[:200] @ w.T, x[:200] @ w_q.T)
        y, y_q = x[200:] @ w.T, x[200:] @ w_q.T
        before, after = before + (y_q - y).square().sum().item(), after + (a * y_q + c - y).square().sum().item()
    assert after < 0.8 * before


def test_a_line_through_few_rows_is_drawn_towards_the_identity() -> None:
    y_q = torch.linspace(-1, 1, 100)[:, None]
    a, c = affine_correction(1.5 * y_q + 3, y_q)
    assert a.item() == pytest.approx(1.25)  # n / (n + 100) of the way
    assert c.item() == pytest.approx(3)
    many, _ = affine_correction((1.5 * y_q).repeat(100, 1), y_q.repeat(100, 1))
    assert many.item() == pytest.approx(1.5, abs=0.01)


def test_a_channel_that_quantizes_to_a_constant_gets_its_mean_and_slopes_stay_in_bounds() -> None:
    y = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    a, c = affine_correction(y, torch.zeros(50, 1))
    assert a.item() == 1 and c.item() == pytest.approx(y.mean().item())
    a, _ = affine_correction(-9 * y.repeat(100, 1), y.repeat(100, 1))
    assert a.item() == 0.5
