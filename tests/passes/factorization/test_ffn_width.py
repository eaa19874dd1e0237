"""Feed-forward blocks made narrower: what stays the same, what is fitted, how widths are shared out, masks, experts, and every refusal."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rewright.ir.blocks import ffn_blocks
from rewright.ir.capture import capture
from rewright.ir.errors import InputFileError, RecipeError, UsageError
from rewright.ir.graph import Flat, Graph
from rewright.passes.factorization.channel_selection import LARGEST, refitted
from rewright.passes.factorization.ffn_width import FFNWidth
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration

from .narrowed import mask_file, random_masks, silenced

torch.set_num_threads(1)
WIDTH, HIDDEN = 24, 48


class FFN(nn.Module):
    """kind: "plain", "gated", "fused" ([gate, up]), "reversed" ([up, gate]) or "interleaved" (gate and up by turns)."""

    def __init__(self, kind: str = "plain", bias: bool = True, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.kind, wide = kind, hidden if kind in ("plain", "gated") else 2 * hidden
        self.up, self.down = nn.Linear(WIDTH, wide, bias), nn.Linear(hidden, WIDTH, bias)
        if kind == "gated":
            self.gate = nn.Linear(WIDTH, hidden, bias)
        with torch.no_grad():
            self.up.weight.mul_(4)  # far from linear: channels that differ

    def hidden(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return F.gelu(self.up(x))
        if self.kind == "gated":
            return F.silu(self.gate(x)) * self.up(x)
        both = self.up(x)
        if self.kind == "interleaved":
            gate, up = both[..., ::2], both[..., 1::2]
        else:
            gate, up = both.chunk(2, -1) if self.kind == "fused" else reversed(both.chunk(2, -1))
        return F.silu(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


class Model(nn.Module):
    """Pre-norm residual blocks of feed-forward layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.head(x)


