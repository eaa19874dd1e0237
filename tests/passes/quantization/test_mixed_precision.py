"""Mixed precision: the solvers against brute force, budgets kept, the layers that matter keep their bits."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.errors import RecipeError
from rewright.ir.graph import Flat, Graph
from rewright.passes.knapsack import exact, greedy, total
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.quantization.mixed_precision import MixedPrecision
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.sensitivity import Sensitivity
from rewright.passes.statistics import Calibration
from rewright.tools.optimize import capture

aten = torch.ops.aten


# -- the solvers ------------------------------------------------------------------------------------------------------


def tables(seed: int, layers: int = 4, choices: int = 3) -> tuple[list[list[float]], list[list[float]]]:
    """Random drifts and bytes; more bytes are not always less drift."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.rand(layers, choices, generator=generator).double().pow(3)
    nbytes = torch.randint(1, 1 << 20, (layers, choices), generator=generator)
    return drift.tolist(), nbytes.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_the_exact_solver_finds_what_brute_force_finds_and_greedy_nothing_better(seed: int) -> None:
    drift, nbytes = tables(seed)
    smallest, largest = sum(map(min, nbytes)), sum(map(max, nbytes))
    for share in (0, 0.2, 0.5, 1):
        limit = smallest + share * (largest - smallest)
        allowed = [c for c in itertools.product(range(3), repeat=4) if total(nbytes, c) <= limit]
        best = min(total(drift, c) for c in allowed)
        chosen, quick = exact(drift, nbytes, limit), greedy(drift, nbytes, limit)
        assert chosen is not None and quick is not None
        assert total(nbytes, chosen) <= limit and total(nbytes, quick) <= limit
        assert total(drift, chosen) == pytest.approx(best, rel=1e-9)
        assert total(drift, quick) >= best - 1e-12
    assert exact(drift, nbytes, smallest - 1) is None and greedy(drift, nbytes, smallest - 1) is None


def test_greedy_is_near_the_best_on_many_layers_and_the_exact_solver_is_quick() -> None:
    drift, nbytes = tables(0, layers=200, choices=4)
    limit = 0.4 * sum(map(max, nbytes))
    chosen, quick = exact(drift, nbytes, limit), greedy(drift, nbytes, limit)
    assert chosen is not None and quick is not None
    assert total(drift, chosen) <= total(drift, quick) < 1.5 * total(drift, chosen) + 0.01
    assert total(nbytes, chosen) <= limit


def test_a_limit_is_kept_to_the_last_byte() -> None:
    assert exact([[0, 1]], [[10**9 + 1, 1]], 10**9) == [1]


def test_a_limit_of_nothing_chooses_what_costs_nothing() -> None:
    assert exact([[1, 2], [1, 2]], [[3, 0], [0, 5]], 0) == [1, 0] == greedy([[1, 2], [1, 2]], [[3, 0], [0, 5]], 0)


