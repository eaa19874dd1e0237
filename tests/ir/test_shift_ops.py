"""Power-of-two weights: shifts and additions equal the integer product, other formats hold the codes exactly, trained forms equal frozen ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.ir.formats import ACTIVATIONS, POWERS, WEIGHTS, codes, fake_quantize, grid, nearest_power
from rewright.ir.ops.shift_linear_ps import ps_codes
from rewright.ir.ops.shift_linear_q import q_terms
from rewright.ir.pot import VALUES, pack_codes, shift_add, unpack_codes

torch.set_num_threads(1)
ours = torch.ops.rewright
ALL = torch.tensor([*VALUES, *(-v for v in VALUES[1:])])
X8 = ("int8-dynamic", "int8-token")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Random codes."""
    return ALL[torch.randint(0, len(ALL), shape, generator=torch.Generator().manual_seed(seed))]


# -- codes ------------------------------------------------------------------------------------------------------------


def test_the_nearest_code_is_the_one_with_the_least_distance() -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-2, 2, 4001)])
    found = nearest_power(x)
    assert set(found.tolist()) == {float(v) for v in ALL}
    torch.testing.assert_close((found - x).abs(), (ALL.float()[:, None] - x).abs().amin(0), rtol=0, atol=0)


def test_half_way_the_larger_code_is_taken() -> None:
    middles = torch.tensor([0.5, 1.5, 3, 6, 12, 24, 48])
    assert nearest_power(middles).tolist() == list(VALUES[1:]) and nearest_power(-middles).tolist() == [-v for v in VALUES[1:]]


def test_a_code_that_is_not_clipped_is_off_by_a_third_at_most() -> None:
    x = torch.logspace(0, 2, 10_000).clamp(max=96)  # up to half way to the code there is not
    error = (nearest_power(x) - x).abs() / x
    assert 0.33 < error.max() <= 1 / 3 + 1e-6


def test_more_levels_reach_further_and_are_no_finer() -> None:
    x = torch.tensor([70.0, 97, 20_000])
    assert nearest_power(x, 15).tolist() == [64, 128, 16384]
    assert nearest_power(x, 7).tolist() == [64, 64, 64]


@pytest.mark.parametrize("width", [1, 2, 15, 64])
def test_packed_codes_come_back(width: int) -> None:
    c = drawn(2, 5, width)
    packed = pack_codes(c)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, (width + 1) // 2)
    assert unpack_codes(packed, width).dtype == torch.int8 and torch.equal(unpack_codes(packed, width), c.to(torch.int8))


def test_the_layout_is_sign_then_exponent_first_code_low() -> None:
    assert pack_codes(torch.tensor([[1, -64], [0, -1], [64, 0]])).tolist() == [[0xF1], [0x90], [0x07]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_other_formats_hold_every_code_exactly(dtype: torch.dtype) -> None:
    assert torch.equal(ALL.float().to(dtype).to(torch.int64), ALL)


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 31, 2000])
def test_shifts_and_additions_equal_the_product_of_8_bit_integers_exactly(width: int) -> None:
    x, c = torch.randint(-255, 256, (9, width)), drawn(8, width)
    added = shift_add(x, c)
    assert added.dtype == torch.int64 and torch.equal(added, x @ c.T)
    if width > 16:  # what torch's own kernel takes
        small = x.clamp(-127, 127).to(torch.int8)
        rows = torch.nn.functional.pad(small, (0, -width % 8, 0, 16))  # [more than 16, a multiple of 8]
        embedded = torch.nn.functional.pad(unpack_codes(pack_codes(c), width), (0, -width % 8))
        assert torch.equal(torch._int_mm(rows, embedded.T.contiguous())[:9].long(), shift_add(small, c))


