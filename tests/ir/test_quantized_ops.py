"""Quantized products: what they mean in loops and integers, gradients through their rounding, and that they fine-tune."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir import ops
from rewright.ir.formats import FP8_MAX, WEIGHTS, codes, grid, grouped, pack

torch.set_num_threads(1)
OPS = torch.ops.rewright


def _cases(name: str, dtype: torch.dtype = torch.float64) -> list[tuple]:
    torch.manual_seed(0)
    return list(getattr(ops, name).cases(dtype, "cpu"))


# -- meanings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "clipped"), [(0, {0, 255}), (1, {0}), (2, {255}), (3, set())])
def test_a_static_product_is_the_integer_product_of_onnx_codes(case: int, clipped: set[int]) -> None:
    x, x_scale, x_zero_point, w, scale, b = _cases("linear_int8_static")[case]
    q = torch.clamp(torch.round(x / x_scale) + x_zero_point, 0, 255).to(torch.int64)
    product = (q - x_zero_point.to(torch.int64)) @ w.to(torch.int64).T
    expected = product * x_scale.double() * scale.double() + (0 if b is None else b)
    torch.testing.assert_close(OPS.linear_int8_static(x, x_scale, x_zero_point, w, scale, b), expected)
    assert {0, 255} & set(q.unique().tolist()) == clipped


@pytest.mark.parametrize("case", range(3))
def test_a_token_product_is_an_integer_product_scaled_by_token_and_channel(case: int) -> None:
    x, w, scale, b, bits = _cases("linear_token")[case]
    high = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / high
    q = torch.round(x / torch.where(step == 0, 1.0, step)).to(torch.int64)
    assert q.abs().amax(-1).unique().tolist() == [0, high], "every token but that of zeros reaches its range's end"
    expected = (q @ w.to(torch.int64).T) * step * scale.double() + (0 if b is None else b)
    torch.testing.assert_close(OPS.linear_token(x, w, scale, b, bits), expected)


@pytest.mark.parametrize("case", range(5))
def test_codes_of_n_bits_are_read_first_channel_lowest(case: int) -> None:
    x, w, scale, zero_point, b, bits, group = _cases("linear_nbits")[case]
    out, width = w.shape[0], x.shape[-1]
    weight = torch.zeros(out, width, dtype=torch.float64)
    for row in range(out):
        for channel in range(width):
            n, at = divmod(channel, group)
            code = int(w[row, n, at * bits // 8]) >> at * bits % 8 & 2**bits - 1
            if zero_point is None:
                zero: float = 2 ** (bits - 1)
            elif zero_point.is_floating_point():
                zero = float(zero_point[row, n])
            else:
                zero = int(zero_point[row, n * bits // 8]) >> n * bits % 8 & 2**bits - 1
            weight[row, channel] = (code - zero) * float(scale[row, n])
    torch.testing.assert_close(OPS.linear_nbits(x, w, scale, zero_point, b, bits, group), F.linear(x, weight, b))


@pytest.mark.parametrize("case", range(4))
def test_an_embedding_of_n_bits_reads_the_rows_a_linear_multiplies(case: int) -> None:
    ids, w, scale, zero_point, bits, group = _cases("embedding_nbits")[case]
    width = w.shape[1] * group
    table = OPS.linear_nbits(torch.eye(width, dtype=torch.float64), w, scale, zero_point, None, bits, group).T
    assert torch.equal(OPS.embedding_nbits(ids, w, scale, zero_point, bits, group), table[ids])


@pytest.mark.parametrize("case", range(3))
def test_an_fp8_product_rounds_every_token_over_its_own_range(case: int) -> None:
    x, w, scale, b = _cases("linear_fp8", torch.float32)[case]
    rows = torch.zeros_like(x)
    for row, into in zip(x.flatten(0, -2), rows.flatten(0, -2)):
        step = row.abs().max() / FP8_MAX
        if step:
            into[:] = (row / step).to(torch.float8_e4m3fn).float() * step
    expected = F.linear(rows.double(), w.double() * scale.double()[:, None], None if b is None else b.double())
    torch.testing.assert_close(OPS.linear_fp8(x, w, scale, b).double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(rows, x)


# -- gradients ----------------------------------------------------------------------------------------------------------


def quantized(name: str, x: Tensor, w: Tensor) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The op over float weights w [out, in]: a function of (x, **learned) and what it learns beside its bias."""
    if name == "linear_nbits":
        parts = grouped(w, WEIGHTS["int4-group"], 16)
        on = grid(parts, WEIGHTS["int4-group"])
        packed = pack(codes(parts, on, WEIGHTS["int4-group"]), 4)
        learned = {"scale": on.scale[..., 0], "zero_point": on.zero_point[..., 0]}
        return lambda x, scale, zero_point, b=None: OPS.linear_nbits(x, packed, scale, zero_point, b, 4, 16), learned
    if name == "linear_fp8":
        on = grid(w, WEIGHTS["fp8-channel"])
        stored = codes(w, on, WEIGHTS["fp8-channel"]).to(torch.float8_e4m3fn)
        return lambda x, scale, b=None: OPS.linear_fp8(x, stored, scale, b), {"scale": on.scale[:, 0]}
    on = grid(w, WEIGHTS["int8-channel"])
    stored = codes(w, on, WEIGHTS["int8-channel"]).to(torch.int8)
    if name == "linear_int8_static":
        zero = torch.tensor(120, dtype=torch.uint8)
        learned = {"x_scale": (x.max() - x.min()) / 255 * 0.7, "scale": on.scale[:, 0]}  # clips
        return lambda x, x_scale, scale, b=None: OPS.linear_int8_static(x, x_scale, zero, stored, scale, b), learned
    return lambda x, scale, b=None: getattr(OPS, name)(x, stored, scale, b), {"scale": on.scale[:, 0]}


