"""Low-rank approximations under every score: what they cost, against formulas of the papers, for inputs of full and of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.passes import linear_algebra
from rewright.passes.factorization.whitening import DAMPING, Inputs, Outputs, balanced, basis, errors, refitted, spectrum
from rewright.passes.linear_algebra import damped, descending_eigenvalues, descending_eigh, roots, shrunk
from rewright.passes.statistics import Moments

SHAPES = [(24, 40), (40, 24), (32, 32)]
RANKS = (1, 7, 16, 23)


def data(m: int, n: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """w [m, n], and x [n, tokens] with a mean and a spectrum that falls to a hundredth."""
    generator = torch.Generator().manual_seed(m * 1000 + n)
    w, mix, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((m, n), (n, n), (n, tokens)))
    return w, mix @ (torch.logspace(0, -2, n, dtype=torch.float64)[:, None] * x) + torch.randn(n, 1, generator=generator, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x @ x.T / x.shape[1]


def product(w: Tensor, rank: int, inputs: Inputs, outputs: Outputs | None = None) -> Tensor:
    """W' of a rank."""
    outputs = outputs or Outputs()
    weighed = outputs.weigh(w)
    u = basis(weighed, rank, inputs)
    return outputs.unweigh(u) @ (u.T @ weighed)


def cost(w: Tensor, other: Tensor, x: Tensor) -> float:
    """Mean squared norm of what a token's output is off."""
    return float(((w - other) @ x).square().sum() / x.shape[1])


