"""Number formats: the error each makes is that of the table, 0 stays 0, codes stay in range, packing comes back, gradients pass."""

from __future__ import annotations

from functools import cache
from statistics import mean

import pytest
import torch
from torch import Tensor

from rewright.ir.formats import FP8_MAX, WEIGHTS, Format, codes, fake_quantize, grid, grid_between, grouped, pack, straight_through, unpack, values

SYMMETRIC_4 = Format("int", 4, "group")
ASYMMETRIC_8 = Format("int", 8, "tensor", symmetric=False)


@cache
def weights(kind: str, seed: int) -> Tensor:
    """[512, 1024]: N(0, 1), Student's t with 4 degrees of freedom, or N(0, 1) with 1 % of the channels, evenly spread, times 20."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(512, 1024, generator=generator)
    if kind == "student-t4":
        return w / (torch.randn(4, 512, 1024, generator=generator).square().sum(0) / 4).sqrt()
    if kind == "outliers":
        w[:, seed::100] *= 20
    return w


def signal_to_noise(kind: str, form: Format, group_size: int) -> float:
    """In dB, the mean over three draws."""
    found = []
    for seed in range(3):
        w = weights(kind, seed)
        noise = w - fake_quantize(w, form, group_size)
        found.append(10 * torch.log10(w.square().mean() / noise.square().mean()).item())
    return mean(found)


# specs/quant_shiftadd.md 1: N(0, 1), Student-t4, N(0, 1) + 1 % channels x20
TABLE = [
    ("int8 per row", WEIGHTS["int8-channel"], 0, (42.1, 34.4, 28.1)),
    ("fp8 per tensor", Format("fp8", 8, "tensor"), 0, (31.6, 31.5, 31.5)),
    ("int4 per row", WEIGHTS["int4-channel"], 0, (16.9, 9.8, 7.4)),
    ("int4 groups of 128", SYMMETRIC_4, 128, (18.6, 14.3, 10.5)),
    ("int4 groups of 32", SYMMETRIC_4, 32, (20.3, 17.6, 15.8)),
]


@pytest.mark.parametrize(("form", "group_size", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_signal_to_noise_of_each_format_is_that_of_the_table(form: Format, group_size: int, expected: tuple[float, ...]) -> None:
    found = [signal_to_noise(kind, form, group_size) for kind in ("gauss", "student-t4", "outliers")]
    assert all(abs(a - b) < 0.3 for a, b in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("name", [n for n, form in WEIGHTS.items() if form.kind != "pot"])  # whose codes test_shift_ops.py tests
def test_codes_stay_in_range_and_reach_its_end(name: str) -> None:
    form, w = WEIGHTS[name], weights("student-t4", 0)[:5, :256]
    parts = grouped(w, form, 64)
    q = codes(parts, grid(parts, form), form)
    if form.kind == "fp8":
        assert q.abs().amax(-1).tolist() == [FP8_MAX] * 5
        return
    assert torch.equal(q, q.round())
    assert form.low <= q.min() and q.max() <= form.high
    reached = q.abs().amax(-1) if form.symmetric else q.amax(-1) - q.amin(-1)
    assert (reached == form.high).float().mean() > 0.8  # where -low / scale and high / scale round away from each other a code is lost
    assert (fake_quantize(w, form, 64) - w).abs().max() < grid(parts, form).scale.max()


@pytest.mark.parametrize("form", [ASYMMETRIC_8, SYMMETRIC_4, WEIGHTS["int4-group"], WEIGHTS["fp8-channel"]])
def test_zero_stays_zero_and_a_tensor_of_zeros_is_no_trouble(form: Format) -> None:
    x = torch.tensor([[5.0, 7.0, 0.0, 6.0]])
    assert fake_quantize(x, form, 2)[0, 2] == 0
    assert fake_quantize(-x, form, 2)[0, 2] == 0
    assert torch.equal(fake_quantize(torch.zeros(2, 4), form, 2), torch.zeros(2, 4))


@pytest.mark.parametrize("x", [torch.tensor([0.0, 0.3, 5.0]), torch.tensor([-4.0, -0.1]), torch.tensor([-1.0, 0.0, 3.0]), torch.zeros(3)])
def test_eight_bits_over_the_present_range_agree_with_the_onnx_formula(x: Tensor) -> None:
    """DynamicQuantizeLinear of the ONNX standard."""
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    want = [(min(255, max(0, round(v / step) + zero)) - zero) * step for v in x.tolist()]
    assert torch.allclose(fake_quantize(x, ASYMMETRIC_8), torch.tensor(want), atol=1e-6)


def test_ties_go_to_the_even_code() -> None:
    on = grid_between(torch.tensor(-7.0), torch.tensor(7.0), SYMMETRIC_4)
    assert codes(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), on, SYMMETRIC_4).tolist() == [0, 2, 2, 0, -2]


def test_what_lies_beyond_the_grid_gets_its_last_code_exactly() -> None:
    on = grid_between(torch.tensor(-1.0), torch.tensor(1.0), WEIGHTS["int8-channel"])
    x = torch.linspace(1, 3, 999) * 1.2345
    assert set(codes(x, on, WEIGHTS["int8-channel"]).tolist()) == {127.0}
    assert set(codes(-x, on, WEIGHTS["int8-channel"]).tolist()) == {-127.0}
    assert values(torch.tensor(127.0), on) == 1


def test_rounding_passes_the_gradient_of_its_argument() -> None:
    x = torch.tensor([0.3, 1.7], requires_grad=True)
    y = straight_through(x, torch.round)
    (y * torch.tensor([2.0, 3.0])).sum().backward()
    assert y.tolist() == [0, 2]
    assert x.grad is not None and x.grad.tolist() == [2, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 16])
def test_packed_codes_come_back_and_the_first_lies_in_the_low_bits(bits: int, width: int) -> None:
    q = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(bits))
    packed = pack(q, bits)
    assert packed.shape == (3, -(-width * bits // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), q.to(torch.uint8))
    assert torch.equal(packed[:, 0].long() & (2**bits - 1), q[:, 0])