@pytest.mark.parametrize("activations", X8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_computes_with_these_integers(activations: str, dtype: torch.dtype) -> None:
    """Up to 2,000 inputs of the largest codes a float32 sum stays below 2^24."""
    x, c, scale = torch.randn(6, 1999, dtype=dtype), drawn(12, 1999), torch.rand(12, dtype=dtype) + 0.1
    form = ACTIVATIONS[activations]
    assert form is not None
    on = grid(x, form)
    q = codes(x, on, form) - on.zero_point
    assert torch.equal(q, q.round()) and q.abs().max() > 100
    want = shift_add(q.long(), c).to(dtype) * scale * on.scale
    assert torch.equal(ours.shift_linear(x, pack_codes(c)[None], scale[None], None, activations), want)


def test_two_terms_are_the_sum_of_two_layers() -> None:
    x, c, scale = torch.randn(5, 40), drawn(2, 8, 40), torch.rand(2, 8) + 0.1
    for activations in (*X8, "none"):
        alone = [ours.shift_linear(x, pack_codes(c[t : t + 1]), scale[t : t + 1], None, activations) for t in (0, 1)]
        torch.testing.assert_close(ours.shift_linear(x, pack_codes(c), scale, None, activations), alone[0] + alone[1], rtol=1e-5, atol=1e-3)


def test_float_activations_are_not_rounded() -> None:
    x, c, scale, b = torch.randn(5, 40), drawn(8, 40), torch.rand(8), torch.randn(8)
    want = torch.nn.functional.linear(x, c * scale[:, None], b)
    assert torch.equal(ours.shift_linear(x, pack_codes(c)[None], scale[None], b, "none"), want)


def test_half_precision_sums_in_float32() -> None:
    """Half precision overflows at 65,504, which ten products of the largest codes exceed."""
    x, c = torch.ones(3, 512, dtype=torch.float16), torch.full((4, 512), 64)
    y = ours.shift_linear(x, pack_codes(c)[None], torch.full((1, 4), 1 / 512, dtype=torch.float16), None, "int8-token")
    assert y.dtype == torch.float16 and torch.equal(y, torch.full((3, 4), 64.0, dtype=torch.float16))


def test_fake_quantize_knows_the_formats() -> None:
    w = torch.randn(16, 64, requires_grad=True)
    form = WEIGHTS["pot4-channel"]
    on = grid(w.detach(), form)
    assert codes(w, on, form).abs().amax(-1).tolist() == [64] * 16 and torch.equal(codes(w, on, form), nearest_power(w / on.scale))
    once, twice = (fake_quantize(w, WEIGHTS[f"pot{bits}-channel"]) for bits in (4, 8))
    assert (once - w).square().mean() > 10 * (twice - w).square().mean()
    (gradient,) = torch.autograd.grad(twice.sum(), w)
    assert torch.equal(gradient, torch.ones_like(w))


# -- the trained forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("activations", [*X8, "none"])
def test_rounded_weights_are_the_frozen_op_bit_for_bit(terms: int, activations: str) -> None:
    x, w, b = torch.randn(7, 33), torch.randn(9, 33), torch.randn(9)
    scale = torch.rand(terms, 9) * 0.02 + 0.01
    scale[1:] /= 8
    packed = pack_codes(torch.stack(q_terms(w, scale)))
    assert torch.equal(ours.shift_linear_q(x, w, 64 * scale, b, activations), ours.shift_linear(x, packed, scale, b, activations))


def test_exponents_and_signs_are_the_frozen_op_bit_for_bit() -> None:
    x, shift, sign, scale = torch.randn(7, 33), torch.rand(9, 33) * 9 - 1.5, torch.randn(9, 33), torch.rand(1, 9)
    c = ps_codes(shift, sign)
    assert set(c.abs().unique().tolist()) == {float(v) for v in VALUES}
    assert torch.equal(
        ours.shift_linear_ps(x, shift, sign, 64 * scale, None, "int8-token"), ours.shift_linear(x, pack_codes(c)[None], scale, None, "int8-token")
    )


@pytest.mark.parametrize("terms", [1, 2])
def test_gradients_pass_straight_through_to_rounded_weights_that_are_not_clipped(terms: int) -> None:
    x, w = torch.randn(7, 33, dtype=torch.float64), torch.randn(9, 33, dtype=torch.float64, requires_grad=True)
    largest = torch.full((terms, 9), 1.0, dtype=torch.float64)
    largest[1:] /= 8
    weigh = torch.randn(7, 9, dtype=torch.float64)
    (found,) = torch.autograd.grad((ours.shift_linear_q(x, w, largest, None, "none") * weigh).sum(), w)
    clipped = w.detach().abs() > 1.5
    assert 0 < clipped.sum() < 100
    torch.testing.assert_close(found, torch.where(clipped, 0, weigh.T @ x))


def test_the_largest_code_gets_the_gradient_of_the_rounding_error_and_of_clipped_weights() -> None:
    """LSQ: d(scale code(w / scale)) / d scale = code - w / scale, the code itself where it is clipped; largest is 64 scales."""
    x, w = torch.randn(7, 33, dtype=torch.float64), torch.randn(9, 33, dtype=torch.float64)
    largest = torch.full((1, 9), 1.0, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(7, 9, dtype=torch.float64)
    (found,) = torch.autograd.grad((ours.shift_linear_q(x, w, largest, None, "none") * weigh).sum(), largest)
    slope = nearest_power(64 * w) - torch.where(w.abs() > 1.5, 0, 64 * w)
    torch.testing.assert_close(found[0], ((weigh.T @ x) * slope).sum(1) / 64)


def test_exponents_and_signs_get_the_gradients_of_what_they_make() -> None:
    x, sign = torch.randn(7, 33, dtype=torch.float64), torch.sign(torch.randn(9, 33, dtype=torch.float64)).requires_grad_()
    shift = (torch.rand(9, 33, dtype=torch.float64) * 5 + 0.5).requires_grad_()
    weigh, largest = torch.randn(7, 9, dtype=torch.float64), torch.full((1, 9), 64, dtype=torch.float64)
    by_shift, by_sign = torch.autograd.grad((ours.shift_linear_ps(x, shift, sign, largest, None, "none") * weigh).sum(), (shift, sign))
    size = torch.exp2(shift.detach().round())
    torch.testing.assert_close(by_sign, (weigh.T @ x) * size)
    torch.testing.assert_close(by_shift, (weigh.T @ x) * size * sign.detach() * torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_exponents_stay_between_0_and_6() -> None:
    assert ps_codes(torch.tensor([-3.0, 9.0]), torch.tensor([1.0, -1.0])).tolist() == [1, -(2 ** (POWERS - 1))]
