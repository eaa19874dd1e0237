"""Projections on block structures: their error is the truncated spectrum, what they give is what the ops compute, refits never lose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rewright.passes.factorization.block_projection import Blocks, merged, output_error, projected, refitted_first, refitted_second

torch.set_num_threads(1)
OPS = torch.ops.rewright

SHAPES = [(16, 16), (48, 24), (24, 48), (64, 16)]  # outputs, inputs
STRUCTURES = [(4, 4, 4), (2, 4, 6), (4, 2, 3), (2, 2, 5), (4, 1, 2), (8, 2, 1)]  # k, l, q: l divides q or not, or there is no shuffle
CUTS = [Blocks(inputs, outputs, k, outs, q) for outputs, inputs in SHAPES for k, outs, q in STRUCTURES] + [Blocks(19, 13, 4, 3, 3), Blocks(13, 19, 3, 5, 5)]


def weight(blocks: Blocks) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(blocks.outputs, blocks.inputs, dtype=torch.float64)


def gram(blocks: Blocks) -> Tensor:
    """Of inputs that depend on each other, across blocks too."""
    torch.manual_seed(1)
    x = torch.randn(5 * blocks.inputs, blocks.inputs, dtype=torch.float64) @ torch.randn(blocks.inputs, blocks.inputs, dtype=torch.float64)
    return x.T @ x / len(x)


def run(blocks: Blocks, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """By the op; one block of outputs by both."""
    y = OPS.block_shuffle_linear(x, first, second, torch.zeros(blocks.outputs, dtype=x.dtype))
    if blocks.outs == 1:
        torch.testing.assert_close(OPS.block_dense_linear(x, first, second[0]), y, rtol=1e-12, atol=1e-12)
    return y


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_the_error_is_the_spectrum_cut_off_pair_by_pair(blocks: Blocks) -> None:
    w = weight(blocks)
    first, second = projected(blocks, w)
    expected = 0.0
    for a in range(blocks.outs):
        for c in range(blocks.ins):
            part = w[a :: blocks.outs, c * blocks.p : (c + 1) * blocks.p]
            rank = sum(t % blocks.outs == a for t in range(c * blocks.q, (c + 1) * blocks.q))
            expected += float(torch.linalg.svdvals(part)[rank:].square().sum()) if part.numel() else 0.0
    assert float((w - merged(blocks, first, second)).square().sum()) == pytest.approx(expected, rel=1e-12, abs=1e-20)
    assert expected > 0


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_a_projected_matrix_is_projected_on_itself(blocks: Blocks) -> None:
    once = merged(blocks, *projected(blocks, weight(blocks)))
    torch.testing.assert_close(merged(blocks, *projected(blocks, once)), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_the_op_computes_the_product_of_the_factors(blocks: Blocks) -> None:
    x = torch.randn(7, blocks.inputs, dtype=torch.float64)
    factors = projected(blocks, weight(blocks), gram(blocks))
    assert [f.numel() for f in factors] == [blocks.middle * blocks.p, blocks.middle * blocks.s]
    assert sum(f.numel() for f in factors) == blocks.parameters
    torch.testing.assert_close(run(blocks, *factors, x), x @ merged(blocks, *factors).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [Blocks(24, 48, 4, 4, 24), Blocks(24, 48, 4, 1, 6), Blocks(13, 19, 3, 5, 25)], ids=str)
def test_full_rank_gives_the_matrix_back(blocks: Blocks) -> None:
    for given in (None, gram(blocks)):
        torch.testing.assert_close(merged(blocks, *projected(blocks, weight(blocks), given)), weight(blocks), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_a_whitened_pair_is_nearest_in_what_its_inputs_make(blocks: Blocks) -> None:
    w, g = weight(blocks), gram(blocks)
    error = blocks.cut(w - merged(blocks, *projected(blocks, w, g)))
    for a, c, u in blocks.pairs():
        own = blocks.moments(g)[c, :, c]
        part, left = blocks.cut(w)[a, :, c], error[a, :, c]
        best = torch.linalg.eigvalsh(part @ own @ part.T).clamp(min=0).flip(0)[len(u) :].sum()
        assert float((left @ own * left).sum()) == pytest.approx(float(best), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_no_refit_raises_the_error_and_the_first_of_each_kind_lowers_it(blocks: Blocks) -> None:
    w, g = weight(blocks), gram(blocks)
    first, second = projected(blocks, w, g)
    errors = [output_error(blocks, w, first, second, g)]
    for _ in range(4):
        second = refitted_second(blocks, w, first, second, g, 1e-4)
        errors.append(output_error(blocks, w, first, second, g))
        first = refitted_first(blocks, w, first, second, g, 1e-4)
        errors.append(output_error(blocks, w, first, second, g))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_without_ridge_the_refitted_second_factor_leaves_an_error_the_middle_values_do_not_see(blocks: Blocks) -> None:
    w, g = weight(blocks), gram(blocks)
    first, second = projected(blocks, w)
    error = w - merged(blocks, first, refitted_second(blocks, w, first, second, g, 1e-12))
    middle = torch.block_diag(*first)[:, : blocks.inputs]  # [k q, inputs]
    for a in range(blocks.outs):
        seen = error[a :: blocks.outs] @ g @ middle[a :: blocks.outs].T
        assert seen.abs().max() < 1e-6 * (w @ g @ middle.T).abs().max()


@pytest.mark.parametrize("blocks", CUTS, ids=str)
def test_whitened_and_refitted_is_nearer_than_the_nearest_in_weights(blocks: Blocks) -> None:
    w, g = weight(blocks), gram(blocks)
    first, second = projected(blocks, w, g)
    both = output_error(blocks, w, first, refitted_second(blocks, w, first, second, g, 1e-4), g)
    assert both < output_error(blocks, w, *projected(blocks, w), g)


def test_blocks_that_read_the_same_do_not_all_make_up_for_one_error() -> None:
    blocks = Blocks(24, 6, 4, 1, 6)
    w, same = weight(blocks), torch.eye(6, dtype=torch.float64).repeat(4, 4)
    first, second = projected(blocks, w)
    before = output_error(blocks, w, first / 2, second, same)
    assert output_error(blocks, w, refitted_first(blocks, w, first / 2, second, same, 1e-4), second, same) < 1e-6 * before


def test_the_largest_output_of_every_middle_value_is_positive_so_that_equal_matrices_give_equal_factors() -> None:
    for w in (weight(Blocks(24, 48, 4, 4, 8)), -weight(Blocks(24, 48, 4, 4, 8))):
        second = projected(Blocks(24, 48, 4, 4, 8), w)[1]
        largest = second.gather(1, second.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_dead_inputs_do_no_harm() -> None:
    blocks = Blocks(24, 48, 4, 4, 8)
    w, g = weight(blocks), gram(blocks)
    g[:, 6:12] = g[6:12] = 0
    first, second = projected(blocks, w, g)
    second = refitted_second(blocks, w, first, second, g, 1e-4)
    first = refitted_first(blocks, w, first, second, g, 1e-4)
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert output_error(blocks, w, first, second, g) < float((w @ g * w).sum())
