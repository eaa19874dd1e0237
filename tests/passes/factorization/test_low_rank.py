"""low-rank on small models: what it makes of single and shared inputs, what it says, what it leaves alone, and its way out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx.export import export
from rewright.backends.target import Target
from rewright.ir.capture import capture
from rewright.ir.errors import RecipeError, UsageError
from rewright.ir.graph import Graph
from rewright.ir.reexport import re_export
from rewright.ir.verify import check_structure
from rewright.passes.factorization.low_rank import LowRank
from rewright.passes.factorization.predicted import product_seconds, rows_of
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration

from ..encoder import encoder, example

aten = torch.ops.aten
SCORES = ("plain", "asvd", "whitened", "fisher", "two-sided")


@cache
def graph() -> Graph:
    flat = tuple(example().values())
    return Pipeline([], verify=False).run(capture(encoder(), flat)).graph


@cache
def batches() -> tuple[tuple[Tensor, ...], ...]:
    """Texts of tokens that are not equally frequent."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(6, 8, 16, generator=generator).square() * 100).long()
    return tuple((i, torch.ones_like(i)) for i in ids)


@cache
def calibration() -> Calibration:
    return Calibration(batches()[:4])


def run(g: Graph | None = None, given: Calibration | None = None, inputs: bool = True, **options: Any) -> Outcome:
    extra = {k: options.pop(k) for k in ("target", "ignore") if k in options}
    pipeline = Pipeline(
        [LowRank(**{"allocation": "waterfill", "round_to": 1, "require_faster": False, **options})], calibration=given or calibration(), **extra
    )
    return pipeline.run(g or graph(), batches()[4:] if inputs else [])


def drift(outcome: Outcome) -> float:
    """Squared error of the outputs on the calibration data, relative."""
    y, z = (torch.cat([g.run(b)[0] for b in batches()[:4]]).double() for g in (outcome.original, outcome.graph))
    return float((y - z).square().sum() / (y - y.mean((0, 1))).square().sum())


def ffn_weights(g: Graph) -> int:
    return sum(w.numel() for name, w in g.weights().items() if w.dim() == 2 and (".up." in name or ".down." in name))


# -- what it makes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_feed_forward_layers_lose_the_share_asked_for_and_stay_themselves(score: Any) -> None:
    outcome = run(score=score)
    record = outcome.records[-1]
    assert record.applied == 4 and not record.declined and record.undone is None
    assert 0.3 <= 1 - ffn_weights(outcome.graph) / ffn_weights(outcome.original) < 0.32
    assert outcome.graph.notes[-1].startswith("low-rank: 30.") and "4 of them factorised" in outcome.graph.notes[-1]
    old, new = (len(g.find(aten.linear.default)) for g in (outcome.original, outcome.graph))
    assert new == old + 4
    assert drift(outcome) < 0.25
    outcome.graph.module(*example().values()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in outcome.graph.module.named_parameters() if "_first" in n or "_second" in n)


@pytest.mark.parametrize("side", ["out", "in", "both"])
def test_fisher_takes_the_gradients_of_either_side(side: Any) -> None:
    found = {s: run(score="fisher", side=s, affine=False, allocation="uniform").graph.weights() for s in ("out", side)}
    assert (side == "out") == torch.equal(*(w["layers.0.up.weight_first"] for w in found.values())) if side != "out" else True
    given = replace(calibration(), loss=lambda outputs, flat: outputs[0][..., 0].square().sum())
    other = run(given=given, score="fisher", side=side, affine=False, allocation="uniform").graph.weights()
    assert not torch.equal(other["layers.1.up.weight_first"], found[side]["layers.1.up.weight_first"])


