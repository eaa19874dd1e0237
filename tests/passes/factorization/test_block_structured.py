"""block-structured on small models: what it saves, what it says, what it leaves alone, and that its factors are the best it knows of."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.backends.target import Target
from rewright.ir.blocks import attention_blocks, ffn_blocks
from rewright.ir.capture import capture
from rewright.ir.errors import RecipeError, UsageError
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.factorization.block_projection import Blocks
from rewright.passes.factorization.block_seconds import block_seconds, dense_seconds, threshold
from rewright.passes.factorization.block_structured import BlockStructured
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration, Statistics

from ..encoder import encoder, example

torch.set_num_threads(1)
OPS = torch.ops.rewright
aten = torch.ops.aten
OP = {"block-dense": OPS.block_dense_linear.default, "block-shuffle": OPS.block_shuffle_linear.default}
KINDS = tuple(OP)


class FFN(nn.Module):
    """23 -> 50 -> 23: no block of 4 divides either."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(23, 50, bias), nn.Linear(50, 23, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@cache
def ffn(bias: bool = True) -> Graph:
    torch.manual_seed(0)
    return capture(FFN(bias).eval(), (torch.randn(2, 9, 23),))


@cache
def batches() -> tuple[tuple[Tensor], ...]:
    """Inputs that depend on each other and are not centred."""
    torch.manual_seed(1)
    mix = torch.randn(23, 23) * torch.logspace(0, -1.5, 23)[:, None]
    return tuple((torch.randn(2, 9, 23) @ mix + torch.linspace(-1, 1, 23),) for _ in range(12))


def run(options: BlockStructured, graph: Graph | None = None, **given: Any) -> Outcome:
    return Pipeline([options], calibration=Calibration(list(batches())), **given).run(graph or ffn(), [*batches()[:2]])


def drift(outcome: Outcome) -> float:
    """Mean squared error of the outputs over the calibration data, relative to their variance."""
    pairs = [(outcome.original.run(b)[0], outcome.graph.run(b)[0]) for b in batches()]
    y, z = (torch.cat([p[i].flatten(0, -2) for p in pairs]).double() for i in range(2))
    return float((y - z).square().sum() / (y - y.mean(0)).square().sum())


# -- what it makes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_layer_keeps_at_most_its_share_and_a_rank_more_would_be_too_much(kind: Any, ratio: float) -> None:
    outcome = run(BlockStructured(kind, ratio))
    nodes = outcome.graph.find(OP[kind])
    assert outcome.records[-1].applied == len(nodes) == 2
    for node in nodes:
        factors = [outcome.graph.weight(w).numel() for w in node.args[1:3]]  # type: ignore[arg-type]
        unit = sum(factors) // (outcome.graph.weight(node.args[1]).shape[0] * outcome.graph.weight(node.args[1]).shape[1])  # type: ignore[arg-type]
        assert sum(factors) <= (1 - ratio) * 23 * 50 < sum(factors) + 4 * unit


@pytest.mark.parametrize("kind", KINDS)
def test_the_rewritten_graph_runs_at_every_size_compiles_and_trains(kind: Any) -> None:
    outcome = run(BlockStructured(kind))
    assert outcome.records[-1].undone is None
    for shape in ((1, 1, 23), (5, 3, 23)):
        assert outcome.graph(torch.randn(shape)).shape == shape
    module, x = outcome.graph.module, torch.randn(2, 9, 23)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x), module(x))
    module(x).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert len(gradients) == 6
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_refits_bring_the_outputs_nearer(kind: Any) -> None:
    def loss(project: Any, refits: int) -> float:
        return drift(run(BlockStructured(kind, 0.5, project=project, refits=refits)))

    plain, refitted, whitened, best, better = loss("frobenius", 0), loss("frobenius", 1), loss("whitened", 0), loss("whitened", 1), loss("whitened", 4)
    assert better < 0.99 * best, "the first factor is refitted too"
    assert best < whitened < plain
    assert best < refitted < plain


