"""The pass: statistics asked for once, edges chosen by site, everything it leaves alone said, and the function kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.blocks.edges import edges
from rewright.ir.errors import RecipeError, UsageError
from rewright.ir.graph import Graph
from rewright.passes.outliers.migrate import migrate
from rewright.passes.outliers.objective import Objective
from rewright.passes.outliers.observed import observe
from rewright.passes.outliers.outlier_migration import OutlierMigration
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.recipe import make_pass
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration, linear_inputs

from .migrations import Attention, C, Gated, PostNorm, X, canonical

METHODS = ("osplus", "smoothquant", "smoothquant-search", "smoothquant-bias", "reparam", "awq", "fp-preshift")


class PreNorm(nn.Module):
    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        norm = (lambda: nn.RMSNorm(C, eps=1e-6)) if gated else (lambda: nn.LayerNorm(C))
        self.one, self.two, self.attention = norm(), norm(), Attention(kv=2)
        self.ffn = Gated() if gated else nn.Sequential(nn.Linear(C, 24), nn.GELU(), nn.Linear(24, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.one(x))
        return x + self.ffn(self.two(x))


def planted(module: nn.Module) -> Graph:
    """A canonical graph with outliers: some channels of its norms 30 times as large and 20 off, undone in the linears."""
    graph = canonical(module, X)
    for edge in edges(graph):
        if edge.site == "norm-linear":
            s, z = torch.ones(C), torch.zeros(C)
            s[[1, 7]], z[[7, 9]] = 1 / 30, -20.0
            shift = None if isinstance(edge.shift_into, str) or edge.others else z
            migrate(graph, edge, s, shift, "restore")
    graph.clean()
    return graph


def run(graph: Graph, **options: Any) -> Outcome:
    batches = [(torch.randn(2, 5, C, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    outcome = Pipeline([OutlierMigration(**{"grid": 8, **options})], calibration=Calibration(batches)).run(graph, batches[:2])
    assert not outcome.undone, outcome.undone[0].undone
    return outcome


def ratios(graph: Graph) -> list[float]:
    """Largest over median channel of every linear's input."""
    seen = Calibration([(X,)]).gather(graph, linear_inputs(graph, {"absmax"}))
    return [float(seen[v].absmax.max() / seen[v].absmax.median()) for v in seen]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gated", [False, True])
def test_every_method_keeps_the_function_and_shrinks_planted_outliers(method: str, gated: bool) -> None:
    graph = planted(PreNorm(gated))
    outcome = run(graph, method=method)
    record = outcome.records[-1]
    assert record.applied == (4 if gated else 3)
    assert record.measured["step_error"] < 2e-6
    assert max(ratios(outcome.graph)) < 0.6 * max(ratios(graph))
    if method == "fp-preshift":
        assert record.measured["step_error"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_scales_of_powers_of_two_without_shifts_are_bit_exact(method: str) -> None:
    outcome = run(planted(PreNorm()), method=method, pot_scales=True, shift="never", explicit="linear")
    assert outcome.records[-1].measured["bit_equal"]
    assert outcome.records[-1].applied


def test_two_edges_of_one_pass_do_not_disturb_each_other() -> None:
    """v_proj reads one edge and absorbs the next, whose scale was chosen before: the next edge's rows are still what it will see."""
    graph = planted(PreNorm(True))
    together = run(graph, method="smoothquant").graph
    apart = run(run(graph, method="smoothquant", sites=("norm-linear",)).graph, method="smoothquant", sites=("value-output", "up-down")).graph
    for name, w in together.weights().items():
        other = next(v for n, v in apart.weights().items() if n.split("_migrated")[0] == name.split("_migrated")[0])
        assert torch.allclose(w, other, rtol=1e-4, atol=1e-6), name


def test_the_searched_choice_is_the_best_for_what_is_quantized() -> None:
    def error(graph: Graph) -> float:
        """Of the first edge's linears, with both sides quantized as they come."""
        edge = next(e for e in edges(graph) if e.site == "norm-linear")
        seen = Calibration([(X,)]).gather(graph, step.requests(graph)).of(edge.value)
        known = observe(graph, edge, seen, None, ties=True, pot=False, kinds=frozenset({"min", "max", "rows"}))
        return Objective(known, step.weights, step.activations).loss(torch.ones(C, dtype=torch.float64))

    graph, step = planted(PreNorm()), OutlierMigration(activations="int8-token")
    for method in ("osplus", "smoothquant-search", "awq"):
        assert error(run(graph, activations="int8-token", method=method).graph) < 0.5 * error(graph)


def test_sites_choose_the_edges() -> None:
    graph = planted(PreNorm(True))
    assert run(graph, method="smoothquant", sites=("up-down",)).records[-1].layers == ["ffn.down"]
    assert run(graph, method="smoothquant", sites=("value-output",)).records[-1].layers == ["attention.o"]


def test_what_is_left_alone_is_said() -> None:
    record = run(canonical(PostNorm(), X), method="smoothquant").records[-1]
    assert record.layers == ["attention.o"]
    assert [d.layer for d in record.declined] == ["attention.qkv", "up", "down"]
    assert [d.why.partition("explicit")[2] or d.why for d in record.declined] == [
        " = 'linear' or 'restore' would take care of them",
        " = 'linear' or 'restore' would take care of them",
        "neither a factor nor a shift passes gelu",
    ]


def test_a_scale_without_its_shift_is_said() -> None:
    record = run(planted(PreNorm(True)), method="osplus").records[-1]
    said = [d.why for d in record.declined]
    assert "scaled only: one is an RMS norm, which has no bias that could take a shift" in said
    assert any(w.startswith("scaled only: a shift does not pass the product") for w in said)
    assert run(planted(PreNorm(True)), method="osplus", shift="never").records[-1].declined == []


def test_nothing_to_gain_is_said() -> None:
    graph = canonical(nn.Sequential(nn.LayerNorm(C, elementwise_affine=False), nn.Linear(C, 8)), X)
    record = run(graph, method="awq", grid=1).records[-1]
    assert [d.why for d in record.declined] == ["awq found nothing to gain: s = 1 is best"]


def test_weights_that_would_overflow_are_said() -> None:
    x = X.half()
    module = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 8)).half()
    graph = canonical(module, x)
    with torch.no_grad():
        graph.weight("0.weight")[0] = 30000
        graph.weight("1.weight")[0, 0] = 30000
    calibration = Calibration([(x,)])
    step, context = OutlierMigration(method="smoothquant", alpha=1.0), Context(calibration=calibration)
    context.statistics = calibration.gather(graph, step.requests(graph))
    step.run(graph, context)
    assert "more than torch.float16 holds" in context.declined[0].why


