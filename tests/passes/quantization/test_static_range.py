"""Ranges of static activations: what was seen, a percentile, the least squared error; zero stays a code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.ir.errors import RecipeError
from rewright.ir.formats import ACTIVATIONS, Grid, codes, values
from rewright.ir.graph import Graph
from rewright.passes.quantization.static_range import range_kinds, static_grid
from rewright.passes.statistics import Calibration, Request, ValueStatistics
from rewright.tools.optimize import capture

UINT8 = ACTIVATIONS["int8-static"]
assert UINT8 is not None


def seen(x: Tensor) -> ValueStatistics:
    """Statistics of x [rows, channels]."""
    graph: Graph = capture(torch.nn.Linear(x.shape[1], 2), (x[:2],))
    node = graph.inputs[0]
    return Calibration([(x,)]).gather(graph, [Request(node.name, range_kinds("mse"))])[node]


def error(x: Tensor, on: Grid) -> float:
    on = Grid(on.scale.float(), on.zero_point.float())
    return (values(codes(x, on, UINT8), on) - x).square().mean().item()


GENERATOR = torch.Generator().manual_seed(0)
HEAVY = torch.randn(2000, 16, generator=GENERATOR) / (torch.randn(3, 2000, 16, generator=GENERATOR).square().sum(0) / 3).sqrt()  # Student-t3
ONE_SIDED = torch.nn.functional.gelu(torch.randn(2000, 16, generator=GENERATOR))


@pytest.mark.parametrize("x", [HEAVY, ONE_SIDED, -ONE_SIDED, HEAVY.abs() + 3], ids=["heavy", "gelu", "negative gelu", "far from 0"])
def test_each_way_covers_what_it_should_and_zero_is_a_code(x: Tensor) -> None:
    known = seen(x)
    for how in ("minmax", "percentile:99.9", "mse"):
        on = static_grid(known, UINT8, how)
        assert on.scale.dim() == on.zero_point.dim() == 0
        assert on.zero_point == on.zero_point.round() and 0 <= on.zero_point <= 255
        low, high = (float((end - on.zero_point) * on.scale) for end in (0, 255))
        beyond = ((x < low - on.scale) | (x > high + on.scale)).float().mean().item()
        assert beyond == 0 if how == "minmax" else beyond < 0.002


def test_a_percentile_cuts_both_ends() -> None:
    wide, cut = (static_grid(seen(HEAVY), UINT8, how) for how in ("minmax", "percentile:99.9"))
    for end in (0, 255):
        assert abs((end - cut.zero_point) * cut.scale) < 0.8 * abs((end - wide.zero_point) * wide.scale)
    limit = HEAVY.abs().flatten().kthvalue(int(0.999 * HEAVY.numel())).values
    assert abs((255 - cut.zero_point) * cut.scale - limit) < 0.1 * limit


def test_the_least_squared_error_is_no_larger_than_that_of_the_other_ways() -> None:
    for x in (HEAVY, ONE_SIDED, -ONE_SIDED):
        known = seen(x)
        found = {how: error(x, static_grid(known, UINT8, how)) for how in ("minmax", "percentile:99.9", "percentile:99.99", "mse")}
        assert found["mse"] <= 1.02 * min(found.values()), found
    spike = torch.randn(2000, 1000, generator=GENERATOR)
    spike[3, 5] = 16  # alone among two million
    known = seen(spike)
    assert error(spike, static_grid(known, UINT8, "mse")) < 0.5 * error(spike, static_grid(known, UINT8, "minmax"))


@pytest.mark.parametrize("how", ["entropy", "percentile:", "percentile:10", "percentile:101"])
def test_an_unknown_way_is_answered_with_those_there_are(how: str) -> None:
    with pytest.raises(RecipeError, match='there are "minmax", "mse" and "percentile:99.99"'):
        range_kinds(how)