@pytest.mark.parametrize("kind", KINDS)
def test_weights_alone_need_no_calibration_data_and_keep_the_bias(kind: Any) -> None:
    options = BlockStructured(kind, project="frobenius", refits=0)
    assert not options.requires
    assert not options.requests(ffn())
    outcome = Pipeline([options]).run(ffn(), [*batches()[:1]])
    weights = outcome.graph.weights()
    assert {name for name in weights if "bias" in name} == {"up.bias_refitted", "down.bias_refitted"}
    assert torch.equal(weights["up.bias_refitted"], ffn().weight("up.bias"))
    assert torch.equal(weights["down.bias_refitted"], ffn().weight("down.bias"))


def test_a_layer_without_a_bias_gets_one_from_data_and_where_outputs_are_padded() -> None:
    def biases(options: BlockStructured) -> dict[str, Tensor]:
        return {n: w for n, w in run(options, ffn(bias=False)).graph.weights().items() if "bias" in n}

    assert set(biases(BlockStructured())) == {"up.block_bias", "down.block_bias"}
    assert all(b.abs().max() > 0 for b in biases(BlockStructured()).values())
    data_free = {"project": "frobenius", "refits": 0}
    assert not biases(BlockStructured("block-dense", **data_free))  # type: ignore[arg-type]
    assert all((b == 0).all() for b in biases(BlockStructured("block-shuffle", **data_free)).values())  # type: ignore[arg-type]
    assert set(biases(BlockStructured("block-shuffle", **data_free))) == {"up.block_bias", "down.block_bias"}  # type: ignore[arg-type]