def test_restore_and_linear_take_care_of_a_post_norm() -> None:
    graph = canonical(PostNorm(), X)
    assert run(graph, explicit="restore", method="smoothquant").records[-1].applied == 3
    assert run(graph, explicit="linear", method="smoothquant").records[-1].applied == 4


def test_statistics_come_in_one_run() -> None:
    calibration = Calibration([(X,)])
    Pipeline([OutlierMigration(method="smoothquant"), OutlierMigration(method="osplus", grid=4)], calibration=calibration).run(planted(PreNorm()), [(X,)])
    assert calibration.runs == 2, "one for both passes, one again for what the first has changed"


def test_convolutions_are_edges_along_their_own_axis() -> None:
    module = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 8, 3))
    x = torch.randn(2, 3, 8, 8)
    outcome = Pipeline([OutlierMigration(method="smoothquant-search", grid=4)], calibration=Calibration([(x,)])).run(canonical(module, x), [(x,)])
    assert not outcome.undone
    assert outcome.records[-1].layers == ["3"]


def test_it_needs_statistics() -> None:
    with pytest.raises(UsageError, match="run it in a Pipeline with calibration"):
        OutlierMigration().run(planted(PreNorm()), Context())


def test_options_are_checked() -> None:
    assert make_pass("outlier-migration", {"method": "awq", "sites": ["norm-linear"]}) == OutlierMigration(method="awq", sites=("norm-linear",))
    with pytest.raises(RecipeError, match="sites"):
        make_pass("outlier-migration", {"sites": ["norm"]})
    with pytest.raises(RecipeError, match="method"):
        make_pass("outlier-migration", {"method": "magic"})


def test_a_graph_without_weights_is_migrated_from_a_store() -> None:
    def graph(device: str) -> Graph:
        torch.manual_seed(0)
        return canonical(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, 8)).to(device), X.to(device))

    real, empty = graph("cpu"), graph("meta")
    stored, before = {n: w.detach().clone() for n, w in real.weights().items()}, real.clone()
    for g in (real, empty):
        calibration, step = Calibration([(X,)], weights=stored), OutlierMigration(method="smoothquant")
        context = Context(calibration=calibration, statistics=calibration.gather(g, step.requests(g)))
        step.run(g, context)
        assert len(context.applied) == 2
        g.clean()
    empty.materialize(stored)
    empty.recompile()
    with torch.no_grad():
        assert torch.allclose(real(X), empty(X), atol=1e-6)
        assert torch.allclose(real(X), before(X), atol=1e-5)