PRODUCTS = ("linear_int8_dynamic", "linear_int8_static", "linear_token", "linear_nbits", "linear_fp8")
WORST = {"linear_nbits": 0.15}
"""Relative error of a Gaussian weight in the op's format, generously; 8 bits: 3 %."""


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_of_x_is_the_float_linears_within_the_weights_error(name: str) -> None:
    torch.manual_seed(0)
    x, w, toward = torch.randn(6, 48), torch.randn(24, 48), torch.randn(6, 24)
    product, learned = quantized(name, x, w)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((product(x, **learned) * toward).sum(), x)
    expected = toward @ w
    if name == "linear_int8_static":
        step, zero = learned["x_scale"], 120
        clipped = (x / step < -zero) | (x / step > 255 - zero)
        assert clipped.any()
        assert not clipped.all()
        assert (gradient[clipped] == 0).all(), "nothing is learned from what is clipped"
        gradient, expected = gradient[~clipped], expected[~clipped]
    error = (gradient - expected).norm() / expected.norm()
    assert error < WORST.get(name, 0.03)


def test_the_static_grid_learns_by_rounding_errors_inside_and_by_the_limit_outside() -> None:
    x = torch.tensor([[0.3, -0.9, 2.2, 200.0, -90.0]])
    scale = torch.tensor(0.5, requires_grad=True)
    zero = torch.tensor(100, dtype=torch.uint8)
    eye = torch.eye(5, dtype=torch.int8)
    y = OPS.linear_int8_static(x, scale, zero, eye, torch.ones(5))
    found = torch.stack([torch.autograd.grad(v, scale, retain_graph=True)[0] for v in y[0]])
    steps = x[0] / 0.5
    inside = torch.round(steps) - steps
    torch.testing.assert_close(found, torch.cat([inside[:3], torch.tensor([155.0, -100.0])]))


class Tuned(nn.Module):
    def __init__(self, name: str, x: Tensor, w: Tensor) -> None:
        super().__init__()
        self.product, learned = quantized(name, x, w)
        self.learned = nn.ParameterDict(learned)
        self.bias = nn.Parameter(torch.zeros(w.shape[0]))
        self.before = nn.Linear(x.shape[1], x.shape[1])
        with torch.no_grad():
            self.before.weight.copy_(torch.eye(x.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.before(x), **self.learned, b=self.bias)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_module_of_the_op_fine_tunes(name: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 48), torch.randn(24, 48)
    target = torch.tanh(x @ torch.randn(24, 48).T + 0.5)
    module = Tuned(name, x, w * 0.2)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class TunedTable(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        if bits == 4:
            self.register_buffer("w", torch.randint(0, 256, (10, 2, 8), dtype=torch.uint8))
            self.scale, self.zero_point = nn.Parameter(torch.full((10, 2), 0.1)), nn.Parameter(torch.full((10, 2), 8.0))
        else:
            self.register_buffer("w", torch.randint(-127, 128, (10, 32), dtype=torch.int8))
            self.scale = nn.Parameter(torch.full((10,), 0.1))

    def forward(self, ids: Tensor) -> Tensor:
        if self.bits == 4:
            return OPS.embedding_nbits(ids, self.w, self.scale, self.zero_point, 4, 16)
        return OPS.embedding_int8(ids, self.w, self.scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_of_a_quantized_embedding_fine_tunes_in_the_rows_read(bits: int) -> None:
    torch.manual_seed(0)
    module, ids = TunedTable(bits), torch.tensor([0, 3, 3, 7])
    target = 0.2 * module(ids).detach() + (0.3 if bits == 4 else 0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(module(ids), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert module.scale.grad is not None
    assert module.scale.grad.view(10, -1).any(1).nonzero().flatten().tolist() == [0, 3, 7]
