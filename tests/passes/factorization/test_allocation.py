"""How components are shared out between layers: budgets, floors, layers that stay dense, and optimality against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rewright.ir.errors import UsageError
from rewright.passes.factorization.allocation import Layer, allocate

METHODS = ("uniform", "waterfill", "waterfill-influence", "block-influence", "welore")


def tail(values: Tensor) -> Tensor:
    """Relative errors from what each component is worth."""
    left = values.sum() - torch.cat([torch.zeros(1), values.cumsum(0)]).double()
    return (left / left[0]).clamp(min=0)


def layer(components: int, unit: int, decay: float, dense: int | None = None, **more: object) -> Layer:
    values = torch.exp(-decay * torch.arange(components).double())
    return Layer(tail(values), unit, components * unit if dense is None else dense, spectrum=values, **more)  # type: ignore[arg-type]


def parameters(layers: list[Layer], kept: list[int | None]) -> int:
    return sum(x.dense if k is None else k * x.unit for x, k in zip(layers, kept, strict=True))


def error(layers: list[Layer], kept: list[int | None]) -> float:
    return sum(0.0 if k is None else float(x.errors[k]) for x, k in zip(layers, kept, strict=True))


@pytest.fixture
def layers() -> list[Layer]:
    """Widths of feed-forward layers: as many components as there are, no way to save but dropping some."""
    return [layer(64, 10, 0.02, influence=0.4), layer(96, 20, 0.1, influence=0.1), layer(48, 10, 0.3, influence=0.2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.3])
def test_the_budget_is_kept_and_used_and_no_layer_falls_below_the_floor(method: str, keep: float, layers: list[Layer]) -> None:
    kept = allocate(layers, keep, method, floor=0.5, round_to=4)  # type: ignore[arg-type]
    budget = keep * sum(x.dense for x in layers)
    assert budget - 4 * 20 <= parameters(layers, kept) <= budget
    for x, k in zip(layers, kept):
        assert k is None or k >= 0.5 * keep * x.dense / x.unit and k % 4 == 0


def test_uniform_keeps_the_same_share_everywhere(layers: list[Layer]) -> None:
    assert allocate(layers, 0.75, "uniform") == [48, 72, 36]


def test_waterfill_has_the_least_error_of_all_combinations_within_the_budget() -> None:
    found = [layer(6, 2, 0.2), layer(5, 3, 0.7), layer(7, 1, 0.4)]
    for keep in (0.35, 0.5, 0.65, 0.8):
        kept = allocate(found, keep, "waterfill", floor=0)
        budget = keep * sum(x.dense for x in found)
        choices = itertools.product(*(range(1, x.components + 1) for x in found))
        best = min((error(found, list(c)), c) for c in choices if parameters(found, list(c)) <= parameters(found, kept))
        assert error(found, kept) == pytest.approx(best[0], abs=1e-12)
        assert budget - parameters(found, kept) < 3  # the largest component


def test_waterfill_is_never_worse_than_uniform(layers: list[Layer]) -> None:
    for keep in (0.9, 0.7, 0.5, 0.3):
        assert error(layers, allocate(layers, keep, "waterfill")) < error(layers, allocate(layers, keep, "uniform"))


def test_a_curve_that_is_not_convex_is_filled_along_its_hull() -> None:
    steps = Layer(torch.tensor([1.0, 1.0, 0.2, 0.2, 0.0], dtype=torch.float64), 1, 4)  # components come in pairs
    smooth = Layer(torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64), 1, 4)
    assert allocate([steps, smooth], 0.5, "waterfill", floor=0) == [2, 2]


@pytest.mark.parametrize("method", ["uniform", "waterfill", "welore"])
def test_a_matrix_at_break_even_stays_dense_and_the_others_pay_for_it(method: str) -> None:
    m, n = 40, 60
    flat, steep = (layer(40, m + n, decay, m * n) for decay in (0.001, 0.4))
    kept = allocate([flat, steep], 0.8, method, floor=0)  # type: ignore[arg-type]
    if method == "uniform":
        assert kept == [19, 19]  # 0.8 * 2400 / 100
    else:
        assert kept[0] is None and kept[1] is not None and kept[1] <= 14  # what 0.6 of one matrix has room for
    assert parameters([flat, steep], kept) <= 0.8 * 2 * m * n


def test_scaling_the_outputs_of_a_layer_changes_nothing() -> None:
    """Errors are relative to the layer's own output, so the maker of the curve divides the scale out; weights in parameters count."""
    a, b = layer(32, 4, 0.1), layer(32, 8, 0.1)
    kept = allocate([a, b], 0.5, "waterfill", floor=0)
    assert kept[0] > kept[1]  # type: ignore[operator]  # the same gain costs half there


def test_more_influence_keeps_more() -> None:
    low, high = layer(64, 4, 0.05, influence=0.1), layer(64, 4, 0.05, influence=0.3)
    for method in ("waterfill-influence", "block-influence"):
        kept = allocate([low, high], 0.5, method)  # type: ignore[arg-type]
        assert kept[0] < kept[1]  # type: ignore[operator]
    assert allocate([low, high], 0.5, "waterfill") == [32, 32]


def test_block_influence_removes_no_more_than_four_fifths_of_a_layer_and_the_rest_from_the_others() -> None:
    found = [layer(100, 1, 0.05, influence=i) for i in (0.0, 1.0, 1.0, 1.0)]
    kept = allocate(found, 0.7, "block-influence", floor=0)
    assert kept == [20, 86, 86, 86]


def test_welore_cuts_all_spectra_at_one_threshold() -> None:
    found = [layer(30, 60, 0.2, 10**6), layer(30, 60, 0.1, 10**6)]
    kept = allocate(found, 27 * 60 / (2 * 10**6) + 1e-9, "welore", floor=0)
    assert kept == [9, 18]  # exp(-0.2 * 9) = exp(-0.1 * 18)


def test_keeping_all_or_nothing_to_do_leaves_every_layer_dense(layers: list[Layer]) -> None:
    assert allocate(layers, 1.0) == [None] * 3
    assert allocate([], 0.5) == []


def test_a_method_that_lacks_its_numbers_says_what_to_use_instead(layers: list[Layer]) -> None:
    bare = [Layer(x.errors, x.unit, x.dense) for x in layers]
    with pytest.raises(UsageError, match="block-influence needs the influence of the residual blocks"):
        allocate(bare, 0.5, "block-influence")
    with pytest.raises(UsageError, match="welore allocates by singular values"):
        allocate(bare, 0.5, "welore")