def truncated_svd(w: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def diagonal(g: Tensor) -> Tensor:
    return g.diagonal().clone()


# -- whitened ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [400, 15])
def test_the_cost_on_calibration_data_is_the_sum_of_the_truncated_eigenvalues(shape: tuple[int, int], tokens: int) -> None:
    w, x = data(*shape, tokens)
    values = spectrum(w, Inputs(gram(x)))
    total = cost(w, torch.zeros_like(w), x)
    assert values.sum() == pytest.approx(total, rel=1e-9)
    for rank in RANKS:
        assert cost(w, product(w, rank, Inputs(gram(x))), x) == pytest.approx(float(values[rank:].sum()), rel=1e-9, abs=1e-12 * total)


@pytest.mark.parametrize("shape", SHAPES)
def test_wide_and_tall_matrices_get_what_the_cholesky_factor_gives_where_there_is_one(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    s = torch.linalg.cholesky(gram(x))
    for rank in RANKS:
        literal = torch.linalg.solve_triangular(s, truncated_svd(w @ s, rank), upper=False, left=False)
        assert (product(w, rank, Inputs(gram(x))) - literal).norm() <= 1e-8 * literal.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_inputs_break_the_cholesky_factor_and_nothing_else(shape: tuple[int, int]) -> None:
    w, x = data(*shape, tokens=15)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram(x))
    assert cost(w, product(w, 15, Inputs(gram(x))), x) < 1e-20 * cost(w, torch.zeros_like(w), x)
    assert basis(w, 20, Inputs(gram(x))).isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_costs_no_more_than_asvd_and_plain_and_less_with_every_rank(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    last = torch.inf
    for rank in range(1, min(shape)):
        whitened, by_columns, plain = (cost(w, product(w, rank, i), x) for i in (Inputs(gram(x)), Inputs(x.abs().mean(1)), Inputs()))
        assert whitened < min(by_columns, plain) and whitened < last
        last = whitened


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_matrix(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    assert (product(w, min(shape), Inputs(gram(x))) - w).norm() < 1e-10 * w.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [400, 15])
def test_the_basis_is_orthonormal_nested_and_of_definite_signs(shape: tuple[int, int], tokens: int) -> None:
    w, x = data(*shape, tokens)
    inputs, rank = Inputs(gram(x)), min(shape) - 1
    u = basis(w, rank, inputs)
    assert (u.T @ u - torch.eye(rank, dtype=u.dtype)).abs().max() < 1e-10
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    for smaller in (1, 5, 14):
        assert (basis(w, smaller, inputs) - u[:, :smaller]).abs().max() < 1e-10


def test_a_damped_gram_costs_between_the_optimum_and_its_own_sum() -> None:
    w, x = data(24, 40)
    raised = damped(gram(x), 0.1)
    for rank in RANKS:
        found, optimum = cost(w, product(w, rank, Inputs(raised)), x), float(spectrum(w, Inputs(gram(x)))[rank:].sum())
        assert optimum < found < float(spectrum(w, Inputs(raised))[rank:].sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_about_the_mean_and_shrunk_it_is_that_of_the_covariance_without_making_one(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    moments = Moments(gram(x), x.mean(1))
    for found, explicit in (
        (Inputs(moments.gram, moments.mean), moments.covariance()),
        (Inputs(moments.gram, moments.mean, 0.3), shrunk(moments.covariance(), 0.3)),
    ):
        assert (found.times(w) - w @ explicit).norm() < 1e-12 * (w @ explicit).norm()
        assert (found.times_root(w) @ found.times_root(w).T - w @ explicit @ w.T).norm() < 1e-12 * (w @ explicit @ w.T).norm()
        assert torch.equal(found.times_root(w), found.rooted().times_root(w))


# -- other scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["out", "in", "both"])
def test_fwsvd_costs_the_truncated_singular_values_of_the_weighted_matrix(shape: tuple[int, int], side: str) -> None:
    w, _ = data(*shape)
    rows, columns = (torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.1 for n in shape)
    d_out = rows.sqrt()[:, None] if side != "in" else torch.ones(1, dtype=torch.float64)
    d_in = columns.sqrt() if side != "out" else torch.ones(1, dtype=torch.float64)
    inputs, outputs = Inputs(columns) if side != "out" else Inputs(), Outputs.of_channels(rows) if side != "in" else Outputs()
    for rank in RANKS:
        found = product(w, rank, inputs, outputs)
        s = torch.linalg.svdvals(d_out * w * d_in)
        assert float((d_out * (w - found) * d_in).square().sum()) == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)
        assert (found - truncated_svd(d_out * w * d_in, rank) / d_out / d_in).norm() < 1e-9 * w.norm()


def test_rows_without_gradients_are_no_division_by_zero() -> None:
    w, _ = data(24, 40)
    rows = torch.rand(24, dtype=torch.float64)
    rows[3] = 0
    assert product(w, 23, Inputs(), Outputs.of_channels(rows)).isfinite().all()
    assert (product(w, 23, Inputs(), Outputs.of_channels(rows)) - w)[torch.arange(24) != 3].norm() < 1e-6 * w.norm()
    assert product(w, 24, Inputs(), Outputs.of_channels(torch.zeros(24))).allclose(w)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_costs_the_truncated_singular_values_between_both_roots(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    _, g = data(shape[0], shape[0], tokens=5)  # few samples: K is of rank 5, and damped
    k = damped(gram(g), DAMPING)
    l_k, l_g = torch.linalg.cholesky(k), torch.linalg.cholesky(gram(x))
    for rank in RANKS:
        found = product(w, rank, Inputs(gram(x)), Outputs.of_gram(gram(g)))
        s = torch.linalg.svdvals(l_k.T @ w @ l_g)
        assert float(torch.trace(k @ (w - found) @ gram(x) @ (w - found).T)) == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)


# -- refit, gauge, curves ----------------------------------------------------------------------------------------------


def factors(w: Tensor, rank: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
    u = basis(w, rank, inputs)
    return u.T @ w, u


@pytest.mark.parametrize("shape", SHAPES)
def test_refitting_the_best_basis_changes_nothing(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    for rank in RANKS:
        first, second = factors(w, rank, Inputs(gram(x)))
        again = refitted(w, first, second, Inputs(gram(x)), 1e-4)
        assert (again - second).abs().max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_refitting_another_basis_lowers_the_cost_and_without_ridge_to_the_least(shape: tuple[int, int]) -> None:
    w, x = data(*shape)
    for rank in RANKS:
        first, second = factors(w, rank, Inputs())
        before, after, best = cost(w, second @ first, x), *(cost(w, refitted(w, first, second, Inputs(gram(x)), r) @ first, x) for r in (1e-2, 1e-12))
        assert best <= after < before
        z = first @ x
        least = cost(w, (w @ x @ z.T @ torch.linalg.inv(z @ z.T)) @ first, x)
        assert best == pytest.approx(least, rel=1e-6)
        assert (refitted(w, first, second, Inputs(gram(x)), 1e9) - second).abs().max() < 1e-6 * second.abs().max()


def test_balanced_factors_have_the_same_product_and_equal_norms() -> None:
    w, _ = data(24, 40)
    w[:, 5:] = 0  # rank 5: the rest of 8 components is empty
    first, second = factors(w, 8, Inputs())
    new_first, new_second = balanced(first, second)
    assert (new_second @ new_first - second @ first).norm() < 1e-12 * w.norm()
    assert (new_first.norm(dim=1)[:5] / new_second.norm(dim=0)[:5] - 1).abs().max() < 1e-12
    assert new_second[:, :5].norm(dim=0).pow(2).allclose(torch.linalg.svdvals(w)[:5])  # the plain SVD's roots on both sides
    empty = torch.zeros(2, 40, dtype=torch.float64)
    assert balanced(empty, second[:, :2])[1].equal(second[:, :2])


def test_errors_fall_from_one_to_nothing_and_those_of_a_dead_layer_at_once() -> None:
    assert errors(torch.tensor([6.0, 3.0, 1.0])).tolist() == pytest.approx([1, 0.4, 0.1, 0])
    assert errors(torch.zeros(3)).tolist() == [1, 0, 0, 0]


def test_large_matrices_are_decomposed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = data(24, 40)
    exact = descending_eigh(gram(x))
    assert (descending_eigenvalues(gram(x)) - exact[0]).abs().max() < 1e-12 * exact[0][0]
    monkeypatch.setattr(linear_algebra, "MOST_DOUBLE", 39)
    values, vectors = descending_eigh(gram(x))
    assert values.dtype == vectors.dtype == torch.float64
    assert 1e-12 < (values - exact[0]).abs().max() / exact[0][0] < 1e-5
    root, inverse = roots(gram(x), floor=1e-2)
    assert (root @ inverse - torch.eye(40)).abs().max() < 1e-4