def test_the_refitted_bias_keeps_the_mean_of_the_output() -> None:
    outcome = run(BlockStructured(ratio=0.6))
    node, (before, _) = outcome.graph.find(OP["block-dense"])[0], outcome.original.find(aten.linear.default)
    x = torch.cat([b[0].flatten(0, 1) for b in batches()])
    old = F.linear(x, *(outcome.original.weight(w) for w in before.args[1:]))  # type: ignore[misc, arg-type]
    new = OPS.block_dense_linear(x, *(outcome.graph.weight(w) for w in node.args[1:]))  # type: ignore[arg-type]
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(new, old, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibration", ["sequential", "asymmetric"])
def test_later_layers_make_up_for_earlier_ones(kind: Any, calibration: Any) -> None:
    options = BlockStructured(kind, 0.5, refits=4)
    assert drift(run(replace(options, calibration=calibration))) < drift(run(options))


def test_what_earlier_layers_took_from_the_mean_an_asymmetric_layer_gives_back() -> None:
    def mean_moved(calibration: Any) -> float:
        outcome = run(BlockStructured(ratio=0.6, calibration=calibration))
        before, after = (torch.cat([g.run(b)[0] for b in batches()]).flatten(0, 1).mean(0) for g in (outcome.original, outcome.graph))
        return float((after - before).abs().max() / before.abs().max())

    assert mean_moved("asymmetric") < 1e-5
    assert mean_moved("sequential") > 1e-3


def test_what_is_not_believed_of_the_covariances_leads_to_the_variances_alone() -> None:
    full, none = (run(BlockStructured(ratio=0.5, shrink=s)) for s in (0.0, 1.0))
    half = run(BlockStructured(ratio=0.5, shrink=0.5))
    assert drift(full) < drift(half) < drift(none)
    assert all(w.isfinite().all() for w in none.graph.weights().values())


def test_a_rank_counts_middle_values_and_is_rounded_down_to_blocks() -> None:
    graph = run(BlockStructured(rank=14)).graph
    assert [tuple(graph.weight(n.args[1]).shape) for n in graph.find(OP["block-dense"])] == [(4, 3, 6), (4, 3, 13)]  # type: ignore[arg-type]


def test_half_precision_weights_stay_half_precision() -> None:
    torch.manual_seed(0)
    graph = capture(FFN().eval().to(torch.bfloat16), (batches()[0][0].to(torch.bfloat16),))
    flat = [(b[0].to(torch.bfloat16),) for b in batches()]
    outcome = Pipeline([BlockStructured(ratio=0.2, refits=3)], calibration=Calibration(flat)).run(graph, flat[:1])
    assert {w.dtype for w in outcome.graph.weights().values()} == {torch.bfloat16}
    assert outcome.total is not None
    assert outcome.total.cosine > 0.98


def test_a_graph_without_weights_gets_recipes_that_make_the_same_ones() -> None:
    with torch.device("meta"):
        empty = FFN().eval()
    graph = capture(empty, (torch.randn(2, 9, 23, device="meta"),))
    outcome = Pipeline([BlockStructured(project="frobenius", refits=0)]).run(graph)
    filled = outcome.graph
    filled.materialize(ffn().weights())
    wanted = Pipeline([BlockStructured(project="frobenius", refits=0)]).run(ffn()).graph.weights()
    found = filled.weights()
    assert {name: w.shape for name, w in found.items()} == {name: w.shape for name, w in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_graph_without_weights_is_fitted_to_data_layer_by_layer() -> None:
    with torch.device("meta"):
        graph = capture(FFN(bias=False).eval(), (torch.randn(2, 9, 23, device="meta"),))
    stored = ffn(bias=False).weights()
    outcome = Pipeline([BlockStructured()], calibration=Calibration(list(batches()), weights=stored)).run(graph)
    filled = outcome.graph
    filled.materialize(stored)
    wanted = run(BlockStructured(), ffn(bias=False)).graph.weights()
    assert {"up.block_bias", "down.block_bias"} < set(wanted)
    assert set(filled.weights()) == set(wanted)
    for name, w in filled.weights().items():
        torch.testing.assert_close(w, wanted[name], rtol=1e-4, atol=1e-4)


# -- where it works -----------------------------------------------------------------------------------------------------


@cache
def text() -> Graph:
    graph = capture(encoder(), kwargs=example())
    for step in CANONICAL:
        graph = step().run(graph, Context())
    graph.clean()
    return graph


@pytest.mark.parametrize(("scope", "count"), [("ffn", 4), ("attention", 8), ("all", 12)])
def test_the_scope_says_which_linears(scope: Any, count: int) -> None:
    flat = text().flat_inputs((), example())
    outcome = Pipeline([BlockStructured(scope=scope)], calibration=Calibration([flat])).run(text(), [flat])
    assert outcome.records[-1].applied == count
    assert len(outcome.graph.find(aten.linear.default)) == 12 - count
    assert [b.hidden for b in ffn_blocks(outcome.graph)] == [128, 128], "blocks know them as projections"
    assert len(attention_blocks(outcome.graph)) == 2
    assert outcome.total is not None
    assert outcome.total.cosine > 0.8


def statistics(graph: Graph, options: BlockStructured) -> Context:
    calibration = Calibration(list(batches()))
    found: Statistics = calibration.gather(graph, options.requests(graph))
    return Context(statistics=found, calibration=calibration)


def test_only_the_nodes_asked_for_are_looked_at_and_nothing_is_said_of_others() -> None:
    options, graph = BlockStructured(), ffn().draft()
    context = statistics(graph, options)
    context.only = frozenset({graph.find(aten.linear.default)[0].name})
    options.run(graph, context)
    assert (context.applied, context.declined) == (["up"], [])
    assert len(graph.find(OP["block-dense"])) == len(graph.find(aten.linear.default)) == 1
    assert not graph.notes


# -- what it leaves alone -----------------------------------------------------------------------------------------------


def test_no_ratio_gives_the_graph_back() -> None:
    outcome = run(BlockStructured(ratio=0))
    assert [(n.name, n.target, str(n.args)) for n in outcome.graph.nodes] == [(n.name, n.target, str(n.args)) for n in outcome.original.nodes]
    assert all(w is outcome.original.weights()[name] for name, w in outcome.graph.weights().items())


def declined(options: BlockStructured, model: nn.Module, **given: Any) -> dict[str, str]:
    torch.manual_seed(0)
    flat = (torch.randn(30, 24),)
    graph = capture(model.eval(), flat)
    outcome = Pipeline([options], calibration=Calibration([flat]), **given).run(graph)
    return {d.layer or d.node: d.why for d in outcome.records[-1].declined}


def test_tied_weights_and_few_channels_are_declined_in_words() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.tied, self.few, self.mine = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 3), nn.Linear(24, 24)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.few(self.mine(self.tied(torch.relu(self.first(x)))))

    whys = declined(BlockStructured("block-shuffle", scope="all"), Model(), ignore=("mine",))
    assert whys == {
        "first": "tied.weight is also read by tied: an edit would untie them",
        "tied": "tied.weight is also read by first: an edit would untie them",
        "few": "its matrix of 3 x 24 has fewer channels than the 4 blocks",
        "mine": "the user asked to leave mine alone",
    }


def test_computed_weights_and_biases_are_declined_in_words() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.a.weight * x.mean(), self.a.bias)
            return F.linear(x, self.b.weight, self.b.bias * x.mean())

    assert declined(BlockStructured(scope="all"), Model()) == {
        "linear": "the weight of linear is computed, not stored",
        "linear_1": "the bias of linear_1 is computed, not stored",
    }