# -- the drift of layers ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Four layers in a row; the outputs depend least on what the second adds."""

    def __init__(self, logits: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 10) if logits else nn.LayerNorm(64)
        self.weight = (1.0, 0.01, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for f, layer in zip(self.weight, self.layers):
            x = x + f * torch.tanh(layer(x))
        return self.head(x)


X = torch.randn(6, 5, 64, generator=torch.Generator().manual_seed(0))


@cache
def captured(logits: bool = True) -> tuple[Graph, list[Flat]]:
    graph = capture(Net(logits).eval(), (X[:2],))
    return graph, [(X[:2],), (X[2:5],), (X[5:],)]


@pytest.mark.parametrize("logits", [True, False])
def test_the_drift_of_a_layer_alone_is_that_of_a_graph_with_it_quantized(logits: bool) -> None:
    graph, batches = captured(logits)
    step = QuantizeLinear(weights="int4-group", activations="none", group_size=32)
    linears = graph.find(aten.linear.default)[:4]
    sensitivity = Sensitivity(graph, batches)
    alone: dict[str, float] = {}
    runs = {}
    for node, drift_of in sensitivity.alone(linears):
        quantizer = step.quantizer(node, step.scheme, None)
        tensors = quantizer(*(graph.weight(w).detach() for w in node.args[1:]))  # type: ignore[arg-type]
        runs[node] = lambda x, quantizer=quantizer, tensors=tensors: quantizer.run(x, tensors)
        alone[node.meta["path"]] = drift_of({node: runs[node]})
        assert drift_of({node: lambda x, node=node: nn.functional.linear(x, *(graph.weight(w) for w in node.args[1:]))}) == 0  # type: ignore[arg-type]
    for paths, found in [((path,), drift) for path, drift in alone.items()] + [(tuple(alone), sensitivity.together(runs))]:
        quantized = Pipeline([QuantizeLinear(weights="int4-group", activations="none", group_size=32, only=paths)]).run(graph).graph
        a, b = (torch.cat([g.run(flat)[0] for flat in batches]).flatten(0, 1).double() for g in (graph, quantized))
        if logits:
            want = nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
        else:
            want = ((a - b).square().sum(-1) / a.square().sum(-1)).mean()
        assert found == pytest.approx(want.item(), rel=1e-3)
    assert alone["layers.1"] < 0.1 * min(alone[f"layers.{i}"] for i in (0, 2, 3))


# -- the pass ---------------------------------------------------------------------------------------------------------


def mixed(**options: Any) -> Outcome:
    graph, batches = captured()
    options = {"choices": ("int4-group/none", "int8-group/none", "keep"), "group_size": 32, "samples": 6, **options}
    return Pipeline([MixedPrecision(**options)], calibration=Calibration(batches)).run(graph, batches[:1])


def bits(outcome: Outcome) -> list[int]:
    """Of the four layers; 32 where a linear stayed."""
    found = {n.meta["path"]: n.args[5] for n in outcome.graph.find(torch.ops.rewright.linear_nbits.default)}
    return [found.get(f"layers.{i}", 32) for i in range(4)]  # type: ignore[misc]


def linear_bytes(outcome: Outcome) -> int:
    return sum(t.nbytes for n, t in outcome.graph.weights().items() if n.startswith(("layers", "head")) and "bias" not in n)


FOUR, EIGHT, HEAD = 64 * 64 // 2 + 64 * 2 * 4 + 64, 64 * 64 + 64 * 2 * 5, 64 * 10 * 4


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_a_budget_of_bytes_is_kept_and_the_layer_that_matters_least_goes_low_first(solver: Any) -> None:
    everything = HEAD + 4 * 64 * 64 * 4
    outcome = mixed(budget_bytes=everything - 1, solver=solver)
    assert bits(outcome)[1] == 4 or bits(outcome)[1] == 8
    assert linear_bytes(outcome) < everything
    outcome = mixed(budget_bytes=HEAD + 3 * EIGHT + FOUR + 200, solver=solver, choices=("int4-group/none", "int8-group/none"))
    assert bits(outcome) == [8, 4, 8, 8]
    assert linear_bytes(outcome) <= HEAD + 3 * EIGHT + FOUR + 200
    assert outcome.graph.notes[-1].startswith("mixed-precision: 3 x int8-group/none, 1 x int4-group/none; ")


def test_the_report_has_the_predicted_and_the_measured_drift() -> None:
    outcome = mixed(budget_bits=5.5)
    record = outcome.records[-1]
    assert record.applied == 4
    assert record.declined[-1].why == "its 640 weights are fewer than min_weights = 4,096"
    words = outcome.graph.notes[-1].split("drift ")[1].split()
    measured, predicted = float(words[0]), float(words[2])
    graph, batches = captured()
    a, b = (torch.cat([g.run(flat)[0] for flat in batches]).flatten(0, 1).double() for g in (graph, outcome.graph))
    assert measured == pytest.approx(nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True).item(), rel=0.02)
    assert 0.3 < measured / predicted < 3