@pytest.mark.parametrize("score", ["asvd", "whitened", "fisher", "two-sided"])
def test_scores_are_those_of_the_papers_on_the_statistics_of_the_graph(score: Any) -> None:
    g, name = graph(), "layers.1.up"
    options = LowRank(score=score, side="both" if score == "fisher" else "out", affine=False, rank=12, require_faster=False)
    node = next(n for n in g.find(aten.linear.default) if n.meta["path"] == name)
    x, w = calibration().gather(g, options.requests(g)), g.weight(node.args[1]).detach().double()  # type: ignore[arg-type]
    left, right = torch.eye(128, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    if score == "asvd":
        right = torch.diag(x[node.args[0]].mean_abs.sqrt())  # type: ignore[index]
    if score == "fisher":
        rows, columns = x[node.args[1]].gradient_square  # type: ignore[index]
        left, right = torch.diag(rows.sqrt()), torch.diag(columns.sqrt())
    if score in ("whitened", "two-sided"):
        values, vectors = torch.linalg.eigh(x[node.args[0]].gram)  # type: ignore[index]  # singular: behind a layer norm
        right = vectors * values.clamp(min=0).sqrt()
    if score == "two-sided":
        k = x[node].gradient_gram
        left = torch.linalg.cholesky(k + 0.1 * k.diagonal().mean() * torch.eye(128)).T
    u, s, v = torch.linalg.svd(left @ w @ right, full_matrices=False)
    literal = torch.linalg.inv(left) @ (u[:, :12] * s[:12]) @ v[:12]
    context = Context(statistics=x, calibration=calibration())
    found = options.run(g.draft(), context)
    product = found.weight(f"{name}.weight_second").double() @ found.weight(f"{name}.weight_first").double()
    assert len(context.applied) == 4 and (product @ right - literal).norm() < 2e-6 * literal.norm()


def test_the_scores_are_told_apart_by_the_error_they_leave() -> None:
    plain, asvd, whitened = (drift(run(score=s, affine=False, allocation="uniform", ratio=0.5)) for s in ("plain", "asvd", "whitened"))
    affine = drift(run(allocation="uniform", ratio=0.5))
    refitted = drift(run(score="plain", affine=False, allocation="uniform", ratio=0.5, refit=True))
    assert affine < whitened < asvd < plain
    assert refitted < plain


def test_a_smaller_rank_is_a_slice_of_a_larger_one() -> None:
    small, large = (run(rank=k, affine=False).graph.weights() for k in (8, 20))
    for name in ("layers.0.up", "layers.1.down"):
        assert torch.allclose(small[f"{name}.weight_first"], large[f"{name}.weight_first"][:8], atol=1e-6)
        assert torch.allclose(small[f"{name}.weight_second"], large[f"{name}.weight_second"][:, :8], atol=1e-6)


def test_balanced_factors_give_the_same_outputs_with_equal_norms() -> None:
    ortho, balanced = run(rank=12), run(rank=12, gauge="balanced")
    a, b = balanced.graph.weight("layers.0.up.weight_first"), balanced.graph.weight("layers.0.up.weight_second")
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
    assert not torch.allclose(ortho.graph.weight("layers.0.up.weight_first").norm(dim=1), a.norm(dim=1), rtol=1e-2)
    assert torch.allclose(ortho.graph.run(batches()[5])[0], balanced.graph.run(batches()[5])[0], atol=1e-5)


def test_ranks_are_rounded_and_an_order_of_calibration_keeps_them() -> None:
    ranks = {}
    for order in ("oneshot", "sequential", "asymmetric"):
        found = run(ratio=0.5, round_to=4, calibration=order).graph
        ranks[order] = {n: w.shape[0] for n, w in found.weights().items() if n.endswith("_first")}
    assert all(k % 4 == 0 for k in ranks["oneshot"].values()) and len(set(ranks["oneshot"].values())) > 1
    assert ranks["oneshot"] == ranks["sequential"] == ranks["asymmetric"]


def test_layers_that_make_up_for_those_before_them_leave_less_error() -> None:
    oneshot, asymmetric = (drift(run(ratio=0.5, calibration=c)) for c in ("oneshot", "asymmetric"))
    assert asymmetric < 0.98 * oneshot


def test_waterfill_leaves_less_error_in_the_layers_than_uniform_does() -> None:
    def left(method: Any) -> float:
        outcome = run(ratio=0.5, allocation=method, affine=False)
        total = 0.0
        statistics = calibration().gather(outcome.original, LowRank().requests(outcome.original))
        for node in outcome.original.find(aten.linear.default):
            name = str(node.args[1].target)  # type: ignore[union-attr]
            if outcome.graph.has_weight(f"{name}_first"):
                w, first, second = (
                    g.weight(n).detach().double() for g, n in ((outcome.original, name), (outcome.graph, f"{name}_first"), (outcome.graph, f"{name}_second"))
                )
                product = second @ first
                gram = statistics[node.args[0]].gram  # type: ignore[index]
                total += float(torch.trace((w - product) @ gram @ (w - product).T) / torch.trace(w @ gram @ w.T))
        return total

    assert left("waterfill") < left("uniform")


@pytest.mark.parametrize("method", ["uniform", "waterfill", "waterfill-influence", "block-influence", "welore"])
def test_every_allocation_keeps_the_budget(method: Any) -> None:
    assert 0.4 <= 1 - ffn_weights((outcome := run(ratio=0.4, allocation=method)).graph) / ffn_weights(outcome.original) < 0.43


@pytest.mark.parametrize("score", ["fisher", "two-sided"])
def test_scores_that_know_the_loss_spend_ranks_where_it_changes(score: Any) -> None:
    model = encoder()
    with torch.no_grad():
        model.layers[0].down.weight.mul_(1e-3)  # what this block adds is nothing beside the residual stream
    g = Pipeline([], verify=False).run(capture(model, tuple(example().values()))).graph
    found = {}
    for s in (score, "whitened"):
        weights = run(g, ratio=0.6, floor=0.25, score=s).graph.weights()
        found[s] = {n: w.shape[0] for n, w in weights.items() if n.endswith("_first")}
    for n in ("up", "down"):
        least = found[score][f"layers.0.{n}.weight_first"]
        assert least < 0.5 * found[score][f"layers.1.{n}.weight_first"] and least < found["whitened"][f"layers.0.{n}.weight_first"]


# -- several that read one value ---------------------------------------------------------------------------------------


def test_packed_first_factors_are_one_product_with_the_same_outputs_as_separate_ones() -> None:
    packed, separate = (run(scope="attention", shared=s, ratio=0.5) for s in ("packed", "separate"))
    split = packed.graph.find(aten.split_with_sizes.default)
    assert len(split) == 2 and not separate.graph.find(aten.split_with_sizes.default)
    assert len(separate.graph.find(aten.linear.default)) - len(packed.graph.find(aten.linear.default)) == 4
    first = packed.graph.weight("layers.0.q_k_v.weight_first")
    assert torch.equal(first, torch.cat([separate.graph.weight(f"layers.0.{n}.weight_first") for n in "qkv"]))
    assert torch.allclose(packed.graph.run(batches()[5])[0], separate.graph.run(batches()[5])[0], atol=1e-5)


def test_a_joint_basis_is_taken_where_it_is_better_and_only_there() -> None:
    model = encoder(layers=2)
    with torch.no_grad():
        for i, linear in enumerate((model.layers[0].q, model.layers[0].k, model.layers[0].v)):  # one row space of 16 dimensions
            torch.manual_seed(7)
            rows = torch.randn(16, 64)
            linear.weight.copy_(torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) @ rows / 30)
        for i, linear in enumerate((model.layers[1].q, model.layers[1].k, model.layers[1].v)):  # a row space of 16 dimensions each
            torch.manual_seed(i)
            linear.weight.copy_(torch.randn(64, 16) @ torch.linalg.qr(torch.randn(64, 64))[0][16 * i : 16 * i + 16] / 30)
    g = Pipeline([], verify=False).run(capture(model, tuple(example().values()))).graph
    outcome = run(g, rank=14, scope="attention", shared="joint", ignore=("layers.0.out", "layers.1.out"))
    names = {n for n in outcome.graph.weights() if n.endswith("_first")}
    assert names == {"layers.0.q_k_v.weight_first", "layers.1.q_k_v.weight_first"}
    assert outcome.graph.weight("layers.0.q_k_v.weight_first").shape[0] == 3 * 14 * 128 // (64 + 192)  # one for all three, at equal parameters
    assert outcome.graph.weight("layers.1.q_k_v.weight_first").shape[0] == 3 * 14  # three side by side
    assert len(outcome.graph.find(aten.split_with_sizes.default)) == 1
    assert "layers.0.q 21 of 64" in outcome.graph.notes[-1] and "layers.1.q 14 of 64" in outcome.graph.notes[-1]
    packed = run(g, rank=14, scope="attention", ignore=("layers.0.out", "layers.1.out"))
    assert drift(outcome) < drift(packed)