def batches(count: int = 4, seed: int = 0) -> list[Flat]:
    """Correlated tokens [8, 16, WIDTH]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * torch.logspace(0.5, -0.3, WIDTH)
    return [(torch.randn(8, 16, WIDTH, generator=g) @ mix + 0.3,) for _ in range(count)]


def make(*layers: nn.Module) -> Graph:
    return capture(Model(*layers).eval(), batches(1)[0])


@cache
def captured(kind: str = "plain", layers: int = 2, bias: bool = True) -> Graph:
    torch.manual_seed(0)
    return make(*(FFN(kind, bias) for _ in range(layers)))


def canonical(graph: Graph) -> Graph:
    """In the form the pass sees it in."""
    return Pipeline([]).run(graph).graph


def narrow(graph: Graph, data: list[Flat] | None = None, ignore: tuple[str, ...] = (), seed: int = 0, **options: Any) -> Outcome:
    """data: to calibrate on; where it is not given the result is also run, at other sizes."""
    p = FFNWidth(**{"round_to": 1, **options})
    calibration = Calibration(batches() if data is None else data) if p.requires else None
    outcome = Pipeline([p], calibration=calibration, ignore=ignore, seed=seed).run(graph, batches(1) if data is None else [])
    assert outcome.records[-1].undone is None, outcome.records[-1].undone
    return outcome


def widths(graph: Graph) -> list[int]:
    return [b.hidden for b in ffn_blocks(graph)]


def off(outcome: Outcome, data: list[Flat] | None = None) -> float:
    """Squared error of the outputs relative to their variance."""
    pairs = [(outcome.original.run(f)[0].double(), outcome.graph.run(f)[0].double()) for f in data or batches()]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum((a - a.mean((0, 1))).square().sum() for a, _ in pairs))


def weights_of_blocks(graph: Graph) -> int:
    found = {c.args[1] for b in ffn_blocks(graph) for c in (b.up, b.gate, b.down) if c is not None}
    return sum(n.meta["val"].numel() for n in found)


# -- the rewrite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "gated", "fused", "reversed", "interleaved"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_left_computes_what_it_did_and_weights_shrink_with_the_width(kind: str, bias: bool, tmp_path: Path) -> None:
    graph = captured(kind, 1, bias)
    masks = random_masks(canonical(graph), 0.25)
    outcome = narrow(graph, selection="mask", mask=mask_file(masks, tmp_path), refit="none")
    assert widths(outcome.graph) == [HIDDEN // 4]
    assert weights_of_blocks(outcome.graph) == weights_of_blocks(outcome.original) // 4
    want = silenced(canonical(graph), masks)
    for n in (1, 5):
        x = torch.randn(n, 3, WIDTH)
        torch.testing.assert_close(outcome.graph.run((x,))[0], want.run((x,))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "gated", "interleaved"])
def test_a_repeated_hidden_channel_is_taken_away_without_a_trace(kind: str) -> None:
    torch.manual_seed(0)
    ffn = FFN(kind)
    with torch.no_grad():
        for linear in (ffn.up, getattr(ffn, "gate", None)):
            if linear is not None:
                step = 1 if kind != "interleaved" else 2
                for i in range(step):
                    linear.weight[7 * step + i], linear.bias[7 * step + i] = linear.weight[30 * step + i], linear.bias[30 * step + i]
    outcome = narrow(make(ffn), ratio=1 / HIDDEN, ridge=1e-9)
    assert widths(outcome.graph) == [HIDDEN - 1]
    assert off(outcome) < 1e-9


def test_the_new_output_weights_are_the_closed_form_on_the_calibration_data() -> None:
    outcome = narrow(captured(layers=1), ratio=0.5, shrink=0.2)
    (block,), (before,) = ffn_blocks(outcome.graph), ffn_blocks(outcome.original)
    kept_rows = outcome.graph.weight(block.up.args[1])  # type: ignore[arg-type]
    old_rows = outcome.original.weight("layers.0.up.weight")
    kept = torch.tensor([int((old_rows == row).all(1).nonzero()) for row in kept_rows])
    assert kept.tolist() == sorted(kept.tolist())  # in their old order
    hidden = torch.cat([_value(outcome.original, before.down.args[0], f).flatten(0, -2).double() for f in batches()])
    mean, c = hidden.mean(0), torch.cov(hidden.T, correction=0)
    c = torch.where(torch.eye(HIDDEN, dtype=torch.bool), c, 0.8 * c)
    w, b = outcome.original.weight("layers.0.down.weight").double(), outcome.original.weight("layers.0.down.bias").double()
    new = refitted(w, c, kept, 1e-4)
    torch.testing.assert_close(outcome.graph.weight(block.down.args[1]).double(), new, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    bias = b + w @ mean - new @ mean[kept]
    torch.testing.assert_close(outcome.graph.weight(block.down.args[2]).double(), bias, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


def _value(graph: Graph, node: Any, flat: Flat) -> Tensor:
    """What a node gives."""
    twin = graph.draft()
    twin.output.args = ((next(n for n in twin.nodes if n.name == node.name),),)
    twin.clean()
    return twin.run(flat)[0]


def test_a_refit_comes_nearer_and_a_bias_nearer_still() -> None:
    errors = [off(narrow(captured(), ratio=0.5, refit=refit, allocation="uniform")) for refit in ("affine", "linear", "none")]
    assert errors[0] < errors[1] < 0.5 * errors[2]


def test_a_bias_is_added_where_there_is_none_for_the_affine_refit_only() -> None:
    for refit, biases in (("affine", True), ("linear", False), ("none", False)):
        outcome = narrow(captured("gated", 1, bias=False), refit=refit)
        assert [len(b.down.args) > 2 or "bias" in b.down.kwargs for b in ffn_blocks(outcome.graph)] == [biases]


def test_selections_rank_as_they_should() -> None:
    found = {s: off(narrow(captured(), ratio=0.5, selection=s, allocation="uniform")) for s in ("obs", "energy", "random", "prefix")}
    assert found["obs"] < found["energy"] < min(found["random"], found["prefix"])


def test_random_follows_the_seed_and_needs_no_data_without_a_refit() -> None:
    outcomes = [narrow(captured(), selection="random", refit="none", seed=seed) for seed in (0, 0, 1)]
    a, b, c = (o.graph.run(batches()[0])[0] for o in outcomes)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert FFNWidth(selection="random", refit="none").requires == FFNWidth(selection="prefix", refit="none").requires == frozenset()
    assert "gram" in FFNWidth(selection="random").requires and "gram" in FFNWidth(selection="energy", refit="none").requires


def test_prefix_keeps_the_first_channels() -> None:
    outcome = narrow(captured("gated"), selection="prefix", refit="none", ratio=0.25)
    assert widths(outcome.graph) == [36, 36]
    for i, block in enumerate(ffn_blocks(outcome.graph)):
        assert torch.equal(outcome.graph.weight(block.down.args[1]), outcome.original.weight(f"layers.{i}.down.weight")[:, :36])  # type: ignore[arg-type]


def test_nothing_asked_is_nothing_done() -> None:
    outcome = narrow(captured(), ratio=0)
    assert outcome.records[-1].matched == 0
    assert [str(n) for n in outcome.graph.nodes] == [str(n) for n in canonical(captured()).nodes]
    assert torch.equal(outcome.graph.run(batches()[0])[0], outcome.original.run(batches()[0])[0])


def check_half_of_the_channels_gone(graph: Graph, tmp_path: Path) -> None:
    """What a random mask leaves gives what the whole gives with the other channels silenced."""
    masks = random_masks(canonical(graph), 0.5)
    outcome = narrow(graph, selection="mask", mask=mask_file(masks, tmp_path), refit="none")
    assert widths(outcome.graph) == [HIDDEN // 2]
    x = torch.randn(3, 16, WIDTH)
    torch.testing.assert_close(outcome.graph.run((x,))[0], silenced(canonical(graph), masks).run((x,))[0], rtol=1e-5, atol=1e-5)


def test_constants_between_the_projections_lose_their_channels_too(tmp_path: Path) -> None:
    class Scaled(FFN):
        def __init__(self) -> None:
            super().__init__("gated")
            self.scale, self.shift, self.slope = (nn.Parameter(torch.randn(HIDDEN)) for _ in range(3))

        def hidden(self, x: Tensor) -> Tensor:
            gate = F.silu(self.gate(x) * self.scale[None, None])
            return (gate * self.up(x) + self.shift).reshape(-1, HIDDEN).mul(self.slope).reshape(*x.shape[:2], HIDDEN)

    torch.manual_seed(0)
    graph = make(Scaled())
    check_half_of_the_channels_gone(graph, tmp_path)


@pytest.mark.parametrize("last", [True, False])
def test_a_batch_norm_between_the_projections_loses_its_channels_too(last: bool, tmp_path: Path) -> None:
    class Normed(FFN):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(HIDDEN)
            for t in self.norm.state_dict().values():
                if t.is_floating_point():
                    t.copy_(torch.rand_like(t) + 0.5)

        def hidden(self, x: Tensor) -> Tensor:
            up = self.up(x).transpose(1, 2)
            return (self.norm(F.relu(up)) if last else F.relu(self.norm(up))).transpose(1, 2)

    torch.manual_seed(0)
    graph = make(Normed())
    check_half_of_the_channels_gone(graph, tmp_path)


def test_constants_of_a_fused_projection_lose_their_channels_in_both_halves(tmp_path: Path) -> None:
    class Shifted(FFN):
        def __init__(self) -> None:
            super().__init__("interleaved", bias=False)
            self.shift = nn.Parameter(torch.randn(2 * HIDDEN))

        def hidden(self, x: Tensor) -> Tensor:
            both = self.up(x) + self.shift
            return F.silu(both[..., ::2]) * both[..., 1::2]

    torch.manual_seed(0)
    graph = make(Shifted())
    masks = random_masks(canonical(graph), 0.5)
    outcome = narrow(graph, selection="mask", mask=mask_file(masks, tmp_path), refit="none")
    assert widths(outcome.graph) == [HIDDEN // 2]
    x = torch.randn(3, 4, WIDTH)
    torch.testing.assert_close(outcome.graph.run((x,))[0], silenced(canonical(graph), masks).run((x,))[0], rtol=1e-5, atol=1e-5)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("allocation", ["uniform", "waterfill", "waterfill-influence", "block-influence"])
def test_as_much_is_removed_as_was_asked_for(ratio: float, allocation: Any) -> None:
    torch.manual_seed(0)
    graph = captured(layers=3)
    outcome = narrow(graph, ratio=ratio, allocation=allocation, round_to=4)
    removed = 1 - weights_of_blocks(outcome.graph) / weights_of_blocks(outcome.original)
    assert ratio <= removed < ratio + 4 / HIDDEN
    (note,) = outcome.graph.notes
    assert note.startswith(f"ffn-width: {removed:.1%} less weights in 3 feed-forward blocks")
    assert all(f"layers.{i} {HIDDEN} -> {width}" in note for i, width in enumerate(widths(outcome.graph)))


def test_channels_that_cost_nothing_stay_as_far_as_the_budget_has_room() -> None:
    torch.manual_seed(0)
    layers = [FFN() for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer.up.weight[12:], layer.up.bias[12:] = 0, 0  # three quarters are dead
    outcome = narrow(make(*layers), ratio=0.25, allocation="waterfill")
    assert 0.25 <= 1 - weights_of_blocks(outcome.graph) / weights_of_blocks(outcome.original) < 0.27


@pytest.mark.parametrize("first", [True, False])
def test_widths_follow_what_the_layers_can_spare(first: bool) -> None:
    torch.manual_seed(0)
    spare, other = FFN(), FFN()
    with torch.no_grad():
        spare.up.weight[HIDDEN // 2 :], spare.up.bias[HIDDEN // 2 :] = spare.up.weight[: HIDDEN // 2], spare.up.bias[: HIDDEN // 2]
    outcome = narrow(make(*((spare, other) if first else (other, spare))), ratio=0.25, ridge=1e-7, allocation="waterfill")
    assert widths(outcome.graph) == ([HIDDEN // 2, HIDDEN] if first else [HIDDEN, HIDDEN // 2])
    assert off(outcome) < 1e-6
    assert outcome.records[-1].declined[0].why == "the budget leaves it as it is"


def test_layers_that_add_little_to_the_residual_stream_give_most() -> None:
    torch.manual_seed(0)
    layers = [FFN() for _ in range(2)]
    with torch.no_grad():
        layers[0].down.weight.mul_(1e-2)
    by_stream, uniform = (widths(narrow(make(*layers), ratio=0.4, allocation=a).graph) for a in ("waterfill", "uniform"))
    assert by_stream[0] < uniform[0] - 8
    assert by_stream[1] > uniform[1] + 8


def test_no_layer_goes_below_the_floor() -> None:
    torch.manual_seed(0)
    spare = FFN()
    with torch.no_grad():
        spare.up.weight[4:], spare.up.bias[4:] = spare.up.weight[0], spare.up.bias[0]
    for floor in (0.5, 0.8):
        assert widths(narrow(make(spare, FFN()), ratio=0.4, floor=floor, allocation="waterfill").graph)[0] == math.ceil(floor * 0.6 * HIDDEN)


def test_widths_are_round_but_never_coarser_than_an_eighth_of_the_narrowest() -> None:
    for asked, step in ((4, 4), (64, 6)):
        found = widths(narrow(captured(layers=3), ratio=0.4, round_to=asked, allocation="waterfill").graph)
        assert all(w % step == 0 for w in found)
        assert sum(found) <= 0.6 * 3 * HIDDEN


# -- moments of the program as it becomes --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sequential", "asymmetric"])
def test_later_layers_see_what_earlier_ones_have_become(order: Any) -> None:
    graph = captured(layers=4)
    oneshot, other = (narrow(graph, ratio=0.5, selection="prefix", allocation="uniform", calibration=c) for c in ("oneshot", order))
    first, *rest = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*(_downs(o.graph) for o in (oneshot, other)))]
    assert first
    assert not any(rest)


def test_an_asymmetric_layer_gives_what_it_gave_on_the_inputs_it_now_gets(tmp_path: Path) -> None:
    graph = canonical(captured("gated", layers=2))
    save_file({"layers.0": torch.arange(8), "layers.1": torch.arange(HIDDEN - 1)}, tmp_path / "m.safetensors")  # what the first loses weighs most
    last = ffn_blocks(graph)[-1].down
    errors = {}
    for order in ("oneshot", "sequential", "asymmetric"):
        outcome = narrow(graph, selection="mask", mask=str(tmp_path / "m.safetensors"), calibration=order)
        pairs = [(_value(graph, last, f), _value(outcome.graph, ffn_blocks(outcome.graph)[-1].down, f)) for f in batches()]
        errors[order] = float(sum((a - b).double().square().sum() for a, b in pairs))
    assert errors["asymmetric"] < 0.9 * min(errors["oneshot"], errors["sequential"]), errors


def _downs(graph: Graph) -> list[Tensor]:
    return [graph.weight(b.down.args[1]) for b in ffn_blocks(graph)]  # type: ignore[arg-type]


# -- masks --------------------------------------------------------------------------------------------------------------


def test_a_mask_goes_by_layer_or_weight_as_booleans_or_indices_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    kept = torch.tensor([5, 1, 40])
    save_file({"layers.0": torch.zeros(HIDDEN, dtype=torch.bool).index_fill(0, kept, True), "layers.2.down.weight": kept}, tmp_path / "m.safetensors")
    outcome = narrow(captured(layers=3), selection="mask", mask=str(tmp_path / "m.safetensors"), refit="none")
    assert widths(outcome.graph) == [3, HIDDEN, 3]
    for i in (0, 2):
        assert torch.equal(_downs(outcome.graph)[i], outcome.original.weight(f"layers.{i}.down.weight")[:, [1, 5, 40]])
    assert [d.why for d in outcome.records[-1].declined] == ["the mask says nothing of it"]
    refitted_too = narrow(captured(layers=3), selection="mask", mask=str(tmp_path / "m.safetensors"))
    assert off(refitted_too) < off(outcome)


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ({"layers.9": torch.ones(HIDDEN, dtype=torch.bool)}, "names 'layers.9', and there is no such feed-forward block. Did you mean 'layers."),
        ({"layers.0": torch.ones(3, dtype=torch.bool)}, "the mask of layers.0 is bool[3]; expected bool[48]"),
        ({"layers.0": torch.ones(HIDDEN)}, "the mask of layers.0 is torch.float32[48]; expected bool[48] or int64[kept]"),
        ({"layers.0": torch.tensor([1, 48])}, "the mask of layers.0 holds indices twice, or others than 0 to 47"),
        ({"layers.0": torch.tensor([1, 1])}, "the mask of layers.0 holds indices twice"),
        ({"layers.0": torch.zeros(HIDDEN, dtype=torch.bool)}, "the mask of layers.0 keeps no channel at all"),
    ],
)
def test_a_mask_that_does_not_fit_is_answered_in_words(masks: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    p = FFNWidth(selection="mask", mask=mask_file(masks, tmp_path), refit="none")
    with pytest.raises(UsageError) as error:
        p.run(canonical(captured()).draft(), Context())
    assert sentence in str(error.value)


def test_a_file_that_is_no_mask_is_answered_in_words(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(InputFileError, match="is no safetensors file with masks"):
        FFNWidth(selection="mask", mask=str(tmp_path / "m.safetensors"), refit="none").run(canonical(captured()).draft(), Context())


# -- experts --------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Every token through the expert of its number, tokens sorted by expert beforehand. fused: gate and up in one weight."""

    def __init__(self, experts: int = 3, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Parameter(torch.randn(experts, WIDTH, (2 if fused else 1) * HIDDEN) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        both = torch.ops.rewright.grouped_linear(x, self.up, ends)
        hidden = F.gelu(both) if not self.fused else F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
        return x + torch.ops.rewright.grouped_linear(hidden, self.down, ends)


def routed(sizes: tuple[int, ...]) -> Flat:
    g = torch.Generator().manual_seed(3)
    return torch.randn(sum(sizes), WIDTH, generator=g), torch.tensor(sizes).cumsum(0).to(torch.int32)


def expert_graph(fused: bool = True) -> Graph:
    torch.manual_seed(0)
    return capture(Experts(fused=fused).eval(), routed((5, 4, 3)))


@pytest.mark.parametrize("fused", [True, False])
def test_each_expert_keeps_channels_of_its_own_fitted_to_its_own_tokens(fused: bool) -> None:
    data = [routed((300, 400, 500))]
    outcome = narrow(expert_graph(fused), data, ratio=0.5)
    (block,) = ffn_blocks(outcome.graph)
    assert (block.hidden, block.experts) == (HIDDEN // 2, 3)
    assert weights_of_blocks(outcome.graph) == weights_of_blocks(outcome.original) // 2
    assert len(outcome.graph.notes) == 1
    (x, ends), begin = data[0], 0
    up, new = outcome.original.weight("up"), outcome.graph.weight(block.up.args[1])  # type: ignore[arg-type]
    chosen = []
    for e, end in enumerate(ends.tolist()):
        gate_columns = new[e, :, : HIDDEN // 2]
        kept = torch.tensor([int((up[e, :, :HIDDEN] == column[:, None]).all(0).nonzero()) for column in gate_columns.T])
        chosen.append(kept.tolist())
        both = (x[begin:end] @ up[e]).detach().double()
        h = F.gelu(both) if not fused else F.silu(both[:, :HIDDEN]) * both[:, HIDDEN:]
        want = refitted(outcome.original.weight("down")[e].T, h.T @ h / len(h), kept, 1e-4)
        torch.testing.assert_close(outcome.graph.weight(block.down.args[1])[e].T.double(), want, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
        begin = end
    assert chosen[0] != chosen[1] != chosen[2]


def test_an_expert_that_saw_few_tokens_is_not_fitted_to_them_and_the_notes_say_so() -> None:
    data = [routed((400, 50, 0))]
    outcome = narrow(expert_graph(), data, ratio=0.5)
    (block,) = ffn_blocks(outcome.graph)
    old, new = outcome.original.weight("down"), outcome.graph.weight(block.down.args[1])  # type: ignore[arg-type]
    for e, same in enumerate((False, True, True)):
        rows = [any(torch.equal(row, other) for other in old[e]) for row in new[e]]
        assert all(rows) is same
    assert "2 of 3 experts of" in outcome.graph.notes[1]
    assert "saw fewer than 5 x 48 tokens (the fewest 0): chosen by energy, or weight norms" in outcome.graph.notes[1]
    up, w = outcome.original.weight("up")[2].double(), old[2].double()
    norms = w.square().sum(1) * up[:, :HIDDEN].square().sum(0) * up[:, HIDDEN:].square().sum(0)
    kept = [int((old[2] == row).all(1).nonzero()) for row in new[2]]
    assert kept == norms.topk(HIDDEN // 2).indices.sort().values.tolist()


def test_experts_side_by_side_in_one_batched_product_are_narrowed_too() -> None:
    class Dense(Experts):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # [experts, tokens, width]
            gate, up = torch.bmm(x, self.up).chunk(2, -1)
            return x + torch.bmm(F.silu(gate) * up, self.down)

    torch.manual_seed(0)
    x = torch.randn(3, 500, WIDTH)
    graph = capture(Dense().eval(), (x,))
    affected, without = (narrow(graph, [(x,)], ratio=0.5, refit=r) for r in ("affine", "none"))
    assert widths(affected.graph) == [HIDDEN // 2]
    assert [n for n in affected.graph.notes if "experts" in n] == []
    assert off(affected, [(x,)]) < off(without, [(x,)])


@pytest.mark.parametrize("fused", [True, False])
def test_biases_of_experts_picked_for_each_token_lose_their_channels(fused: bool, tmp_path: Path) -> None:
    class Biased(Experts):
        def __init__(self) -> None:
            super().__init__(fused=fused)
            self.bias = nn.Parameter(torch.randn(3, self.up.shape[2]))

        def forward(self, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:  # type: ignore[override]
            both = torch.ops.rewright.grouped_linear(x, self.up, ends) + self.bias[expert]
            hidden = F.silu(both[:, ::2]) * both[:, 1::2].clamp(-1, 1) if fused else F.gelu(both)  # by turns: GPT-OSS
            return x + torch.ops.rewright.grouped_linear(hidden, self.down, ends)

    torch.manual_seed(0)
    x, ends = routed((5, 4, 3))
    flat = x, ends, torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    graph = capture(Biased().eval(), flat)
    masks = random_masks(canonical(graph), 0.5)
    outcome = narrow(graph, [flat], selection="mask", mask=mask_file(masks, tmp_path), refit="none")
    assert widths(outcome.graph) == [HIDDEN // 2]
    torch.testing.assert_close(outcome.graph.run(flat)[0], silenced(canonical(graph), masks).run(flat)[0], rtol=1e-5, atol=1e-5)


# -- graphs without data ------------------------------------------------------------------------------------------------


def test_a_graph_without_data_is_narrowed_by_recipes() -> None:
    module = Model(FFN("fused"))
    full = narrow(capture(module.eval(), batches(1)[0]), selection="prefix", refit="none", ratio=0.5)
    outcome = narrow(capture(module.to("meta").eval(), (batches(1)[0][0].to("meta"),)), selection="prefix", refit="none", ratio=0.5)
    assert widths(outcome.graph) == [HIDDEN // 2]
    outcome.graph.materialize({name: t.detach() for name, t in full.original.weights().items()})
    assert torch.equal(outcome.graph.run(batches()[0])[0], full.graph.run(batches()[0])[0])


def test_streamed_weights_are_read_where_they_are_and_the_new_ones_held() -> None:
    torch.manual_seed(0)
    module = Model(FFN("gated"), FFN("gated"))
    graph = capture(module.eval(), batches(1)[0])
    full, stored = narrow(graph), {name: t.detach().clone() for name, t in graph.weights().items()}
    bare = capture(module.to("meta").eval(), (batches(1)[0][0].to("meta"),))
    outcome = Pipeline([FFNWidth(round_to=1)], calibration=Calibration(batches(), weights=stored)).run(bare)
    assert outcome.records[-1].applied == 2, outcome.records[-1]
    outcome.graph.materialize(stored)
    torch.testing.assert_close(outcome.graph.run(batches()[0])[0], full.graph.run(batches()[0])[0], rtol=1e-4, atol=1e-4)


# -- what is refused ------------------------------------------------------------------------------------------------------


def why(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Why nothing of a model is narrowed."""
    graph = capture(model.eval(), inputs or batches(1)[0])
    outcome = narrow(graph, [], selection="prefix", refit="none", ratio=0.5)
    assert outcome.records[-1].applied == 0
    return [d.why for d in outcome.records[-1].declined]


def test_declines_a_norm_over_the_hidden_channels() -> None:
    class Normed(FFN):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LayerNorm(HIDDEN)

        def hidden(self, x: Tensor) -> Tensor:
            return self.inner(super().hidden(x))

    assert why(Model(Normed())) == ["a norm over the hidden channels stands before the down projection"]


def test_declines_hidden_channels_that_something_else_reads() -> None:
    class Spy(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            ffn: Any = self.layers[0]
            h = ffn.hidden(self.norms[0](x))
            return self.head(x + ffn.down(h)), h.sum(-1)

    assert why(Spy(FFN("gated"))) == ["its hidden channels are also read by sum_1 of the model itself"]

    class Leak(Spy):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            ffn: Any = self.layers[0]
            h = ffn.hidden(self.norms[0](x))
            return self.head(x + ffn.down(h)), h

    assert why(Leak(FFN("gated"))) == ["its hidden channels are also an output of the model"]


def test_declines_weights_that_several_calls_share() -> None:
    shared = FFN()
    assert why(Model(shared, shared)) == ["its weights serve 2 calls: an edit changes them all"] * 2


def test_declines_a_weight_that_is_computed() -> None:
    class Computed(FFN):
        def hidden(self, x: Tensor) -> Tensor:
            return F.gelu(F.linear(x, self.up.weight * x.mean()))

    assert why(Model(Computed()))[0].startswith("the weight of ")


def test_declines_pointwise_convolutions() -> None:
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x)))

    assert why(Convolved(), torch.randn(2, 8, 4, 4)) == ["its projections are 1x1 convolutions"]


def test_leaves_alone_what_the_user_ignores_and_what_it_was_not_asked_for() -> None:
    outcome = narrow(captured(), ignore=("layers.0",), ratio=0.5)
    assert widths(outcome.graph) == [HIDDEN, HIDDEN // 2]
    assert [d.why for d in outcome.records[-1].declined] == ["the user asked to leave layers.0 alone"]
    graph = canonical(captured()).draft()
    p, calibration = FFNWidth(ratio=0.5, round_to=1), Calibration(batches())
    context = Context(only=frozenset({ffn_blocks(graph)[1].down.name}), calibration=calibration, statistics=calibration.gather(graph, p.requests(graph)))
    p.run(graph, context)
    assert widths(graph) == [HIDDEN, HIDDEN // 2]
    assert (context.declined, len(context.applied), graph.notes) == ([], 1, [])


def test_too_many_channels_for_obs_are_chosen_by_energy_and_the_notes_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGEST == 16384
    monkeypatch.setattr("rewright.passes.factorization.ffn_narrowing.LARGEST", 40)
    obs, by_energy = (narrow(captured(), selection=s, allocation="uniform") for s in ("obs", "energy"))
    assert all(torch.equal(a, b) for a, b in zip(_downs(obs.graph), _downs(by_energy.graph)))
    assert obs.graph.notes[1] == "ffn-width: layers.0.down has 48 hidden channels, over 40: chosen by energy, not obs"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 1.0}, "ratio is the share that is removed"),
        ({"selection": "best"}, "ffn-width has no selection 'best'; there are obs, energy"),
        ({"refit": "ridge"}, "ffn-width has no refit 'ridge'"),
        ({"allocation": "welore"}, "welore allocates by singular values of matrices"),
        ({"calibration": "twice"}, "ffn-width has no calibration 'twice'"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"floor": 2.0}, "floor must be from 0 to 1; got 2"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"selection": "mask"}, "mask is the path of a safetensors file"),
        ({"mask": "m.safetensors"}, "give both or none"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        FFNWidth(**options)