def test_a_budget_of_drift_is_kept_with_few_bytes() -> None:
    loose, tight = mixed(budget_drift=0.02), mixed(budget_drift=1e-6)
    for outcome, budget in ((loose, 0.02), (tight, 1e-6)):
        assert float(outcome.graph.notes[-1].split("drift ")[1].split()[0]) <= budget
    assert linear_bytes(loose) < linear_bytes(tight)
    assert sum(bits(loose)) < sum(bits(tight))


def test_every_choice_may_be_a_pair_with_activations_and_use_data() -> None:
    outcome = mixed(choices=("int8-channel/int8-static", "int4-channel/int8-token", "keep"), algorithm="gptq", budget_bits=8.6)
    assert outcome.records[-1].applied == 4
    ops = {str(n.target).split(".")[1] for n in outcome.graph.nodes}
    assert "linear_int8_static" in ops or "linear_token" in ops


def test_choices_that_drift_far_from_their_sum_are_measured_together_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that look harmless alone: what the sum says is far from what the whole does."""
    lying = [0.0, 1.0, 0.0, 1.0]
    told = iter(x for e in lying for x in (e * 1e-9, e * 1e-9 / 2))
    honest = Sensitivity.alone

    def alone(self: Sensitivity, linears: Any) -> Any:
        for node, _ in honest(self, linears):
            yield node, lambda run: next(told)

    options = {"choices": ("int4-group/none", "int8-group/none"), "budget_bytes": HEAD + 2 * EIGHT + 2 * FOUR + 200}
    monkeypatch.setattr(Sensitivity, "alone", alone)
    misled = mixed(**options)
    monkeypatch.undo()
    best = mixed(**options)
    drifts = [float(o.graph.notes[-1].split("drift ")[1].split()[0]) for o in (misled, best)]
    assert drifts[0] <= 1.1 * drifts[1]
    assert linear_bytes(misled) <= options["budget_bytes"]


def test_a_budget_of_drift_is_kept_when_layers_together_drift_more_than_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Sensitivity.alone

    def alone(self: Sensitivity, linears: Any) -> Any:
        for node, drift_of in honest(self, linears):
            yield node, lambda run, drift_of=drift_of: drift_of(run) / 20

    monkeypatch.setattr(Sensitivity, "alone", alone)
    outcome = mixed(budget_drift=1e-4)
    assert 0 < float(outcome.graph.notes[-1].split("drift ")[1].split()[0]) <= 1e-4
    assert min(bits(outcome)) < 32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget_bytes": 1, "budget_drift": 1.0}, "mixed-precision keeps one budget: budget_bytes or budget_drift, not both"),
        ({"choices": ("int4-group/none",)}, "needs two or more different choices, got int4-group/none"),
        ({"choices": ("int4-group", "keep")}, 'a choice is "WEIGHTS/ACTIVATIONS"'),
        ({"choices": ("int4-group/int8-token", "keep")}, "int4-group weights with int8-token activations is no combination"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        MixedPrecision(**options)


def test_budgets_that_can_not_be_kept_are_refused_with_what_can() -> None:
    assert (mixed(budget_bytes=HEAD + 4 * FOUR - 1).records[-1].undone or "").startswith(
        f"the budget leaves {4 * FOUR - 1:,} bytes for 4 linears, and no combination is below {4 * FOUR:,}; raise it"
    )
    undone = mixed(budget_drift=1e-12, choices=("int4-group/none", "int8-group/none")).records[-1].undone or ""
    assert undone.startswith("no combination found within budget_drift = 1e-12: layers alone add up to ")


def test_without_calibration_data_or_weights_it_says_so() -> None:
    graph, batches = captured()
    assert "there is none; give some" in (Pipeline([MixedPrecision()]).run(graph, batches).records[-1].undone or "")
    with torch.device("meta"):
        meta = capture(Net().eval(), (torch.empty(2, 5, 64),))
    assert "needs its weights in memory" in (Pipeline([MixedPrecision()], calibration=Calibration(batches)).run(meta).records[-1].undone or "")