# -- what it leaves alone ----------------------------------------------------------------------------------------------


def why(outcome: Outcome, layer: str) -> str:
    return next(d.why for d in outcome.records[-1].declined if d.layer == layer)


def test_nothing_to_remove_changes_nothing() -> None:
    outcome = run(ratio=0.0)
    assert outcome.graph is not None and outcome.records[-1].applied == 0 and not outcome.records[-1].declined
    assert [str(n) for n in outcome.graph.fx.nodes] == [str(n) for n in outcome.original.fx.nodes]


def test_a_layer_whose_factors_are_no_smaller_stays_dense() -> None:
    outcome = run(rank=43)
    assert outcome.records[-1].applied == 0
    assert why(outcome, "layers.0.up") == "two factors of rank 43 take 8,256 parameters, its matrix of 128 x 64 8,192"
    assert run(rank=42).records[-1].applied == 4
    assert run(rank=32, scope="attention").records[-1].applied == 0  # as many parameters as 64 x 64
    dense = run(scope="all", ratio=0.02)
    assert "(they break even at rank 32)" in why(dense, "layers.0.q")
    assert "layers.0.q dense" in dense.graph.notes[-1]


def test_what_is_not_predicted_to_be_faster_is_declined_with_both_figures() -> None:
    slow = Target.load("cpu")
    slow = replace(slow, launch=1e-3)
    outcome = run(rank=16, require_faster=True, target=slow)
    rows, dtype = 27, torch.float32
    factorised, dense = (product_seconds(slow, rows, p, dtype) * 1e6 for p in ([(64, 16), (16, 128)], [(64, 128)]))
    assert why(outcome, "layers.0.up") == f"predicted {factorised:.1f} us factorised at rank 16 against {dense:.1f} us dense for 27 rows on cpu"
    assert dense < factorised < 2.1 * dense
    assert run(rank=16, require_faster=False, target=slow).records[-1].applied == 4
    assert run(rank=16, require_faster=True, target=replace(slow, launch=0.0)).records[-1].applied == 4


