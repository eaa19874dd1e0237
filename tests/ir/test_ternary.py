"""ternary_linear: integers that only additions and subtractions make, BitLinear's own rounding, gradients straight through it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewright.ir import ops
from rewright.ir.formats import pack
from rewright.ir.ops.ternary_linear import ternary

torch.set_num_threads(1)
OPS = torch.ops.rewright


def added(x: Tensor, w: Tensor) -> Tensor:
    """x [rows, in], w [out, in] of -1, 0 and 1: sums over masks, without a product."""
    columns = [x[:, row == 1].sum(-1) - x[:, row == -1].sum(-1) for row in w]
    return torch.stack(columns, -1)


def values(packed: Tensor, width: int) -> Tensor:
    """-1, 0 and 1 read bit by bit."""
    rows = [[(int(row[c // 4]) >> 2 * (c % 4) & 3) - 1 for c in range(width)] for row in packed]
    return torch.tensor(rows)


@pytest.mark.parametrize("width", range(1, 10))
def test_codes_of_any_width_come_back_first_channel_lowest(width: int) -> None:
    torch.manual_seed(width)
    w = torch.randint(-1, 2, (5, width))
    packed = pack(w + 1, 2)
    assert packed.shape == (5, -(-width // 4))
    assert torch.equal(ternary(packed, torch.empty(2, width)).long(), w)
    assert torch.equal(values(packed, width), w)


@pytest.mark.parametrize("case", range(5))
def test_a_product_is_sums_of_codes_or_of_floats_scaled_afterwards(case: int) -> None:
    torch.manual_seed(0)
    x, packed, scale, b, activations = list(ops.ternary_linear.cases(torch.float64, "cpu"))[case]
    rows, w = x.flatten(0, -2), values(packed, x.shape[-1])
    if activations == "none":
        expected = added(rows, w) * scale.double()
    else:
        largest = torch.stack([row.abs().max().clamp(min=1e-5) for row in rows])[:, None]
        codes = torch.round(rows * (127 / largest)).long()
        assert codes.abs().max() == 127
        assert codes[:1].abs().max() < 127, "the first token is below 1e-5"
        expected = added(codes, w) * scale.double() * largest / 127
    expected = expected + (0 if b is None else b)
    torch.testing.assert_close(OPS.ternary_linear(x, packed, scale, b, activations), expected.view(*x.shape[:-1], -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes, w = torch.randint(-127, 128, (6, 333)), torch.randint(-1, 2, (17, 333))
    codes[:, 0] = 127  # a token's step is 1
    sums = added(codes, w)
    y = OPS.ternary_linear(codes.to(dtype), pack(w + 1, 2), torch.ones(1), None, "int8-token")
    assert torch.equal(y, sums.to(dtype)), "sums of bfloat16 would have lost bits; only the result is rounded"
    assert torch.equal(OPS.ternary_linear(codes.float(), pack(w + 1, 2), torch.ones(17), None, "none").long(), sums)


def test_it_rounds_as_bitlinear_does_and_not_as_linear_token() -> None:
    torch.manual_seed(0)
    largest, eye = torch.rand(400, 1) + 0.5, torch.eye(64, dtype=torch.int8)
    x = (torch.randint(-127, 127, (400, 64)) + 0.5) * (largest / 127)  # between two codes, as nearly as float32 has it
    x[:, :1] = largest
    here = OPS.ternary_linear(x, pack(eye + 1, 2), torch.ones(1), None, "int8-token") * (127 / largest)
    there = OPS.linear_token(x, eye, torch.ones(64)) / (largest / 127)
    bitlinear = (x * (127 / largest)).round()
    assert torch.equal(here.round(), bitlinear)
    assert not torch.equal(there.round(), bitlinear), "some ties fall to the other side"


def test_the_rounding_of_half_precision_is_that_of_float32() -> None:
    torch.manual_seed(0)
    x, packed = torch.randn(9, 100).bfloat16(), pack(torch.randint(0, 3, (7, 100)), 2)
    y = OPS.ternary_linear(x, packed, torch.rand(7), None, "int8-token")
    torch.manual_seed(0)
    assert torch.equal(
        y, OPS.ternary_linear(torch.randn(9, 100).bfloat16().float(), pack(torch.randint(0, 3, (7, 100)), 2), torch.rand(7), None, "int8-token").bfloat16()
    )


def test_gradients_pass_straight_through_to_x_and_reach_scale_and_bias() -> None:
    torch.manual_seed(0)
    x, w, toward = torch.randn(6, 48, dtype=torch.float64), torch.randint(-1, 2, (24, 48)), torch.randn(6, 24, dtype=torch.float64)
    scale, b = torch.rand(24, dtype=torch.float64) + 0.1, torch.randn(24, dtype=torch.float64)
    for t in (x, scale, b):
        t.requires_grad_()
    y = OPS.ternary_linear(x, pack(w + 1, 2), scale, b, "int8-token")
    of_x, of_scale, of_b = torch.autograd.grad((y * toward).sum(), (x, scale, b))
    torch.testing.assert_close(of_x, toward @ (w * scale.detach()[:, None]))
    torch.testing.assert_close(of_scale, (toward * (y - b).detach() / scale.detach()).sum(0))
    torch.testing.assert_close(of_b, toward.sum(0))
    assert not torch.allclose(y, F.linear(x, w * scale[:, None], b))


def test_other_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="activations must be none or int8-token, got 'int8-dynamic'"):
        OPS.ternary_linear(torch.randn(2, 4), torch.zeros(3, 1, dtype=torch.uint8), torch.ones(1), None, "int8-dynamic")
