"""Which hidden channels stay: every formula against a direct computation in float64, on correlated random channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.passes.factorization.channel_selection import Selection, eliminate, energy, errors_without_refit, leverage, refitted

CHANNELS, OUTPUTS = 48, 10
TINY = 1e-11


def hidden(tokens: int = 400, seed: int = 0) -> Tensor:
    """[tokens, channels], float64: correlated, of several sizes, with a mean."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, CHANNELS, generator=g, dtype=torch.float64) @ torch.randn(CHANNELS, CHANNELS, generator=g, dtype=torch.float64)
    return mixed.relu() * torch.exp(0.5 * torch.randn(CHANNELS, generator=g, dtype=torch.float64)) + 0.5


def weights(seed: int = 1) -> Tensor:
    return torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(h: Tensor) -> Tensor:
    return h.T @ h / len(h)


def covariance(h: Tensor) -> Tensor:
    return gram(h - h.mean(0))


def error(w: Tensor, new: Tensor, kept: Tensor, c: Tensor) -> float:
    """Of weights on some channels, relative to what all give."""
    difference = w.clone()
    difference[:, kept] -= new
    return float(((difference @ c) * difference).sum() / ((w @ c) * w).sum())


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("ridge", [1e-8, 1e-2])
def test_eliminating_step_by_step_loses_what_the_closed_form_on_the_survivors_loses(batch: int, ridge: float) -> None:
    w, c = weights(), covariance(hidden())
    found = eliminate(w, c, ridge, batch)
    for width in [CHANNELS - batch, CHANNELS - 4 * batch, CHANNELS - 2 * batch]:
        if width <= 0:
            continue
        kept = found.kept(width)
        want = error(w, refitted(w, c, kept, ridge), kept, c)
        assert float(found.errors[width]) == pytest.approx(want, rel=1e-8)


def test_the_error_is_the_trace_of_the_schur_complement() -> None:
    w, c = weights(), covariance(hidden())
    found = eliminate(w, c, TINY, 8)
    for width in (40, 24, 8):
        kept = found.kept(width)
        gone = torch.tensor([j for j in range(CHANNELS) if j not in kept])
        schur = c[gone][:, gone] - c[gone][:, kept] @ torch.linalg.solve(c[kept][:, kept], c[kept][:, gone])
        trace = ((w[:, gone] @ schur) * w[:, gone]).sum() / ((w @ c) * w).sum()
        assert float(found.errors[width]) == pytest.approx(float(trace), rel=1e-7)


def test_the_refit_is_the_least_squares_fit_with_a_bias() -> None:
    h, w = hidden(), weights()
    kept = torch.arange(0, CHANNELS, 3)
    new = refitted(w, covariance(h), kept, TINY)
    bias = w @ h.mean(0) - new @ h.mean(0)[kept]
    ones = torch.ones(len(h), 1, dtype=h.dtype)
    want = torch.linalg.lstsq(torch.cat([h[:, kept], ones], 1), h @ w.T).solution.T
    torch.testing.assert_close(torch.cat([new, bias[:, None]], 1), want, rtol=1e-6, atol=1e-6)


def test_the_ridge_shrinks_the_correction_and_not_the_kept_weights() -> None:
    w, c = weights(), covariance(hidden())
    kept = torch.arange(20)
    near, far = (refitted(w, c, kept, ridge) - w[:, kept] for ridge in (1e-4, 1e6))
    assert near.norm() > 0.1
    assert far.norm() < 1e-4


@pytest.mark.parametrize("selection", ["obs", "energy", "leverage", "random"])
def test_a_refit_never_adds_to_the_error(selection: str) -> None:
    w, c = weights(), covariance(hidden())
    scores = {"energy": energy(w, c), "leverage": leverage(c, 1e-4), "random": torch.rand(CHANNELS, generator=torch.Generator().manual_seed(2))}
    found = eliminate(w, c, 1e-4, 1, None if selection == "obs" else scores[selection].argsort())
    without = errors_without_refit(w, c, found.order)
    assert bool((found.errors <= without + 1e-12).all())
    assert float(found.errors[24]) < 0.8 * float(without[24])


def test_errors_fall_from_one_to_zero_and_never_rise() -> None:
    w, c = weights(), covariance(hidden())
    for found in (
        eliminate(w, c, 1e-4, 7),
        eliminate(w, c, 1e-4, 7, least=20),
        Selection(torch.arange(CHANNELS), errors_without_refit(w, c, torch.arange(CHANNELS))),
    ):
        assert found.errors[0] == 1
        assert found.errors[-1] == 0
        assert bool((found.errors.diff() <= 0).all())
        assert found.order.sort().values.tolist() == list(range(CHANNELS))


def test_a_given_order_is_kept_and_its_error_is_that_of_the_refit() -> None:
    w, c = weights(), covariance(hidden())
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(3))
    found = eliminate(w, c, 1e-4, 16, order)
    assert found.order.tolist() == order.tolist()
    kept = order[16:].sort().values
    assert found.kept(32).tolist() == kept.tolist()
    assert float(found.errors[32]) == pytest.approx(error(w, refitted(w, c, kept, 1e-4), kept, c), rel=1e-8)


