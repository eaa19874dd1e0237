"""The two factors of a layer: its bias, what they are to give behind layers that are rewritten already, and a basis for several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rewright.passes.factorization.low_rank_factors import Data, Factors, joint_is_better
from rewright.passes.factorization.whitening import Inputs, Outputs, spectrum
from rewright.passes.statistics import Moments

from .test_whitening import SHAPES, data


def layer(m: int, n: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """w [m, n], b [m], x [n, tokens], float64."""
    w, x = data(m, n, tokens)
    return w, torch.randn(m, generator=torch.Generator().manual_seed(m), dtype=torch.float64), x


def moments(x: Tensor, x0: Tensor | None = None) -> Moments:
    """Of x [n, tokens]; x0 is what it is in the original program."""
    tokens = x.shape[1]
    return Moments(x @ x.T / tokens, x.mean(1), None if x0 is None else x0 @ x.T / tokens, None if x0 is None else x0.mean(1))


def make(w: Tensor, b: Tensor, known: Moments, rank: int, affine: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """W' and b' of whitened factors."""
    inputs = Inputs(known.gram, known.mean if affine else None)
    settings = {"balanced": False, "ridge": 1e-4, "shrink": 0.0, "refit": False, **options}
    found = Factors(rank, Data(known, inputs, (Outputs(),)), (True,), affine, **settings)(w, b)
    return found["second0"].double() @ found["first"].double(), found.get("bias0", b)


def cost(y: Tensor, z: Tensor) -> float:
    return float((y - z).square().sum() / y.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 12])
def test_a_bias_for_the_mean_costs_less_than_a_rank_for_it(shape: tuple[int, int], rank: int) -> None:
    w, b, x = layer(*shape)
    y = w @ x + b[:, None]
    centred, uncentred = make(w, b, moments(x), rank), make(w, b, moments(x), rank, affine=False)
    assert cost(y, centred[0] @ x + centred[1][:, None]) < cost(y, uncentred[0] @ x + uncentred[1][:, None])
    values = spectrum(w, Inputs(moments(x).gram, moments(x).mean))
    assert cost(y, centred[0] @ x + centred[1][:, None]) == pytest.approx(float(values[rank:].sum()), rel=1e-9)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_folded_bias_is_the_mean_correction(refit: bool, balanced: bool) -> None:
    w, b, x = layer(24, 40)
    other, bias = make(w, b, moments(x), 7, refit=refit, balanced=balanced)
    mean = x.mean(1, keepdim=True)
    explicit = w @ mean + b[:, None] + other @ (x - mean)
    assert (other @ x + bias[:, None] - explicit).abs().max() < 1e-10 * explicit.abs().max()


def test_the_bias_makes_up_for_what_rounding_does_to_the_mean() -> None:
    w, b, x = layer(24, 40)
    w, b = w.bfloat16(), b.bfloat16()
    other, bias = make(w, b, moments(x + 100), 23)
    off = w.double() @ (x + 100).mean(1) + b.double() - other @ (x + 100).mean(1) - bias.double()
    assert off.abs().max() < 2**-7 * bias.abs().max().item()  # one rounding, of the bias itself; the factors' own are a hundred times that
    assert bias.dtype == torch.bfloat16


@pytest.mark.parametrize("affine", [True, False])
def test_behind_rewritten_layers_the_error_splits_into_what_no_matrix_can_give_and_what_was_truncated(affine: bool) -> None:
    w, b, x0 = layer(24, 40)
    x = x0 + 0.3 * torch.randn(40, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    known = moments(x, x0)
    wanted, offset = known.target(w, b, affine, ridge=0)
    y, best = w @ x0 + b[:, None], wanted @ x + offset[:, None]
    values = spectrum(wanted, Inputs(known.gram, known.mean if affine else None))
    for rank in (2, 9, 20):
        other, bias = make(w, b, known, rank, affine, ridge=0)
        found = other @ x + bias[:, None]
        assert cost(y, found) == pytest.approx(cost(y, best) + cost(best, found), rel=1e-10)
        assert cost(best, found) == pytest.approx(float(values[rank:].sum()), rel=1e-9)
        blind, blind_bias = make(w, b, moments(x), rank, affine)
        assert cost(y, found) < cost(y, blind @ x + blind_bias[:, None])


def test_a_refit_saves_a_basis_that_knows_no_data() -> None:
    w, b, x = layer(24, 40)
    y = w @ x + b[:, None]
    known = Data(moments(x), Inputs(), (Outputs(),))
    costs = []
    for refit in (False, True):
        found = Factors(7, known, (True,), True, False, 1e-9, 0.0, refit)(w, b)
        costs.append(cost(y, found["second0"] @ found["first"] @ x + found["bias0"][:, None]))
    assert costs[1] < 0.8 * costs[0]
    z = torch.cat([found["first"] @ x, torch.ones(1, x.shape[1], dtype=torch.float64)])  # least squares with a bias
    assert costs[1] == pytest.approx(cost(y, (torch.linalg.pinv(z.T) @ y.T).T @ z), rel=1e-6)


def test_a_joint_basis_serves_small_matrices_as_well_as_large_ones() -> None:
    w = data(24, 40)[0]
    x = torch.randn(40, 400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, right = w.clone(), 100 * w
    left[:, 10:], right[:, :30] = 0, 0  # of rank 10 each, on different inputs
    found = Factors(10, Data(moments(x), Inputs(moments(x).gram), (Outputs(), Outputs())), (False, False), False, False, 1e-4, 0.0, False)(left, right)
    for i, matrix in enumerate((left, right)):
        assert cost(matrix @ x, found[f"second{i}"] @ found["first"] @ x) < 0.5 * cost(matrix @ x, 0 * matrix @ x)


def test_several_matrices_get_one_first_factor_where_they_read_the_same_directions() -> None:
    w, _, x = layer(24, 40)
    alike = [w, 100 * torch.randn(24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64) @ w]  # the same row space, another size
    known = Data(moments(x), Inputs(moments(x).gram, moments(x).mean), (Outputs(), Outputs()))
    ranks, joint = [10, 10], 2 * 10 * (24 + 40) // (48 + 40)
    assert joint_is_better(alike, known, ranks, joint)
    left, right = w.clone(), w.clone()
    left[:, 10:], right[:, :30] = 0, 0  # of rank 10 each, on different inputs
    assert not joint_is_better([left, right], known, ranks, joint)
    found = Factors(joint, known, (False, False), True, False, 1e-4, 0.0, False)(*alike)
    assert found["first"].shape == (joint, 40)
    for i, matrix in enumerate(alike):
        y = matrix @ x
        error = cost(y, found[f"second{i}"] @ found["first"] @ x + found[f"bias{i}"][:, None]) / cost(y, y.mean(1, keepdim=True))
        apart, bias = make(matrix, torch.zeros(24, dtype=torch.float64), moments(x), 10)
        assert error < cost(y, apart @ x + bias[:, None]) / cost(y, y.mean(1, keepdim=True))


def test_weights_without_data_get_factors_without_data_of_the_same_shapes() -> None:
    w, b, x = layer(24, 40)
    make_factors = Factors(7, Data(moments(x), Inputs(), (Outputs(), Outputs())), (True, False), True, False, 1e-4, 0.0, False)
    found, real = (make_factors(*(t.to(device).bfloat16() for t in (w, w, b))) for device in ("meta", "cpu"))
    assert all(t.is_meta for t in found.values())
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (t.shape, t.dtype) for k, t in real.items()}
