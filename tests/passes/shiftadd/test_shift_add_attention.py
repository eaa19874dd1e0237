"""shift-add-attention: where it applies, what it starts from, what it says of speed and training, one refusal a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewright as rw
from rewright.ir.graph import Graph
from rewright.passes.fusion.pack_heads import PackHeads
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.rewrite import Context, Recovered
from rewright.passes.shiftadd.shift_add_attention import ShiftAddAttention, in_time
from rewright.passes.statistics import Calibration
from rewright.passes.training.finetune import Finetune

from ..encoder import encoder, example

torch.set_num_threads(1)
OPS = torch.ops.rewright


@pytest.fixture(scope="module")
def graph() -> Graph:
    return rw.capture(encoder(), (), example())


def run(graph: Graph, *passes: Any, data: Any = None, **options: Any) -> Outcome:
    flat = graph.flat_inputs((), example()) if data is None else data
    steps = passes or (ShiftAddAttention(untrained="allow"),)
    return Pipeline(steps, calibration=Calibration([flat]), **options).run(graph, [flat])


def attention_inputs(graph: Graph, flat: Any) -> list[tuple[Tensor, ...]]:
    """q, k, v and y of every attention, by running the program up to it."""
    from rewright.ir.evaluate import values_of

    names = [[*(a.name for a in n.args[:3]), n.name] for n in graph.find(OPS.attention.default)]  # type: ignore[union-attr]
    with torch.no_grad():
        return [values_of(graph, four)(*flat) for four in names]


# -- what it does -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_every_attention_is_replaced_and_starts_with_rows_of_the_length_it_had(graph: Graph, packed: bool) -> None:
    outcome = run(graph, *([PackHeads()] if packed else []), ShiftAddAttention(untrained="allow"))
    record, after = outcome.records[-1], outcome.graph
    assert (record.applied, record.declined, record.undone) == (2, [], None)
    assert not after.find(OPS.attention.default, OPS.multi_head_attention.default) and len(after.find(OPS.shift_add_attention.default)) == 2
    flat = graph.flat_inputs((), example())
    real = flat[1] != 0
    for i, (_, _, _, y) in enumerate(attention_inputs(graph, flat)):
        lengths = y.permute(0, 2, 1, 3)[real].square().sum(-1).mean(0).sqrt()  # [heads], over tokens that are no padding
        torch.testing.assert_close(after.weight(f"layers.{i}.gain").detach(), lengths, rtol=1e-4, atol=1e-5)
        conv = after.weight(f"layers.{i}.conv")
        assert conv.shape == (4, 16, 9) and not conv.any()
        assert isinstance(conv, nn.Parameter) and conv.requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_the_program_computes_the_op_between_its_projections_at_other_sizes_too(packed: bool) -> None:
    names = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
    graph = rw.capture(encoder(layers=1), (), example(), names)
    after = run(graph, *([PackHeads()] if packed else []), ShiftAddAttention(untrained="allow")).graph
    with torch.no_grad():
        after.weight("layers.0.conv").normal_()
    for flat in (graph.flat_inputs((), example()), tuple(t[:2, :7] for t in graph.flat_inputs((), example()))):
        ((q, k, v, _),) = attention_inputs(graph, flat)
        model = encoder(layers=1)
        layer = model.layers[0]
        with torch.no_grad():
            y = OPS.shift_add_attention(q, k, v, after.weight("layers.0.conv"), after.weight("layers.0.gain"), flat[1] != 0)
            x = layer.norm1(model.embed(flat[0]) + layer.out(y.permute(0, 2, 1, 3).flatten(2)))
            expected = layer.norm2(x + layer.down(nn.functional.gelu(layer.up(x))))
        torch.testing.assert_close(after.run(flat)[0], expected, rtol=1e-4, atol=1e-5)


def test_padding_does_not_reach_real_tokens(graph: Graph) -> None:
    after = run(graph).graph
    ids, mask = graph.flat_inputs((), example())
    for i in range(2):
        after.weight(f"layers.{i}.conv").data.normal_()
    other = torch.where(mask != 0, ids, ids + 1)
    real = mask != 0
    assert torch.equal(after.run((ids, mask))[0][real], after.run((other, mask))[0][real])


def test_only_skip_and_kernel_are_heeded(graph: Graph) -> None:
    first = run(graph, ShiftAddAttention(untrained="allow", only=("layers.0",), kernel=3))
    assert first.records[-1].layers == ["layers.0"] and first.graph.weight("layers.0.conv").shape[-1] == 3
    assert [d.why for d in first.records[-1].declined] == ["it is not within only = layers.0"]
    assert len(ShiftAddAttention(only=("layers.0",)).requests(graph)) == 1, "what it will not replace is not measured"
    second = run(graph, ShiftAddAttention(untrained="allow", skip=("layers.0",)))
    assert second.records[-1].layers == ["layers.1"] and [d.why for d in second.records[-1].declined] == ["skip names layers.0"]
    third = run(graph, ignore=("layers.1",))
    assert third.records[-1].layers == ["layers.0"] and "asked to leave layers.1 alone" in third.records[-1].declined[0].why
    with pytest.raises(rw.RecipeError, match="kernel is an odd number of tokens, got 8"):
        ShiftAddAttention(kernel=8)


# -- what it says -------------------------------------------------------------------------------------------------------


def test_it_does_not_pass_without_training_or_consent(graph: Graph) -> None:
    refused = run(graph, ShiftAddAttention())
    assert refused.records[-1].applied == 0
    assert {d.why for d in refused.records[-1].declined} == {
        'it becomes another function, and no pass after this one trains the program: add a finetune pass, or untrained = "allow" to train it later'
    }
    allowed = run(graph)
    assert "shift-add-attention: the outputs of 2 attentions are another function's; they need fine-tuning to be of use" in allowed.graph.notes
    trained = run(graph, ShiftAddAttention(), Finetune(steps=1), finetune=lambda graph, options: Recovered(graph.clone(), "trained", 1, ("w",)))
    assert [(r.name, r.applied) for r in trained.records[-2:]] == [("shift-add-attention", 2), ("finetune", 1)]
    assert not any("need fine-tuning" in note for note in trained.graph.notes)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1e-4, 2e-4, "shift-add-attention: not faster on tpu: predicted 200 us against 100 us; it buys additions instead of multiplications "),
        (3e-4, 2e-4, "shift-add-attention: 1.50 x as fast on tpu: predicted 200 us against 300 us for the program"),
    ],
)
def test_the_notes_say_whether_it_is_predicted_to_be_faster(graph: Graph, before: float, after: float, said: str) -> None:
    class Target:
        name = "tpu"

    def predict(graph: Graph) -> float:
        return after if graph.find(OPS.shift_add_attention.default) else before

    notes = run(graph, predict=predict, target=Target()).graph.notes
    assert sum(note.startswith(said) for note in notes) == 1
    assert ("(modelled energy), not time" in " ".join(notes)) == (after > before)


def test_equal_times_are_not_faster() -> None:
    assert in_time(1e-4, 1e-4, "cpu").startswith("not faster on cpu")


# -- what it refuses ----------------------------------------------------------------------------------------------------


class One(nn.Module):
    """One attention over linears of one value, or of two."""

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int = 2, other: int = 0) -> None:
        super().__init__()
        self.attend, self.kv_heads, self.other = attend, kv_heads, other
        self.q, self.k, self.v, self.out = nn.Linear(32, 32), *(nn.Linear(32, 16 * kv_heads) for _ in range(2)), nn.Linear(32, 32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = y if self.other else x
        split = [f(z).view(2, -1, h, 16).transpose(1, 2) for f, z, h in ((self.q, x, 2), (self.k, memory, self.kv_heads), (self.v, memory, self.kv_heads))]
        return x + self.out(self.attend(*split).transpose(1, 2).reshape(2, -1, 32)) + y.sum(1, keepdim=True)


REFUSED: dict[str, tuple[One, str]] = {
    "causal": (One(lambda q, k, v: OPS.attention(q, k, v, None, True)), "it is causal; the sums over codes are over all tokens"),
    "window": (One(lambda q, k, v: OPS.attention(q, k, v, None, False, 3)), "it looks at a window of 3 tokens"),
    "bias": (
        One(lambda q, k, v: OPS.attention(q, k, v, None, False, None, None, None, torch.zeros(1, 2, 6, 6))),
        "its scores have a bias, and there are no scores to add it to",
    ),
    "softcap": (One(lambda q, k, v: OPS.attention(q, k, v, None, False, None, None, 5.0)), "its scores are capped at 5, and there are no scores to cap"),
    "sizes": (
        One(lambda q, k, v: OPS.attention(q, k, v, None, False, None, None, None, None, torch.ones(2, 6))),
        "its tokens count by sizes (merged tokens)",
    ),
    "grouped": (One(lambda q, k, v: OPS.attention(q, k, v), kv_heads=1), "1 key heads serve 2 query heads; every head needs keys of its own"),
    "cross": (One(lambda q, k, v: OPS.attention(q, k, v), other=6), "it is cross attention: its queries and keys are not of the same tokens"),
    "shorter": (One(lambda q, k, v: OPS.attention(q, k[:, :, ::2], v[:, :, ::2])), "it has 6 queries and 3 keys; the filter and the token's own value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_in_words(name: str) -> None:
    model, why = REFUSED[name]
    torch.manual_seed(0)
    data = (torch.randn(2, 6, 32), torch.randn(2, 6, 32))
    record = run(rw.capture(model.eval(), data), data=data).records[-1]
    assert record.applied == 0 and record.undone is None
    assert [d.why[: len(why)] for d in record.declined] == [why]


def test_without_calibration_it_says_what_to_give(graph: Graph) -> None:
    with pytest.raises(rw.UsageError, match=r"shift-add-attention needs statistics \(mean_square\) and there is no calibration data"):
        Pipeline([ShiftAddAttention(untrained="allow")]).run(graph, [graph.flat_inputs((), example())])


def test_a_context_without_training_to_come_is_the_default() -> None:
    assert Context().trained_later is False