def test_errors_without_refit_are_those_of_the_channels_left_out() -> None:
    h, w = hidden(), weights()
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(3))
    found = errors_without_refit(w, gram(h), order)
    lost = [float((h[:, order[:n]] @ w[:, order[:n]].T).square().sum() / (h @ w.T).square().sum()) for n in range(11)]
    assert float(found[CHANNELS - 10]) == pytest.approx(max(lost), rel=1e-9)  # one more may cancel out: the curve never rises again


def test_obs_is_better_than_energy_and_energy_than_chance() -> None:
    w, c = weights(), covariance(hidden())
    chance = torch.stack([eliminate(w, c, 1e-4, 1, torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(s))).errors for s in range(5)]).mean(0)
    by_energy = eliminate(w, c, 1e-4, 1, energy(w, c).argsort()).errors
    obs = eliminate(w, c, 1e-4, 1).errors
    for width in (36, 24, 12):
        assert obs[width] < by_energy[width] < chance[width]


def test_energy_is_what_each_channel_gives_alone() -> None:
    h, w = hidden(), weights()
    w[:, 3] *= 10
    alone = torch.stack([(h[:, j : j + 1] @ w[:, j : j + 1].T).square().sum(1).mean() for j in range(CHANNELS)])
    torch.testing.assert_close(energy(w, gram(h)), alone, rtol=1e-9, atol=0)


def test_leverage_is_the_diagonal_of_the_ridge_projection() -> None:
    c = covariance(hidden())
    damped = c + 1e-2 * c.diagonal().mean() * torch.eye(CHANNELS, dtype=c.dtype)
    torch.testing.assert_close(leverage(c, 1e-2), (c @ torch.linalg.inv(damped)).diagonal(), rtol=1e-9, atol=1e-9)


def test_dead_channels_go_first_and_change_nothing() -> None:
    h, w = hidden(), weights() * 100
    dead = [3, 17, 31]
    h[:, dead] = 0
    w[:, dead] *= 1e3  # that would make them dear, if their size were what counts
    found = eliminate(w, gram(h), 1e-4, 1)
    assert found.order[:3].tolist() == dead
    assert float(found.errors[CHANNELS - 3]) == 0
    kept = found.kept(CHANNELS - 3)
    torch.testing.assert_close(refitted(w, gram(h), kept, 1e-4), w[:, kept], rtol=0, atol=0)


def test_one_of_two_equal_channels_goes_for_nothing() -> None:
    h, w = hidden(), weights()
    h[:, 5] = h[:, 40]
    c = covariance(h)
    found = eliminate(w, c, TINY, 1)
    assert int(found.order[0]) in (5, 40)
    kept = found.kept(CHANNELS - 1)
    assert error(w, refitted(w, c, kept, TINY), kept, c) < 1e-9


@pytest.mark.parametrize("batch", [4, 24])
def test_a_batch_takes_one_of_equal_channels_and_not_both(batch: int) -> None:
    h, w = hidden(), weights()
    h[:, 24:] = h[:, :24]
    found = eliminate(w, covariance(h), TINY, batch)
    assert sorted(int(j) % 24 for j in found.kept(24)) == list(range(24))
    assert float(found.errors[24]) < 1e-9


def test_fewer_tokens_than_channels_lose_nothing_down_to_their_rank() -> None:
    h, w = hidden(tokens=15), weights()
    found = eliminate(w, gram(h), 1e-9, 1)
    assert float(found.errors[15]) < 1e-6
    assert float(found.errors[13]) > 1e-4
    kept = found.kept(15)
    new = refitted(w, gram(h), kept, 1e-9)
    torch.testing.assert_close(h[:, kept] @ new.T, h @ w.T, rtol=1e-3, atol=1e-3 * float((h @ w.T).abs().max()))


def test_a_moment_that_rounding_left_indefinite_is_inverted_all_the_same() -> None:
    h, w = hidden(tokens=15), weights()
    c = gram(h) - 1e-9 * gram(h).diagonal().mean() * torch.eye(CHANNELS, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(c)[0]) < 0
    found = eliminate(w, c, 1e-12, 4)
    assert bool(found.errors.isfinite().all())
    assert float(found.errors[20]) < 1e-4


def test_elimination_stops_where_it_is_told_to() -> None:
    w, c = weights(), covariance(hidden())
    whole, part = eliminate(w, c, 1e-4, 4), eliminate(w, c, 1e-4, 4, least=30)
    assert part.kept(30).tolist() == whole.kept(30).tolist() or part.errors[30] <= whole.errors[30] * 1.1
    assert float(part.errors[32]) == pytest.approx(float(whole.errors[32]), rel=1e-12)
    assert part.kept(32).tolist() == whole.kept(32).tolist()
