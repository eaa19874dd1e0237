"""How (s, z) are chosen: formulas, what searches promise, and the order of the methods on planted outliers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from rewright.passes.outliers.awq import awq
from rewright.passes.outliers.fp_preshift import fp_preshift
from rewright.passes.outliers.hadamard import Rotation
from rewright.passes.outliers.migrate import tied
from rewright.passes.outliers.objective import Objective
from rewright.passes.outliers.observed import Observed
from rewright.passes.outliers.osplus import osplus
from rewright.passes.outliers.reparam import Statistic, reparam
from rewright.passes.outliers.smoothquant import smoothquant, smoothquant_bias, smoothquant_search

torch.set_num_threads(1)


def observed(x: Tensor, w: Tensor, pot: bool = False) -> Observed:
    """What calibration would know of rows x that a linear with weights w reads."""
    low, high, mean_abs = x.amin(0).double(), x.amax(0).double(), x.abs().mean(0).double()
    return Observed(low, high, w.abs().amax(0).double(), mean_abs, x, w, pot)


@cache
def outliers(tokens: int = 1024, channels: int = 1024) -> Observed:
    """Gaussian activations, 8 channels of them with means of +-15 .. 60 and a spread of 8 % of it; Gaussian weights."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(tokens, channels, generator=generator), torch.randn(channels, channels, generator=generator) * channels**-0.5
    where = torch.randperm(channels, generator=generator)[:8]
    mean = torch.linspace(15, 60, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    x[:, where] = mean * (1 + 0.08 * torch.randn(tokens, 8, generator=generator))
    return observed(x, w)


@cache
def errors(weights: str, activations: str) -> dict[str, float]:
    """Relative error of the linear's output, each method on the outliers."""
    seen = outliers()
    objective = Objective(seen, weights, activations, most_rows=512)
    none = torch.ones_like(seen.absmax)
    chosen = {
        "raw": (none, None),
        "smoothquant 0.5": (smoothquant(seen, 0.5), None),
        "smoothquant 0.75": (smoothquant(seen, 0.75), None),
        "shift": (none, seen.center),
        "osplus without shift": osplus(objective, 12, False),
        "osplus": osplus(objective, 12, True),
    }
    found = {name: objective.loss(*c) ** 0.5 for name, c in chosen.items()}
    assert seen.rows is not None
    assert seen.weights is not None
    x, w, q = seen.rows[::2], seen.weights, Rotation(seen.rows.shape[1]).matrix().float()
    for name, centred in (("hadamard", x), ("shift and hadamard", x - seen.center.float())):
        rotated = Objective(observed(centred @ q, w @ q), weights, activations).loss(none)
        found[name] = (rotated * float((centred @ w.T).square().mean() / (x @ w.T).square().mean())) ** 0.5  # relative to the outputs with their mean
    return found


FORMATS = [("int8-channel", "int8-static"), ("int8-channel", "int8-token"), ("int6-channel", "int6-token"), ("int4-channel", "int4-token")]


@pytest.mark.parametrize(("weights", "activations"), FORMATS)
def test_on_planted_outliers_osplus_halves_the_error_of_smoothquant(weights: str, activations: str) -> None:
    found = errors(weights, activations)
    print(f"\n{weights} {activations}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
    assert found["osplus"] < 0.5 * min(found["smoothquant 0.5"], found["smoothquant 0.75"])
    assert found["osplus"] < found["osplus without shift"] < found["raw"]
    assert found["osplus"] <= found["shift"] < found["smoothquant 0.5"]
    assert found["shift and hadamard"] < 0.5 * found["hadamard"]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("activations", ["int8-static", "int8-dynamic", "int8-token"])
def test_osplus_never_loses_to_doing_nothing(shift: bool, activations: str) -> None:
    for scale in (1e-3, 1.0):  # activations below 1, too
        x = torch.randn(64, 32) * torch.logspace(-1, 1, 32) * scale
        objective = Objective(observed(x, torch.randn(16, 32)), "int8-channel", activations)
        s, z = osplus(objective, 8, shift)
        assert objective.loss(s, z) <= objective.loss(torch.ones(32, dtype=torch.float64))
        assert float(s.min()) == 1.0
        assert (s > 1).any()


def test_osplus_scales_only_the_channels_above_its_threshold_down_to_it() -> None:
    seen = outliers()
    s, z = osplus(Objective(seen, "int8-channel", "int8-token", most_rows=128), 12, True)
    assert z is not None
    assert torch.equal(z, (seen.low + seen.high) / 2)
    reach = (seen.high - seen.low) / 2 / s
    assert torch.allclose(reach[s > 1], reach.max().expand(int((s > 1).sum())))
    assert 1 < int((s > 1).sum()) <= 8


def test_osplus_shifts_nothing_where_a_lone_extreme_would_move_all_tokens() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x[0, :8] = 100
    objective = Objective(observed(x, torch.randn(16, 16, generator=torch.Generator().manual_seed(1))), "int8-channel", "int8-token")
    s, z = osplus(objective, 6, True)
    assert z is None
    assert torch.equal(s, torch.ones(16, dtype=torch.float64))


def test_osplus_leaves_a_dead_edge_alone() -> None:
    objective = Objective(observed(torch.zeros(8, 4), torch.randn(2, 4)), "int8-channel", "int8-static")
    s, z = osplus(objective, 4, False)
    assert torch.equal(s, torch.ones(4, dtype=torch.float64))
    assert z is None


def test_smoothquant_splits_outliers_by_alpha() -> None:
    seen = observed(torch.tensor([[8.0, -2.0, 0.0], [-4.0, 1.0, 0.0]]), torch.tensor([[0.5, 2.0, 1.0], [-1.0, 1.0, 1.0]]))
    assert torch.allclose(smoothquant(seen, 0.75), torch.tensor([8**0.75, 2**0.75 / 2**0.25, 1.0], dtype=torch.float64)), "a dead channel stays"
    balanced = smoothquant(seen, 0.5)
    assert torch.allclose((seen.absmax / balanced)[:2], (seen.weight_absmax * balanced)[:2]), "0.5 makes both maxima equal"


def test_smoothquant_search_is_no_worse_than_any_alpha_or_none() -> None:
    objective = Objective(outliers(128, 64), "int8-channel", "int8-token")
    best = objective.loss(*smoothquant_search(objective, 9))
    seen = objective.seen
    assert best <= min(objective.loss(smoothquant(seen, a / 8)) for a in range(9))
    assert best <= objective.loss(torch.ones_like(seen.absmax))
    assert best < objective.loss(smoothquant(seen, 0.5))


def test_smoothquant_bias_centres_the_scaled_channels() -> None:
    seen = outliers(128, 64)
    s, z = smoothquant_bias(seen, 0.5)
    assert z is not None
    assert torch.equal(s, smoothquant(seen, 0.5))
    assert torch.allclose((seen.low - z) / s, -(seen.high - z) / s)


@pytest.mark.parametrize("stat", ["mean", "median", "mad"])
@pytest.mark.parametrize("shift", [False, True])
def test_reparam_gives_all_channels_one_quantizer(stat: Statistic, shift: bool) -> None:
    seen = outliers(128, 64)
    s, z = reparam(seen, stat, 8, shift)
    if z is None:
        reach = seen.absmax / s
        assert torch.allclose(reach, reach[0].expand_as(reach))
    else:
        low, high = (seen.low - z) / s, (seen.high - z) / s
        assert torch.allclose(low, low[0].expand_as(low))
        assert torch.allclose(high, high[0].expand_as(high))
        step = (high[0] - low[0]) / 255
        assert abs(float(-low[0] / step) - round(float(-low[0] / step))) < 1e-9, "its zero point is an integer"


def test_a_median_keeps_one_wide_channel_from_widening_all() -> None:
    x = torch.randn(512, 32)
    x[:, 5] *= 100
    seen = observed(x, torch.randn(16, 32))

    def error(stat: Statistic) -> float:
        """Mean squared error of the reparametrised tensor on its common step."""
        s, z = reparam(seen, stat, 8, True)
        assert z is not None
        y = (x.double() - z) / s
        step = (y.max() - y.min()) / 255
        return float((torch.round(y / step) * step - y).square().mean())

    assert error("median") < 0.5 * error("mean")
    assert error("mad") < 0.5 * error("mean")


def test_awq_begins_with_doing_nothing_and_is_no_worse() -> None:
    objective = Objective(outliers(128, 64), "int4-group", "none", group_size=32)
    none = torch.ones_like(objective.seen.absmax)
    s, z = awq(objective, 10)
    assert z is None
    assert objective.loss(s) < objective.loss(none)
    assert float(s.max() * s.min()) == pytest.approx(1)
    first, _ = awq(objective, 1)
    assert torch.equal(first, none)


def test_fp_preshift_brings_small_channels_up_by_powers_of_two() -> None:
    x = torch.tensor([[256.0, 16.0, 1.0, 1e-6, 0.0]])
    s = fp_preshift(observed(x, torch.randn(3, 5), pot=True))
    assert s.tolist() == [1.0, 2.0**-4, 2.0**-8, 2.0**-13, 1.0], "as far as s >= 1e-4; a dead channel stays"
    assert fp_preshift(observed(x, torch.randn(3, 5)), exponent=2, mantissa=1).tolist()[2] == 2.0**-3, "k fits into the exponent"


def test_powers_of_two_are_the_nearest_ones_within_bounds() -> None:
    seen = observed(torch.ones(1, 5), torch.ones(1, 5), pot=True)
    assert seen.settled(torch.tensor([1.4, 1.5, 3.0, 1e-9, 1e9]).double()).tolist() == [1.0, 2.0, 4.0, 2.0**-13, 2.0**13]
    plain = observed(torch.ones(1, 5), torch.ones(1, 5))
    assert plain.settled(torch.tensor([1.5, torch.nan, 0.0, 1e-9, 1e9]).double()).tolist() == [1.5, 1.0, 1.0, 1e-4, 1e4]


def test_the_static_range_is_that_of_the_whole_calibration() -> None:
    x = torch.randn(64, 8)
    seen = observed(x, torch.randn(4, 8))
    wider = Observed(seen.low * 10, seen.high * 10, seen.weight_absmax, seen.mean_abs, seen.rows, seen.weights)
    none = torch.ones(8, dtype=torch.float64)
    static, dynamic = ([Objective(o, "int8-channel", a).loss(none) for o in (seen, wider)] for a in ("int8-static", "int8-dynamic"))
    assert static[1] > 10 * static[0]
    assert dynamic[0] == dynamic[1]


def test_tied_channels_share_their_class() -> None:
    classes = torch.tensor([0, 0, 1, 1, 0])
    values = torch.tensor([1.0, 5.0, -2.0, -3.0, 2.0])
    assert tied(values, classes, "amax").tolist() == [5, 5, -2, -2, 5]
    assert tied(values, classes, "amin").tolist() == [1, 1, -3, -3, 1]
    assert tied(values, classes, "sum").tolist() == [8, 8, -5, -5, 8]
