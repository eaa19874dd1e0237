"""Image tokens of a prompt go between layers, as a prompt run by hand layer by layer says, and nothing else changes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx

from rewright.ir.cost import cost
from rewright.ir.errors import RecipeError, UsageError
from rewright.ir.graph import Graph
from rewright.ir.verify import check_structure, shorter_outputs
from rewright.passes.cleanup.merge_duplicates import MergeDuplicates
from rewright.passes.pipeline import Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration
from rewright.passes.tokens.visual_schedule import METHODS, Stage, sigmoid_shares, smallest
from rewright.passes.tokens.visual_token_pruning import VisualTokenPruning

from .prompts import IMAGE, SYSTEM, TOKENS, Choose, Decoder, State, by_hand, canonical, decoded, decoder, inputs

torch.set_num_threads(1)

aten = torch.ops.aten
ours = torch.ops.rewright

STAGES = ((2, 0.5), (4, 0.25))
CLOSE = 2e-6
"""Largest difference of a logit or a cached value (of size about 1): rounding of float32."""


def captured(joined: str = "cat", padded: bool = False) -> tuple[Decoder, Graph, tuple[Tensor, ...]]:
    """A model, its graph and inputs; captured once for all tests."""
    return _captured(joined, padded)


@cache
def _captured(joined: str, padded: bool) -> tuple[Decoder, Graph, tuple[Tensor, ...]]:
    model, given = decoder(joined=joined), inputs(joined, padded)
    return model, canonical(model, given), given


def prune(graph: Graph, context: Context | None = None, **options) -> Graph:
    """The pruned graph, its structure checked."""
    after = VisualTokenPruning(**options).run(graph.clone(), context or Context())
    after.clean()
    check_structure(after)
    return after


def why_not(graph: Graph, **options) -> str:
    """The one sentence with which it declines."""
    context = Context()
    assert VisualTokenPruning(**options).run(graph, context) is graph
    assert not context.applied
    (declined,) = context.declined
    return declined.why


# -- by hand ------------------------------------------------------------------------------------------------------------


def received(model: Decoder, state: State, layer: int, behind: bool, rope: bool, real: Tensor) -> Tensor:
    """The attention each image token gets from the last token, mean over heads: among all tokens with RoPE, among image tokens without."""
    if behind:
        q, k, _ = (t[0] for t in model.layers[layer].project(state.x[None]))
        if rope:
            cos, sin = model.tables(state.positions)
            q, k = (torch.cat([t[..., :4] * cos[:, :4] - t[..., 4:] * sin[:, :4], t[..., 4:] * cos[:, 4:] + t[..., :4] * sin[:, 4:]], -1) for t in (q, k))
    else:
        assert state.before is not None
        q, k = state.before[2:] if rope else state.before[:2]
    among = real[state.numbers] if rope else torch.isin(torch.arange(len(state.x)), state.image)
    weights = [(q[h, -1] @ k[h // 2].T / 8**0.5).masked_fill(~among, -torch.inf).softmax(-1) for h in range(4)]
    return torch.stack(weights).mean(0)[state.image]


def pagerank(state: State, real: Tensor) -> Tensor:
    assert state.before is not None
    q, k = state.before[2:]
    found, seen = [], torch.ones(len(state.x), len(state.x), dtype=torch.bool).tril() & real[state.numbers]
    for h in range(4):
        moves = (q[h] @ k[h // 2].T / 8**0.5 / 0.1).masked_fill(~seen, -1e30).softmax(-1)
        walk = real[state.numbers].float() / real[state.numbers].sum()
        for _ in range(5):
            walk = walk @ moves
        found.append(walk**2)
    return torch.stack(found).mean(0).sqrt()[state.image]


def by_criterion(
    model: Decoder, layer: int, count: int, criterion: str = "last-token", behind: bool = False, grid: Tensor | None = None, real: Tensor | None = None
) -> Choose:
    """All text and the `count` best image tokens, those of the grid before others."""
    real = torch.ones(TOKENS, dtype=torch.bool) if real is None else real

    def choose(state: State) -> Tensor:
        found = pagerank(state, real) if criterion == "pagerank" else received(model, state, layer, behind, criterion == "last-token-rope", real)
        if grid is not None:
            found = torch.where(grid, 9.0, found)
        best = state.image[found.topk(count).indices]
        text = torch.tensor([i for i in range(len(state.x)) if i not in state.image])
        return torch.cat([text, best]).sort().values

    return choose


# -- 5.4 and T15: what is promised ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("joined", ["cat", "scatter"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("criterion", "behind", "positions"),
    [
        ("last-token", False, "original"),
        ("last-token", True, "original"),
        ("last-token-rope", False, "original"),
        ("last-token-rope", True, "renumber"),
        ("pagerank", False, "original"),
        ("last-token", False, "renumber"),
    ],
)
def test_logits_and_caches_are_those_of_the_chosen_tokens(joined: str, padded: bool, criterion: str, behind: bool, positions: str) -> None:
    """Every criterion, by the layer before and behind, with both kinds of positions, with and without padding."""
    model, graph, given = captured(joined, padded)
    by = "layer-behind" if behind else "layer-before"
    context = Context()
    after = prune(graph, context, stages=STAGES, criterion=criterion, scored_by=by, positions=positions, uniform_stride=0)
    assert len(context.applied) == 2 and not context.declined
    outputs, embedded = after.run(given), model.enter(*given[:2])
    for b in range(2):
        real = given[2][b].bool() if padded else None
        choose = {i: by_criterion(model, i, n, criterion, behind, real=real) for i, n in ((2, 18), (4, 9))}
        logits, caches, numbers = by_hand(model, embedded[b], torch.arange(SYSTEM, SYSTEM + IMAGE), choose, real, positions == "renumber")
        assert [len(n) for n in numbers] == [44, 44, 26, 26, 17, 17]
        assert (outputs[0][b] - logits).abs().max() < CLOSE
        for i, (k, v) in enumerate(caches):
            shown = slice(None) if real is None else real[numbers[i]]  # what a padded query sees is nobody's business
            assert (outputs[1 + 2 * i][b] - k)[:, shown].abs().max() < CLOSE
            assert (outputs[2 + 2 * i][b] - v)[:, shown].abs().max() < CLOSE


@pytest.mark.parametrize("joined", ["cat", "scatter"])
def test_keeping_all_changes_nothing(joined: str) -> None:
    _, graph, given = captured(joined)
    after = prune(graph, stages=((2, 1.0), (4, 1.0)), uniform_stride=0)
    assert [str(n) for n in after.fx.nodes] == [str(n) for n in graph.fx.nodes]
    assert all(torch.equal(a, b) for a, b in zip(graph.run(given), after.run(given)))


@pytest.mark.parametrize("joined", ["cat", "scatter"])
def test_kept_tokens_are_bitwise_copies_in_order_and_no_text_goes(joined: str) -> None:
    _, graph, given = captured(joined)
    after = prune(graph, stages=STAGES, uniform_stride=0)
    cuts = [n for n in after.find(ours.token_take.default) if n.meta["val"].dim() == 3 and n.meta["val"].is_floating_point()]
    first = cuts[0]
    values = run_all(after, given)
    before, keep = values[first.args[0].name], values[first.args[1].name]  # type: ignore[union-attr]
    assert torch.equal(before, run_all(graph, given)[first.args[0].name])  # type: ignore[union-attr]
    for b in range(2):
        assert torch.equal(values[first.name][b], before[b, keep[b]])
        assert (keep[b].diff() > 0).all() and keep.shape[1] == TOKENS - 18
        assert {*range(SYSTEM), *range(SYSTEM + IMAGE, TOKENS)} <= set(keep[b].tolist())


def test_the_last_token_attends_to_what_is_kept_as_if_the_rest_had_been_masked() -> None:
    _, graph, given = captured()
    after = prune(graph, stages=((2, 0.5),), uniform_stride=0)
    attention = graph.find(ours.attention.default)[2]
    old, new = run_all(graph, given), run_all(after, given)
    keep = new[next(n for n in after.find(ours.token_take.default) if n.meta["val"].is_floating_point()).args[1].name]  # type: ignore[union-attr]
    (q, k), (q_new, k_new) = ([values[n.name] for n in attention.args[:2]] for values in (old, new))  # type: ignore[union-attr]
    for b in range(2):
        for h in range(4):
            expected = (q[b, h, -1] @ k[b, h // 2, keep[b]].T / 8**0.5).softmax(-1)
            assert (expected - (q_new[b, h, -1] @ k_new[b, h // 2].T / 8**0.5).softmax(-1)).abs().max() < CLOSE


def test_each_prompt_of_a_batch_may_have_its_image_elsewhere() -> None:
    model, graph, _ = captured("scatter")
    starts = (1, 6)
    given = inputs("scatter", starts=starts)
    outputs, embedded = prune(graph, stages=STAGES, uniform_stride=3).run(given), model.enter(*given)
    grid = torch.tensor([r % 3 == 0 and c % 3 == 0 for r in range(6) for c in range(6)])
    for b, start in enumerate(starts):
        choose = {2: by_criterion(model, 2, 20, grid=grid), 4: by_criterion(model, 4, 9)}
        logits, caches, _ = by_hand(model, embedded[b], torch.arange(start, start + IMAGE), choose)
        assert (outputs[0][b] - logits).abs().max() < CLOSE
        assert (outputs[-1][b] - caches[-1][1]).abs().max() < CLOSE


def test_the_grid_stays_and_the_share_is_of_the_rest() -> None:
    """FEATHER: the best share of the tokens and every third of every third row."""
    _, graph, given = captured()
    after = prune(graph, stages=((2, 0.25),), uniform_stride=3)
    keep = run_all(after, given)[next(n for n in after.find(ours.token_take.default) if n.meta["val"].is_floating_point()).args[1].name]  # type: ignore[union-attr]
    assert keep.shape[1] == TOKENS - IMAGE + 4 + 8  # 4 of the grid, a quarter of the other 32
    for b in range(2):
        assert {SYSTEM + 6 * row + column for row in (0, 3) for column in (0, 3)} <= set(keep[b].tolist())


def test_capped_scores_are_capped() -> None:
    """Gemma 2's attention: scores by tanh."""
    _, graph, given = captured()
    graph = graph.clone()
    capped, keeps = graph.find(ours.attention.default)[1], []
    for softcap in (None, 0.1):
        capped.update_arg(7, softcap)
        values = run_all(after := prune(graph, stages=((2, 0.5),), criterion="last-token-rope", uniform_stride=0), given)
        keeps.append(values[next(n for n in after.find(ours.token_take.default) if n.meta["val"].is_floating_point()).args[1].name])  # type: ignore[union-attr]
    assert not torch.equal(*keeps)
    q, k = (values[n.name] for n in capped.args[:2])  # type: ignore[union-attr]
    for b in range(2):
        weights = [(torch.tanh(q[b, h, -1] @ k[b, h // 2].T / 8**0.5 / 0.1) * 0.1).softmax(-1) for h in range(4)]
        best = torch.stack(weights).mean(0)[SYSTEM : SYSTEM + IMAGE].topk(18).indices + SYSTEM
        assert set(best.tolist()) == set(keeps[1][b].tolist()) & set(range(SYSTEM, SYSTEM + IMAGE))


def test_uniform_keeps_the_same_of_any_image() -> None:
    _, graph, given = captured()
    after = prune(graph, stages=((3, 1 / 3),), criterion="uniform", uniform_stride=0)
    keep = run_all(after, given)[next(n for n in after.find(ours.token_take.default) if n.meta["val"].is_floating_point()).args[1].name]  # type: ignore[union-attr]
    assert keep.tolist() == [[0, 1, 2, *range(3, 39, 3), 39, 40, 41, 42, 43]] * 2


@pytest.mark.parametrize("joined", ["cat", "scatter"])
@pytest.mark.parametrize("frame", [None, 12])
def test_aim_merges_pairs_of_a_frame_before_the_first_layer(joined: str, frame: int | None) -> None:
    model, graph, given = captured(joined)
    after = prune(graph, method="aim", pre_llm_keep=0.25, stages=((3, 0.5),), frame_tokens=frame)
    outputs, embedded = after.run(given), model.enter(*given)
    for b in range(2):
        image = embedded[b, SYSTEM : SYSTEM + IMAGE]
        merged = torch.cat([halved(halved(part)) for part in image.split(frame or IMAGE)])
        x = torch.cat([embedded[b, :SYSTEM], merged, embedded[b, SYSTEM + IMAGE :]])
        choose = {3: by_criterion(model, 3, 4, "pagerank")}
        logits, caches, _ = by_hand(model, x, torch.arange(SYSTEM, SYSTEM + 9), choose)
        assert (outputs[0][b] - logits).abs().max() < CLOSE
        assert all((a[b] - c).abs().max() < CLOSE for a, c in zip(outputs[1:], (t for pair in caches for t in pair)))


def halved(x: Tensor) -> Tensor:
    """Every second token joins the odd one it is nearest to in angle; plain means."""
    even, odd = x[::2], x[1::2]
    nearest = torch.nn.functional.cosine_similarity(even[:, None], odd[None], -1).argmax(1)
    return torch.stack([torch.cat([odd[j : j + 1], even[nearest == j]]).mean(0) for j in range(len(odd))])


# -- T16: caches and decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["last-token", "last-token-rope"])
def test_decoding_goes_on_from_the_pruned_caches(criterion: str) -> None:
    """One more token after the pruned prompt gets the logits it has at the end of a longer prompt with the same tokens pruned."""
    model, graph, given = captured()
    after = prune(graph, stages=STAGES, criterion=criterion, uniform_stride=0)
    outputs, embedded = after.run(given), model.enter(*given)
    assert "44, 44, 26, 26, 17, 17 tokens, positions go on from 44" in after.notes[-1]
    more = model.embed(torch.tensor(7))
    for b in range(2):
        pruned = [(k[b], v[b]) for k, v in zip(outputs[1::2], outputs[2::2])]
        assert [k.shape[1] for k, _ in pruned] == [44, 44, 26, 26, 17, 17]
        image = torch.arange(SYSTEM, SYSTEM + IMAGE)
        _, _, numbers = by_hand(model, embedded[b], image, {i: by_criterion(model, i, n, criterion) for i, n in ((2, 18), (4, 9))})
        same = {i: lambda s, left=numbers[i]: torch.isin(s.numbers, torch.cat([left, torch.tensor([TOKENS])])).nonzero().squeeze(1) for i in (2, 4)}
        expected, _, _ = by_hand(model, torch.cat([embedded[b], more[None]]), image, same)
        assert (decoded(model, more, TOKENS, pruned) - expected).abs().max() < CLOSE


# -- how much ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flops_of_the_presets_at_llava_1_5_7b() -> None:
    """Spec 5.2: TFLOP of the language model at 576 image and 64 text tokens, on the meta device. PyramidDrop's scores take a layer's keys twice."""
    with torch.device("meta"):
        model = Decoder(layers=32, width=4096, heads=32, kv=32, hidden=11008).eval()
    graph = canonical(Embedded(model), (torch.empty(1, 640, 4096, device="meta"),), dynamic=False)
    assert cost(graph).flops == pytest.approx(8.50e12, rel=0.002)
    presets = [
        (4.87, {"method": "fastv"}),
        (3.08, {"method": "fastv", "stages": ((2, 0.25),)}),
        (4.40, {"method": "pyramiddrop"}),
        (3.59, {"method": "feather"}),
        (1.32, {"method": "aim"}),
        (4.78, {"method": "aim", "pre_llm_keep": 1.0}),
    ]
    for teraflops, options in presets:
        after = prune(graph, image_span=(35, 576), **options)
        assert cost(after).flops == pytest.approx(teraflops * 1e12, rel=0.012), options


class Embedded(torch.nn.Module):
    """The language model alone: embeddings in, the last token's hidden state out."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        self.model.enter = lambda ids, image: ids  # type: ignore[method-assign]
        return self.model(ids, None)[0]


def test_a_search_keeps_fewer_tokens_the_more_drift_it_may_cause() -> None:
    _, graph, given = captured()
    counts, drifts = [], []
    for most in (1e-4, 1e-3, 1.0):
        after = prune(graph, Context(calibration=Calibration([given])), stages=((2, 0.1), (4, 0.0)), max_drift=most, uniform_stride=0)
        a, b = (g.run(given)[0].double().log_softmax(-1) for g in (graph, after))
        drifts.append((a.exp() * (a - b)).sum(-1).mean().item())
        counts.append([k.shape[2] for k in after.run(given)[1::2]][-1])
        assert drifts[-1] <= most
    assert counts[0] > counts[1] > counts[2] == 8
    context = Context(calibration=Calibration([given]))
    assert prune(graph, context, stages=STAGES, max_drift=1e-9, uniform_stride=0).notes == graph.notes
    assert [d.why for d in context.declined] == ["with fewer image tokens from here on the outputs move by more than 1e-09 nats"] * 2


def test_a_search_is_greedy_from_shallow_to_deep() -> None:
    """The smallest of 16 even steps that holds, given the stages before; a stage that may drop none is left out."""
    needed = {2: 38, 3: 38, 5: 12}

    def holds(stages: list[Stage]) -> bool:
        return all(s.count >= needed[s.layer] for s in stages)

    assert smallest([Stage(2, 20), Stage(3, 10), Stage(5, 5)], 100, holds) == [Stage(2, 40), Stage(3, 38), Stage(5, 13)]
    assert smallest([Stage(2, 20), Stage(3, 10)], 39, holds) == [Stage(2, 38)]


def test_shares_of_p_sigmoid_fall_from_all_to_the_least() -> None:
    shares = [share for _, share in sigmoid_shares((0.1, 20.0, 0.5), 32, 2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99 and shares[-1] < 0.101 and shares[14] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-3)
    assert [s for _, s in sigmoid_shares((0.2, 2.0, 0.5), 4, 2)] == pytest.approx([0.747152, 0.613144], abs=1e-6)


def test_methods_have_their_published_layers_at_32() -> None:
    at = {name: METHODS[name].stages_of(32, 2) for name in METHODS}
    assert [layer for layer, _ in at["pyramiddrop"]] == [8, 16, 24]
    assert at["fastv"] == [(2, 0.5)]
    assert at["aim"][0] == (13, 0.875) and at["aim"][-1] == (20, 0.0)
    assert [layer for layer, _ in at["feather"]] == [8, 16]


# -- refusals -----------------------------------------------------------------------------------------------------------------


def test_refuses_stages_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="no image token may go before layer 2, got layer 1"):
        VisualTokenPruning(stages=((1, 0.5),))
    with pytest.raises(RecipeError, match="from shallow to deep with falling shares"):
        VisualTokenPruning(stages=((4, 0.25), (6, 0.5)))
    with pytest.raises(RecipeError, match="from 0 to 1, got 1.5"):
        VisualTokenPruning(stages=((4, 1.5),))
    with pytest.raises(RecipeError, match="halves the image tokens some times"):
        VisualTokenPruning(method="aim", pre_llm_keep=0.3)
    with pytest.raises(RecipeError, match="form no grid"):
        VisualTokenPruning(pre_llm_keep=0.5)
    with pytest.raises(UsageError, match="give some: calibration"):
        VisualTokenPruning(max_drift=0.1).run(captured()[1], Context())


def test_declines_and_says_why() -> None:
    _, graph, _ = captured()
    assert "is no part of 44 tokens with text behind it" in why_not(graph, image_span=(3, 41))
    assert why_not(graph, stages=((9, 0.5),)) == "there is no layer 9: the model has 6"
    assert "36 image tokens are no grid of 5 x 5; give image_grid" in why_not(graph, image_grid=(5, 5))
    assert "in frames of 10 can't be halved" in why_not(graph, method="aim", frame_tokens=10)


def test_declines_outputs_that_need_every_token() -> None:
    graph = canonical(decoder(all_rows=True), inputs())
    assert "output 0 (head) has a row for every token, and some are dropped; capture the last token's (logits_to_keep=1)" in why_not(graph)


def test_declines_where_no_image_joins_the_prompt() -> None:
    model = decoder()
    graph = canonical(Embedded(model), (torch.randn(2, 20, 32),))
    assert "joins no image features with text; give image_span" in why_not(graph)


def test_declines_what_is_not_causal() -> None:
    """Bidirectional layers see the image whole: no layer of theirs is a prefill."""
    _, graph, _ = captured()
    graph = graph.clone()
    for node in graph.find(ours.attention.default):
        node.update_arg(4, False)
    assert why_not(graph) == "no attention here is proven causal: this is no prefill graph of a language model"
    _, graph, _ = captured()
    graph = graph.clone()
    graph.find(ours.attention.default)[4].update_arg(4, False)
    assert "is not causal as the other layers are" in why_not(graph)


def test_declines_a_window_of_tokens() -> None:
    _, graph, given = captured()
    graph = graph.clone()
    for node in graph.find(ours.attention.default):
        node.update_arg(5, 16)
    assert "looks 16 tokens far" in why_not(graph)
    for node in graph.find(ours.attention.default):
        node.update_arg(5, TOKENS)  # hides nothing
    assert all(torch.equal(a, b) for a, b in zip(prune(graph).run(given), prune(captured()[1]).run(given)))


def test_leaves_layers_alone_that_the_user_names() -> None:
    _, graph, given = captured()
    context = Context(only=frozenset({graph.find(ours.attention.default)[4].name}))
    after = prune(graph, context, stages=STAGES, uniform_stride=0)
    assert [k.shape[2] for k in after.run(given)[1::2]] == [44, 44, 44, 44, 17, 17]


def run_all(graph: Graph, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every value of a run, by the name of its node."""
    values: dict[str, Tensor] = {}

    class Trace(fx.Interpreter):
        def run_node(self, n: fx.Node):
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Trace(graph.module).run(*given, enable_io_processing=False)
    return values


def test_the_pipeline_lets_caches_be_shorter_and_compares_the_rest() -> None:
    _, graph, given = captured()
    outcome = Pipeline([VisualTokenPruning(stages=STAGES), MergeDuplicates()]).run(graph, [given])
    assert not outcome.undone and outcome.records[-2].applied == 2
    assert 0 < outcome.records[-2].measured["relative_error"] < 1
    assert outcome.total is not None and outcome.total.relative_error == outcome.records[-2].measured["relative_error"]
    assert shorter_outputs(graph, outcome.graph) == frozenset(range(5, 13))


def test_no_other_pass_may_shorten_an_output() -> None:
    class Quiet(VisualTokenPruning):
        shortens_outputs = False

    _, graph, given = captured()
    (record,) = Pipeline([Quiet(stages=STAGES)]).run(graph, [given]).undone
    assert "output 5 was torch.float32[s" in str(record.undone) and "and is now" in str(record.undone)
