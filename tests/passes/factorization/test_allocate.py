"""One rewrite a layer, chosen by what it costs and saves: on feed-forward layers made so that the right choice is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.cost import cost
from rewright.ir.errors import RecipeError
from rewright.ir.graph import Graph
from rewright.passes.factorization.allocate import Allocate
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.statistics import Calibration

WIDTH, HIDDEN = 32, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """layers.0: half of the hidden channels repeat the other half; layers.1: matrices of rank 8; layers.2: neither."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(count: int = 3) -> Blocks:
    torch.manual_seed(0)
    made = Blocks(count).eval()
    with torch.no_grad():
        twins, thin = made.layers[0], made.layers[1]
        twins.up.weight[HIDDEN // 2 :], twins.up.bias[HIDDEN // 2 :] = twins.up.weight[: HIDDEN // 2], twins.up.bias[: HIDDEN // 2]
        for linear in (thin.up, thin.down):
            u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight.copy_((u[:, :8] * s[:8]) @ v[:8])
    return made


X = [torch.randn(4, 50, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(6)]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Pipeline([], verify=False).run(capture(model(), (X[0],))).graph


def run(graph: Graph, predict: Any = None, ignore: tuple[str, ...] = (), **options: Any) -> Outcome:
    settings = {
        "choices": ("ffn-width:round_to=4", "low-rank:round_to=4,require_faster=false"),
        "calibration": "oneshot",
        "weigh": "error",
        "ends": None,
        **options,
    }
    return Pipeline([Allocate(**settings)], calibration=Calibration([(x,) for x in X]), predict=predict, ignore=ignore).run(graph, [(X[0],)])


def ffn_bytes(g: Graph) -> int:
    return sum(t.nbytes for name, t in g.weights().items() if "layers" in name and "norm" not in name)


def test_each_layer_gets_the_rewrite_that_fits_its_matrices(graph: Graph) -> None:
    outcome = run(graph, ratio=0.25)
    [summary, *each] = [n for n in outcome.graph.notes if n.startswith("allocate: ")]
    taken = {line.split(": ")[2].split(" ")[0]: line.split(": ")[1] for line in each}
    assert taken["layers.0"].startswith("ffn-width") and taken["layers.1"].startswith("low-rank")
    assert outcome.records[-1].undone is None and outcome.records[-1].measured["relative_error"] < 0.05
    assert outcome.records[-1].applied == 2 and "as it is" in taken["layers.2"]
    assert outcome.records[-1].declined[0].why == "as it is, it is the best the budget has for it"
    assert "less bytes in 3 layers" in summary


@pytest.mark.parametrize("budget", ["bytes", "flops", "latency"])
@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_the_budget_is_kept(budget: Any, solver: Any, graph: Graph) -> None:
    def seconds(g: Graph) -> float:
        return cost(g).flops * 1e-9 + 1e-7 * len(g.nodes)

    outcome = run(graph, seconds, ratio=0.3, budget=budget, solver=solver)
    assert outcome.records[-1].undone is None
    price = {"bytes": ffn_bytes, "flops": lambda g: cost(g).flops, "latency": seconds}[budget]
    saved = price(graph) - price(outcome.graph)
    layers = {"bytes": ffn_bytes(graph), "flops": 3 * 2 * 2 * X[0][..., 0].numel() * WIDTH * HIDDEN}.get(budget)
    if layers is not None:
        assert 0.3 * layers <= saved < 0.4 * layers
    else:
        assert saved > 0.2 * price(graph)


def test_a_choice_that_is_predicted_slower_is_not_taken(graph: Graph) -> None:
    """A machine on which each call costs more than any product: two linears for one are slower."""
    outcome = run(graph, lambda g: 1.0 * len(g.nodes), ratio=0.25)
    notes = " ".join(outcome.graph.notes)
    assert "ffn-width" in notes and "low-rank" not in notes
    why = run(graph, lambda g: 1.0 * len(g.nodes), ratio=0.25, choices=("low-rank:round_to=4,require_faster=false",)).records[-1].undone
    assert why is not None and "can't save 25% of the bytes of 3 layers: its choices save 0% at most" in why and "predicted" in why


def test_the_ends_and_the_floor_bound_what_a_layer_loses(graph: Graph) -> None:
    outcome = run(graph, ratio=0.3, ends=0.5, choices=("ffn-width:round_to=1",))
    kept = [
        outcome.graph.weights()[n].shape[0] / HIDDEN
        for n in sorted(n for n in outcome.graph.weights() if ".up" in n and n.split(".up")[1].startswith(".weight"))
    ]
    assert kept[0] >= 0.85 - 0.02 and kept[2] >= 0.85 - 0.02 and 0.35 - 0.02 <= kept[1] < 0.5


def test_any_pass_can_be_a_choice(graph: Graph) -> None:
    outcome = run(graph, ratio=0.5, choices=("ffn-width:round_to=4", "quantize-linear:weights=int8-channel,activations=none,min_weights=0"), prefer=1.0)
    assert outcome.records[-1].undone is None
    assert len(outcome.graph.find(torch.ops.rewright.linear_nbits.default)) >= 4  # the last two layers
    assert outcome.records[-1].measured["cosine"] > 0.999


def test_drift_sees_what_the_program_does_with_a_layer(graph: Graph) -> None:
    """The output of the last block is not looked at by the head: all that is removed is removed there."""
    made = model()
    with torch.no_grad():
        made.layers[2].down.weight.mul_(1e-4)  # what it adds is nothing beside the residual stream
    blind = Pipeline([], verify=False).run(capture(made, (X[0],))).graph
    by_drift = run(blind, ratio=0.2, weigh="drift", choices=("ffn-width:round_to=1",), floor=0.3)
    by_error = run(blind, ratio=0.2, weigh="error", choices=("ffn-width:round_to=1",), floor=0.3)
    assert "layers.2" in by_drift.records[-1].layers
    assert by_drift.records[-1].measured["relative_error"] < 0.1 * by_error.records[-1].measured["relative_error"]


def test_chosen_layers_are_fitted_to_what_the_rewritten_layers_before_them_give(graph: Graph) -> None:
    errors = {}
    for order in ("oneshot", "asymmetric"):
        outcome = run(graph, ratio=0.5, calibration=order, choices=("ffn-width:round_to=1",))
        with torch.no_grad():
            errors[order] = sum(float((graph.run((x,))[0] - outcome.graph.run((x,))[0]).square().sum()) for x in X)
    assert errors["asymmetric"] < errors["oneshot"]


def test_ratio_zero_is_the_identity_and_layers_the_user_names_are_left_alone(graph: Graph) -> None:
    outcome = run(graph, ratio=0.0)
    assert outcome.graph.module.code == graph.module.code and outcome.records[-1].matched == 0
    spared = run(graph, ratio=0.2, ignore=("layers.1",))
    assert "layers.1" not in spared.records[-1].layers
    assert any(d.why == "the user asked to leave layers.1 alone" for d in spared.records[-1].declined)


def test_what_is_missing_is_said(graph: Graph) -> None:
    with pytest.raises(RecipeError, match="ratio is the share that is removed"):
        Allocate(ratio=1.0)
    with pytest.raises(RecipeError, match="no pass named 'ffn-widht'"):
        Allocate(choices=("ffn-widht",))
    with pytest.raises(RecipeError, match="can't be a choice of itself"):
        Allocate(choices=("allocate",))
    why = run(graph, budget="latency").records[-1].undone
    assert why is not None and "needs a target whose speed is known" in why
    why = Pipeline([Allocate()]).run(graph).records[-1].undone
    assert why is not None and "there is none" in why


def test_a_layer_that_reads_more_than_one_value_is_declined_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return x + self.down(nn.functional.gelu(self.up(x)) * s)

    graph = Pipeline([], verify=False).run(capture(Scaled(), (X[0], torch.ones(4, 1, 1)))).graph
    flats = [(x, torch.ones(4, 1, 1)) for x in X]
    record = Pipeline([Allocate()], calibration=Calibration(flats)).run(graph).records[-1]
    assert [d.why for d in record.declined] == ["it can't be measured alone: s is read besides x"] or record.matched == 0
