"""Modelled energy, worked out by hand: picojoules of the table times counted operations, DRAM bytes beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewright as rw
from rewright.ir.capture import capture
from rewright.ir.cost import node_costs
from rewright.ir.energy import CAPTION, PICOJOULES, Energy, energy, total
from rewright.ir.formats import pack
from rewright.ir.graph import Graph

OPS = torch.ops.rewright
ROWS, INNER, OUTER = 5, 24, 12
MACS = ROWS * INNER * OUTER


def test_the_table_is_the_one_its_source_has() -> None:
    assert PICOJOULES == {
        "fp32 mul": 3.7,
        "fp32 add": 0.9,
        "int8 mul": 0.2,
        "int8 add": 0.03,
        "int32 add": 0.1,
        "int32 shift": 0.13,
        "int8 shift": 0.024,
        "DRAM byte": 200 / 2,
    }
    assert CAPTION.startswith("modelled, not measured")
    assert "Horowitz, ISSCC 2014, 45 nm" in CAPTION


class Product(nn.Module):
    """One op on x and constants."""

    def __init__(self, op: str, *operands: object) -> None:
        super().__init__()
        self.op, self.operands = op, operands
        for i, value in enumerate(operands):
            if isinstance(value, Tensor):
                self.register_buffer(f"_{i}", value)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(OPS, self.op)(x, *(getattr(self, f"_{i}") if isinstance(v, Tensor) else v for i, v in enumerate(self.operands)))


def product(op: str, *operands: object) -> Graph:
    return capture(Product(op, *operands), (torch.randn(ROWS, INNER),))


def one(graph: Graph, **sizes: int) -> Energy:
    (found,) = energy(graph, sizes)
    return found


def test_a_float_linear_multiplies_and_adds_in_fp32_and_reads_everything_once() -> None:
    found = one(capture(nn.Linear(INNER, OUTER), (torch.randn(ROWS, INNER),)))
    assert (found.op, found.layer) == ("linear", "")
    assert found.multiplications == pytest.approx(3.7 * MACS)
    assert found.additions == pytest.approx(0.9 * MACS)
    assert found.shifts == 0
    assert found.memory == 100 * 4 * (ROWS * INNER + INNER * OUTER + OUTER + ROWS * OUTER)
    assert found.total == pytest.approx(4.6 * MACS + found.memory)


SCALED = ROWS * INNER + ROWS * OUTER  # values rounded, sums scaled
W8, SCALE = torch.ones(OUTER, INNER, dtype=torch.int8), torch.ones(OUTER)
TERNARY = pack(torch.ones(OUTER, INNER), 2)


def shifts(terms: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(terms, OUTER, INNER // 2, dtype=torch.uint8), torch.ones(terms, OUTER)


@pytest.mark.parametrize(
    ("op", "operands", "multiplications", "additions", "shifted"),
    [
        ("linear_int8_dynamic", (W8, SCALE), 0.2 * MACS + 3.7 * SCALED, 0.1 * MACS, 0),
        ("linear_token", (W8, SCALE), 0.2 * MACS + 3.7 * SCALED, 0.1 * MACS, 0),
        ("linear_fp8", (W8.to(torch.float8_e4m3fn), SCALE), 3.7 * MACS, 0.9 * MACS, 0),
        ("ternary_linear", (TERNARY, SCALE, None, "int8-token"), 3.7 * SCALED, 0.1 * MACS, 0),
        ("ternary_linear", (TERNARY, SCALE[:1], None, "none"), 3.7 * ROWS * OUTER, 0.9 * MACS, 0),
        ("shift_linear", (*shifts(1), None, "int8-token"), 3.7 * SCALED, 0.1 * MACS, 0.13 * MACS),
        ("shift_linear", (*shifts(2), None, "int8-dynamic"), 3.7 * (SCALED + ROWS * OUTER), 0.2 * MACS, 0.26 * MACS),
        ("shift_linear", (*shifts(2), None, "none"), 3.7 * 2 * ROWS * OUTER, 1.8 * MACS, 0.26 * MACS),
        ("shift_linear_q", (torch.ones(OUTER, INNER), torch.ones(2, OUTER), None, "int8-token"), 3.7 * (SCALED + ROWS * OUTER), 0.2 * MACS, 0.26 * MACS),
        ("shift_linear_ps", (torch.ones(OUTER, INNER), torch.ones(OUTER, INNER), SCALE[None], None, "none"), 3.7 * ROWS * OUTER, 0.9 * MACS, 0.13 * MACS),
    ],
)
def test_products_on_codes_count_in_their_own_arithmetic(op: str, operands: tuple, multiplications: float, additions: float, shifted: float) -> None:
    found = one(product(op, *operands))
    assert (found.multiplications, found.additions, found.shifts) == pytest.approx((multiplications, additions, shifted))
    weights = sum(o.nbytes for o in operands if isinstance(o, Tensor))
    assert found.memory == 100 * (weights + 4 * (ROWS * INNER + ROWS * OUTER)), "packed weights as they are packed"


def test_ternary_weights_are_a_sixteenth_of_the_bytes_and_costs_are_those_of_integers() -> None:
    (found,) = node_costs(product("ternary_linear", TERNARY, SCALE[:1], None, "int8-token"))
    assert (found.dtype, found.cost.flops, found.weight_bytes) == (torch.int8, 2 * MACS, OUTER * INNER // 4 + 4)
    (found,) = node_costs(product("ternary_linear", TERNARY, SCALE[:1], None, "none"))
    assert found.dtype == torch.float32
    (found,) = node_costs(product("shift_linear", *shifts(2), None, "int8-token"))
    assert (found.dtype, found.cost.flops, found.weight_bytes) == (torch.int8, 4 * MACS, OUTER * INNER + 4 * 2 * OUTER)
    (found,) = node_costs(product("shift_linear", *shifts(2), None, "none"))
    assert (found.dtype, found.cost.flops) == (torch.float32, 2 * MACS)


def test_binary_attention_adds_and_multiplies_in_its_filter_and_norm_alone() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, v: Tensor, conv: Tensor, gain: Tensor) -> Tensor:
            return OPS.shift_add_attention(q, q, v, conv, gain)

    b, h, n, d, dv, taps = 2, 3, 7, 8, 4, 5
    graph = capture(Attend(), (torch.randn(b, h, n, d), torch.randn(b, h, n, dv), torch.randn(h, dv, taps), torch.ones(h)), dynamic_shapes={})
    found, values = one(graph), b * h * n * dv
    assert found.additions == pytest.approx(0.9 * (2 * values * d + values * taps + 4 * values))
    assert found.multiplications == pytest.approx(3.7 * (values * taps + 4 * values))
    (cost,) = node_costs(graph)
    assert cost.cost.flops == 2 * (2 * values * d) + 2 * values * taps + 8 * values


def test_other_calls_are_half_multiplications_and_half_additions() -> None:
    found = one(capture(nn.GELU(), (torch.randn(3, 10),)))
    assert found.multiplications == pytest.approx(3.7 * 4 * 30)
    assert found.additions == pytest.approx(0.9 * 4 * 30)
    assert one(capture(nn.ReLU(), (torch.randn(1, 3),), dynamic_shapes={})).additions == pytest.approx(0.9 * 2), "an odd one is an addition"


def test_other_sizes_are_counted_without_another_capture_and_sums_are_sums() -> None:
    graph = capture(
        nn.Sequential(nn.Linear(INNER, OUTER), nn.ReLU(), Product("ternary_linear", pack(torch.ones(3, OUTER), 2), SCALE[:1], None, "int8-token")),
        (torch.randn(ROWS, INNER),),
    )
    once, ten = energy(graph), energy(graph, {"batch": 10 * ROWS})
    for a, b in zip(once, ten, strict=True):
        assert (b.multiplications, b.additions) == pytest.approx((10 * a.multiplications, 10 * a.additions))
    whole = total(once)
    assert whole.total == pytest.approx(sum(r.total for r in once))
    assert whole.memory == sum(r.memory for r in once)
    assert rw.energy(graph) == once


def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        graph = capture(nn.Linear(INNER, OUTER), (torch.empty(ROWS, INNER),))
    assert one(graph).multiplications == pytest.approx(3.7 * MACS)