def test_shapes_that_save_nothing_are_declined_with_the_numbers() -> None:
    (why,) = set(declined(BlockStructured(rank=24, scope="all"), nn.Linear(24, 24)).values())
    assert why == "24 middle values take 720 parameters, its matrix of 24 x 24 has 576"
    (why,) = set(declined(BlockStructured(ratio=0.9, scope="all"), nn.Linear(24, 24)).values())
    assert why == "10% of its 576 parameters are fewer than 4 blocks of rank 1 take (120)"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 1.0}, "ratio is the share that is removed"),
        ({"blocks": 1}, "one block is what low-rank makes"),
        ({"rank": 3}, "must be at least blocks"),
        ({"refits": -1}, "refits must not be negative"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"shrink": 1.5}, "shrink is a share"),
        ({"project": "frobenius", "refits": 0, "calibration": "sequential"}, "changes nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        BlockStructured(**options)


def test_data_is_asked_for_in_words() -> None:
    with pytest.raises(UsageError, match="needs statistics"):
        Pipeline([BlockStructured()]).run(ffn())


# -- pre-merge ----------------------------------------------------------------------------------------------------------

MADE_UP = Target("made up", "cuda", "sm_00", {"fp32": 1e12}, 1e12, 0, 0, 1, 5e-5, frozenset(), {})
SLOW = Target("slow", "cpu", "x", {"fp32": 1e8}, 1e9, 0, 0, 1, 1e-4, frozenset(), {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_matrix_computes_what_the_factors_do(kind: Any) -> None:
    factored, merged = (run(BlockStructured(kind, premerge=p)).graph for p in ("never", "always"))  # type: ignore[arg-type]
    assert [n.target for n in merged.find(aten.linear.default)] == [aten.linear.default] * 2
    assert merged.weight("up.weight_merged").shape == (50, 23)
    for flat in batches():
        torch.testing.assert_close(merged.run(flat)[0], factored.run(flat)[0])
    (note,) = merged.notes
    assert "2 layers merged to dense matrices, which saves nothing" in note


@pytest.mark.parametrize("blocks", [Blocks(768, 3072, 4, 1, 60), Blocks(768, 3072, 4, 4, 200), Blocks(3072, 768, 4, 4, 200)], ids=str)
def test_the_threshold_is_the_first_number_of_rows_at_which_blocks_are_faster(blocks: Blocks) -> None:
    for launch in range(50, 90):
        target = replace(MADE_UP, launch=launch * 1e-6)
        first = threshold(target, blocks, torch.float32)
        assert first is not None
        assert first > 1
        for rows, faster in ((1, False), (first - 1, False), (first, True), (4 * first, True)):
            assert (block_seconds(target, rows, blocks, torch.float32) < dense_seconds(target, rows, blocks, torch.float32)) is faster
    assert threshold(replace(MADE_UP, launch=100.0), blocks, torch.float32) is None
    assert threshold(replace(MADE_UP, launch=0.0), Blocks(768, 3072, 4, 1, 60), torch.float32) == 1


def test_seconds_are_those_of_the_kernels_by_hand() -> None:
    blocks = Blocks(8, 12, 2, 2, 4)
    free = replace(MADE_UP, bandwidth=1e30, launch=0.0)
    assert dense_seconds(free, 10, blocks, torch.float32) == pytest.approx(2 * 10 * 8 * 12 / 1e12)
    assert block_seconds(free, 10, blocks, torch.float32) == pytest.approx(2 * 10 * (2 * 4 * 4 + 2 * 6 * 4) / 1e12)
    memory = replace(MADE_UP, peak={"fp32": 1e30}, launch=0.0)
    assert dense_seconds(memory, 10, blocks, torch.float32) == pytest.approx(4 * (10 * 8 + 8 * 12 + 10 * 12) / 1e12)
    first, second = 10 * 8 + 2 * 4 * 4 + 10 * 8, 10 * 8 + 2 * 6 * 4 + 10 * 12
    copies = 2 * 10 * 8 + 2 * 10 * 12  # of the middle and of the output, read and written
    assert block_seconds(memory, 10, blocks, torch.float32) == pytest.approx(4 * (first + second + copies) / 1e12)
    assert block_seconds(replace(free, launch=1.0), 10, blocks, torch.float32) == pytest.approx(4)
    assert block_seconds(replace(free, launch=1.0), 10, replace(blocks, outs=1), torch.float32) == pytest.approx(3)


def test_a_layer_not_predicted_to_be_faster_stays_as_it_is_and_the_notes_say_from_when_it_would() -> None:
    rows, blocks, target = 18, Blocks(23, 50, 4, 1, 3), SLOW
    outcome = run(BlockStructured(rank=12), target=target)
    assert outcome.records[-1].layers == ["down"], "its blocks save more"
    assert [outcome.graph.weight(n.args[1]).shape for n in outcome.graph.find(aten.linear.default)] == [(50, 23)]  # type: ignore[arg-type]
    first = threshold(target, blocks, torch.float32)
    us = [f"{f(target, rows, blocks, torch.float32) * 1e6:.1f} us" for f in (block_seconds, dense_seconds)]
    (said,) = (d.why for d in outcome.records[-1].declined if d.layer == "up")
    assert said == f"{us[0]} in blocks against {us[1]} as it is at {rows} rows; faster from {first} rows on"
    assert f"1 stay as they are, not predicted to be faster: up ({said})" in outcome.graph.notes[0]
    more = [(torch.randn(8, 9, 23),)]
    larger = Pipeline([BlockStructured(rank=12)], target=target, calibration=Calibration(more)).run(capture(FFN().eval(), more[0]))
    assert larger.records[-1].applied == 2


def test_where_no_layer_would_be_faster_the_graph_stays_and_the_notes_say_so() -> None:
    outcome = run(BlockStructured(), target=replace(SLOW, launch=100.0))
    assert (outcome.records[-1].applied, len(outcome.records[-1].declined)) == (0, 2)
    assert all("faster at no number of rows" in d.why for d in outcome.records[-1].declined)
    assert len(outcome.graph.find(aten.linear.default)) == 2


def test_without_a_target_or_with_never_there_are_factors() -> None:
    for options, target in ((BlockStructured(), None), (BlockStructured(premerge="never"), replace(SLOW, launch=1.0))):
        assert run(options, target=target).records[-1].applied == 2


def test_the_notes_say_what_was_saved_in_one_line() -> None:
    (note,) = run(BlockStructured(ratio=0.5)).graph.notes
    assert note == "block-structured: block-dense, 61.7% of the parameters of 2 layers removed: 4 blocks, 8 to 12 middle values"
