"""What the cost model promises: it ranks linears as the clock does (benchmarks/cost_model.json), and what cannot pay on a CPU is refused in words."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from rewright.backends.target import Target
from rewright.ir.capture import capture
from rewright.passes.factorization.low_rank import LowRank
from rewright.passes.factorization.predicted import product_seconds
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.rewrite import Pass
from rewright.passes.shiftadd.shift_linear import ShiftLinear
from rewright.tools.optimize import cost, predicted_seconds

torch.set_num_threads(1)
RECORDED = Path(__file__).parents[2] / "benchmarks" / "cost_model.json"
CPU = Target.load("cpu-avx512-vnni")
"""The class of the machine they were measured on."""
KINDS = ("torch fp32", "onnxruntime fp32", "onnxruntime int8-dynamic")


class Layers(nn.Module):
    """Linears beside each other."""

    def __init__(self, sizes: list[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs)]


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[tuple[float, float]]]:
    """Predicted and measured microseconds of each kind."""
    recorded = [row for row in json.loads(RECORDED.read_text())["rows"] if row["kind"] in KINDS]
    sizes = list(dict.fromkeys((inputs, outputs, bias) for _, inputs, outputs, bias in (row["linear"] for row in recorded)))
    floats = capture(Layers(sizes), ([torch.randn(4, inputs) for inputs, _, _ in sizes],), dynamic_shapes={"xs": {0: "rows"}})
    quantized = Pipeline([QuantizeLinear(min_weights=1)], verify=False).run(floats).graph
    found: dict[str, list[tuple[float, float]]] = {}
    for row in recorded:
        rows, *size = row["linear"]
        calls = cost(quantized if "int8" in row["kind"] else floats, CPU, {"rows": rows})
        assert len(calls) == len(sizes)
        found.setdefault(row["kind"], []).append((calls[sizes.index(tuple(size))][1] * 1e6, row["measured_us"]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_rank_linears_as_they_were_measured(pairs: dict[str, list[tuple[float, float]]], kind: str) -> None:
    assert len(pairs[kind]) >= 25
    assert spearmanr(*zip(*pairs[kind]))[0] > 0.95  # type: ignore[operator]


def test_the_three_kinds_together_rank_as_measured_and_half_are_within_a_third(pairs: dict[str, list[tuple[float, float]]]) -> None:
    every = [pair for kind in KINDS for pair in pairs[kind]]
    assert spearmanr(*zip(*every))[0] > 0.95  # type: ignore[operator]
    assert statistics.median(abs(p - m) / m for p, m in every) < 0.35


# -- what cannot pay ------------------------------------------------------------------------------------------------------


def run(step: Pass, module: nn.Module, rows: int, inputs: int) -> Outcome:
    graph = capture(module, (torch.randn(rows, inputs),))
    return Pipeline([step], CPU, predict=lambda g, sizes=None: predicted_seconds(g, CPU, sizes), verify=False).run(graph)


@pytest.mark.parametrize(("inputs", "outputs"), [(384, 1536), (256, 256)])
@pytest.mark.parametrize("rows", [1, 1024])
def test_factors_of_nine_tenths_of_the_rank_are_refused(inputs: int, outputs: int, rows: int) -> None:
    rank = round(0.9 * min(inputs, outputs))
    factorised, dense = (product_seconds(CPU, rows, p, torch.float32) for p in ([(inputs, rank), (rank, outputs)], [(inputs, outputs)]))
    assert factorised > dense
    record = run(LowRank(rank=rank, score="plain", affine=False, scope="all"), nn.Linear(inputs, outputs), rows, inputs).records[-1]
    assert record.applied == 0 and f"two factors of rank {rank} take" in record.declined[0].why


def test_nine_tenths_of_the_parameters_of_a_small_call_are_refused_with_both_figures() -> None:
    """A second call costs more than a tenth of the work saves."""
    rank = 86  # of 96, where two factors take as much as 192 x 192
    record = run(LowRank(rank=rank, score="plain", affine=False, scope="all"), nn.Linear(192, 192), 16, 192).records[-1]
    assert record.applied == 0 and record.declined[0].why.startswith("predicted ") and "us factorised at rank 86 against" in record.declined[0].why


def test_shift_products_are_predicted_no_faster_than_8_bit_ones_and_the_pass_says_so() -> None:
    module = nn.Linear(384, 1536)
    step = ShiftLinear(calibrated=False)
    shift = run(step, module, 1024, 384).graph
    int8 = run(QuantizeLinear(), module, 1024, 384).graph
    assert predicted_seconds(shift, CPU) >= 0.99 * predicted_seconds(int8, CPU)
    assert any("no faster than int8 weights" in note for note in shift.notes)
    floats = run(ShiftLinear(calibrated=False, activations="none"), module, 1024, 384)
    assert predicted_seconds(floats.graph, CPU) >= 0.99 * predicted_seconds(capture(module, (torch.randn(1024, 384),)), CPU)
    assert any("not faster: onnxruntime and torch make float weights" in note for note in floats.graph.notes)