def test_predictions_count_bytes_work_and_launches() -> None:
    machine = replace(Target.load("cpu"), launch=1.0, bandwidth=1e3, peak={"fp32": 1e9})
    moved = (10 * 4 + 4 * 2 + 10 * 2 + 10 * 2 + 2 * 8 + 10 * 8) * 4
    assert product_seconds(machine, 10, [(4, 2), (2, 8)], torch.float32) == pytest.approx(2 + moved / 1e3)
    assert product_seconds(machine, 1, [(4, 8)], torch.bfloat16) == pytest.approx(1 + (4 + 32 + 8) * 2 / 1e3)  # no units for it: those of float32
    slow = replace(machine, peak={"fp32": 10.0})
    assert product_seconds(slow, 10, [(4, 2), (2, 8)], torch.float32) == pytest.approx(2 + 2 * 10 * (4 * 2 + 2 * 8) / 10)
    assert rows_of(graph(), graph().find(aten.linear.default)[0]) == 27


class Tied(nn.Module):
    """An embedding that is the head too, a linear without bias of a computed weight, and one of a stored one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale, self.last = nn.Embedding(100, 64), nn.Parameter(torch.ones(64)), nn.Linear(64, 64, bias=False)
        self.first = nn.Linear(64, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.last(self.embed(ids))
        x = nn.functional.linear(x, self.first.weight * (1 + ids.sum()))
        return nn.functional.linear(torch.tanh(x), self.embed.weight)


def test_tied_computed_and_ignored_weights_are_declined_each_with_its_reason() -> None:
    torch.manual_seed(0)
    ids = batches()[0][0]
    g = Pipeline([], verify=False).run(capture(Tied().eval(), (ids,))).graph
    outcome = run(g, Calibration([(ids,)]), inputs=False, scope="all", ratio=0.5)
    assert outcome.records[-1].layers == ["last"]
    whys = {d.why for d in outcome.records[-1].declined}
    assert any("embed.weight is also read by embed: an edit would untie them" in w for w in whys) and any("is computed, not stored" in w for w in whys)
    assert outcome.graph.has_weight("last.low_rank_bias")
    ignored = run(ratio=0.5, ignore=("layers.0",))
    assert why(ignored, "layers.0.up") == "the user asked to leave layers.0 alone"
    assert ignored.records[-1].layers == ["layers.1.up", "layers.1.down"]


def test_only_the_nodes_asked_for_are_touched_and_nothing_is_said_of_the_rest() -> None:
    g = graph().draft()
    down = next(n for n in g.find(aten.linear.default) if n.meta["path"] == "layers.1.down")
    options = LowRank(require_faster=False)
    context = Context(only=frozenset({down.name}), statistics=calibration().gather(g, options.requests(g)), calibration=calibration())
    options.run(g, context)
    assert context.applied == ["layers.1.down"] and not context.declined
    assert down.args[0].args[1].target == "layers.1.down.weight_first"  # type: ignore[union-attr]  # the linear keeps its name
    assert not any(note.startswith("low-rank") for note in g.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "whiten"}, "low-rank has no score 'whiten'; there are plain, asvd, whitened, fisher, two-sided"),
        ({"ratio": 1.0}, "ratio is the share that is removed, from 0 to less than 1; got 1"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"floor": 1.5}, "floor is a share, from 0 to 1; got 1.5"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"ridge": 0.0}, "ridge must be above 0"),
        ({"side": "in"}, "side = in is for score = fisher; the score is whitened"),
        ({"score": "fisher", "side": "both", "shared": "joint"}, "a joint basis needs one weighting of the inputs"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        LowRank(**options)
    assert said in str(error.value)


def test_it_asks_for_what_its_options_need_and_no_more() -> None:
    plain = LowRank(score="plain", affine=False)
    assert not plain.requires and not plain.requests(graph())
    assert LowRank(score="asvd", affine=False).requires == {"mean_abs"}
    assert LowRank(score="fisher", affine=False).requires == {"gradient"}
    assert LowRank(score="two-sided").requires == {"gradient_gram", "gram"}
    assert LowRank(score="plain", affine=False, refit=True).requires == {"gram"}
    assert LowRank(allocation="block-influence").requires == {"gram", "influence"} and LowRank(allocation="block-influence", rank=3).requires == {"gram"}
    assert len(LowRank().requests(graph())) == 4
    with pytest.raises(UsageError, match="calibration"):
        Pipeline([LowRank()]).run(graph())
    assert Pipeline([LowRank(score="plain", affine=False, require_faster=False)]).run(graph(), batches()[4:]).records[-1].applied == 4


# -- the way out -------------------------------------------------------------------------------------------------------


@cache
def all_packed() -> Outcome:
    return run(scope="all", ratio=0.5, round_to=4)


@pytest.mark.parametrize("profile", ["ort", "pure"])
def test_the_file_for_onnxruntime_agrees_and_has_standard_ops_only(profile: Any, tmp_path: Path) -> None:
    done = export(all_packed().graph, tmp_path / "m.onnx", [tuple(example().values())], profile)
    assert done.parity is not None and done.parity.relative_error < 1e-5
    ops = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node if n.domain not in ("", "ai.onnx")}
    before = export(all_packed().original, tmp_path / "o.onnx", [tuple(example().values())], profile)
    assert before.parity is not None
    assert ops <= {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node}


def test_sizes_stay_dynamic_and_it_exports_again_and_compiles() -> None:
    g = all_packed().graph
    check_structure(g, all_packed().original)
    again = re_export(g, tuple(example().values())).module(check_guards=False)
    for shape in ((1, 1), (5, 13)):
        ids = torch.randint(0, 100, shape)
        flat = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(again(**flat), g.run(tuple(flat.values()))[0])
    ids = batches()[4]
    assert torch.allclose(torch.compile(g.module, backend="aot_eager")(*ids), g.run(ids)[0], atol=1e-5)


def without_weights() -> tuple[Graph, dict[str, Tensor]]:
    """The same model captured without data, and its weights."""
    model = encoder()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    g = capture(model.to("meta"), tuple(t.to("meta") for t in example().values()))
    return Pipeline([], verify=False).run(g).graph, state


@pytest.mark.parametrize("shared", ["packed", "separate"])
def test_a_graph_without_weights_is_filled_later_by_the_same_recipe(shared: Any) -> None:
    g, state = without_weights()
    options = LowRank(score="plain", affine=False, allocation="uniform", scope="all", ratio=0.5, require_faster=False, shared=shared)
    outcome = Pipeline([options], verify=False).run(g)
    assert outcome.records[-1].applied == 12 and outcome.graph.on_meta
    outcome.graph.materialize(state)
    real = Pipeline([options], verify=False).run(graph()).graph
    assert {n: tuple(w.shape) for n, w in outcome.graph.weights().items()} == {n: tuple(w.shape) for n, w in real.weights().items()}
    assert torch.equal(outcome.graph.run(batches()[0])[0], real.run(batches()[0])[0])


def test_without_weights_ranks_by_error_need_some_to_read() -> None:
    g, state = without_weights()
    refused = Pipeline([LowRank(score="plain", affine=False, allocation="waterfill")], verify=False).run(g).records[-1]
    assert refused.undone is not None and "the graph has no weights and the numbers of" in refused.undone
    given = Calibration(batches()[:4], weights=state)
    outcome = Pipeline([LowRank(require_faster=False, round_to=1, allocation="waterfill")], verify=False, calibration=given).run(g)
    assert outcome.records[-1].undone is None
    outcome.graph.materialize(state)
    assert torch.allclose(outcome.graph.run(batches()[5])[0], run().graph.run(batches()[5])[0], atol=1e-5)
