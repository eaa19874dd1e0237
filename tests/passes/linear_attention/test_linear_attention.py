"""linear-attention: the mask classes it replaces and refuses, its gates, which layers it chooses, what it computes and says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewright as rw
from rewright.backends.onnx.session import Session
from rewright.backends.target import Target
from rewright.ir.errors import RecipeError
from rewright.ir.evaluate import values_of
from rewright.ir.feature_maps import KINDS, initial
from rewright.ir.graph import Graph
from rewright.passes.fusion.pack_heads import PackHeads
from rewright.passes.linear_attention.linear_attention import LinearAttention, layer_errors
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.statistics import Calibration
from rewright.passes.training.finetune import Finetune
from rewright.tools.architectures import find_architectures
from rewright.tools.optimize import capture, optimize, plan, predicted_seconds

from ..encoder import encoder, example

torch.set_num_threads(1)
ours = torch.ops.rewright
ALL = LinearAttention(window=0, keep=0, untrained="allow", force=True)


class Attention(nn.Module):
    """Attention between two inputs of one width, as one likes it."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, scale: float | None = None, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.scale, self.causal = heads, kv_heads, scale, causal
        self.q, self.k, self.v, self.out = nn.Linear(32, 8 * heads), nn.Linear(32, 8 * kv_heads), nn.Linear(32, 8 * kv_heads), nn.Linear(8 * heads, 32)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = (f(t).unflatten(-1, (n, 8)).transpose(1, 2) for f, t, n in ((self.q, x, self.heads), (self.k, y, self.kv_heads), (self.v, y, self.kv_heads)))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads)
        return x + self.out(o.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return rw.capture(encoder(), (), example())


def run(step: LinearAttention, graph: Graph, flat: Any = None, target: str | None = None, *others: Any) -> Outcome:
    flat = graph.flat_inputs((), example()) if flat is None else flat
    machine = Target.load(target) if target else None
    predict = (lambda g, sizes=None: predicted_seconds(g, machine, sizes)) if machine else None
    return Pipeline([*others, step], machine, predict=predict, calibration=Calibration([flat])).run(graph, [flat])


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def why(outcome: Outcome) -> list[str]:
    return [d.why for d in outcome.records[-1].declined]


# -- what it computes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_becomes_a_weighted_mean_by_products_of_features(kind: Any, causal: bool) -> None:
    module, x = Attention(kv_heads=2, causal=causal), tokens(2, 11, 32)
    after = run(replace(ALL, feature_map=kind), capture(module, (x,)), (x,)).graph
    assert not after.find(ours.attention.default)
    q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (module.q, module.k, module.v))
    fq, fk = (ours.feature_map(t, initial(kind, t.shape[1], 8), kind, query) for t, query in ((q, True), (k, False)))
    weights = fq @ fk.repeat_interleave(2, 1).transpose(-1, -2) + 1e-6
    weights = weights.tril() if causal else weights
    o = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(after(x), x + module.out(o.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-4)


def test_a_window_over_all_tokens_leaves_the_model_as_it_was(graph: Graph) -> None:
    outcome = run(replace(ALL, window=16), graph)
    assert len(outcome.graph.find(ours.hybrid_attention.default)) == 2
    assert outcome.total is not None and outcome.total.relative_error < 1e-5


def test_far_tokens_weigh_as_much_as_the_share_says() -> None:
    module, x = Attention(), tokens(1, 24, 32)
    after = run(replace(ALL, window=4, feature_map="elu1"), capture(module, (x,)), (x,)).graph
    (node,) = after.find(ours.hybrid_attention.default)
    share: Any = node.args[5]
    torch.testing.assert_close(torch.sigmoid(after.weight(share.args[0])), torch.full((4,), 0.1))


@pytest.mark.parametrize("window", [0, 4])
def test_the_order_of_tokens_is_kept(window: int) -> None:
    module, x = Attention(causal=True), tokens(2, 24, 32)
    after = run(replace(ALL, window=window), capture(module, (x,)), (x,)).graph
    other = torch.cat([x[:, :15], tokens(2, 9, 32, seed=3)], 1)
    torch.testing.assert_close(after(other)[:, :15], after(x)[:, :15], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after(other)[:, 15:], after(x)[:, 15:])


def test_padding_counts_nothing(graph: Graph) -> None:
    after = run(ALL, graph).graph
    given = example()
    first = after(**given)
    given["input_ids"] = torch.where(given["attention_mask"] == 0, 7, given["input_ids"])
    real = given["attention_mask"] != 0
    torch.testing.assert_close(after(**given)[real], first[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_temperature_of_its_own_is_folded_into_the_queries(scale: float) -> None:
    module, x = Attention(scale=scale), tokens(2, 9, 32)
    after = run(replace(ALL, feature_map="taylor2"), capture(module, (x,)), (x,)).graph
    q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (module.q, module.k, module.v))
    z = q @ k.transpose(-1, -2) * scale
    weights = 1 + z + z.square() / 2
    o = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(after(x), x + module.out(o.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-4)


def test_two_sequences_are_fine_without_a_window() -> None:
    x, y = tokens(2, 7, 32), tokens(2, 12, 32, seed=1)
    graph = capture(Attention(), (x, y))
    assert run(ALL, graph, (x, y)).records[-1].applied == 1
    assert why(run(replace(ALL, window=4), graph, (x, y))) == ["it has 7 queries and 12 keys, and a window needs one sequence; window = 0 replaces it"]


def test_the_result_runs_in_onnxruntime(graph: Graph, tmp_path: Any) -> None:
    given = example()
    result = optimize(encoder(), given, [replace(ALL, window=4)])
    assert len(result.graph.find(ours.hybrid_attention.default)) == 2
    result.export(tmp_path / "m.onnx")
    found = Session(tmp_path / "m.onnx")(result.graph.flat_inputs((), given))[0]
    real = given["attention_mask"] != 0
    torch.testing.assert_close(torch.as_tensor(found)[real], result.module(**given)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_a_dynamic_batch_stays_dynamic_where_the_tokens_are_fixed(window: int, causal: bool) -> None:
    x = tokens(3, 24, 32)
    outcome = run(replace(ALL, window=window), capture(Attention(causal=causal), (x,)), (x,))
    assert outcome.records[-1].applied == 1 and outcome.records[-1].undone is None
    shape = outcome.graph.output.args[0][0].meta["val"].shape  # type: ignore[index, union-attr]
    assert isinstance(shape[0], torch.SymInt) and outcome.graph(tokens(5, 24, 32)).shape == (5, 24, 32)


def test_fewer_queries_than_keys_have_no_order_to_keep() -> None:
    class Last(Attention):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            q, k, v = (f(t).unflatten(-1, (4, 8)).transpose(1, 2) for f, t in ((self.q, x[:, -3:]), (self.k, x), (self.v, x)))
            return self.out(ours.attention(q, k, v, None, True).transpose(1, 2).flatten(2))

    x = tokens(2, 9, 32)
    assert why(run(ALL, capture(Last(), (x,)), (x,))) == ["it is causal and has 3 queries and 9 keys; both need the same tokens"]


# -- T22: mask classes --------------------------------------------------------------------------------------------------

CLASSES = {
    "bert": (2, ()),
    "llama": (2, ()),
    "t5_encoder": (0, ("its scores have a bias, which linear-attention has no place for",)),
    "swin": (0, ("its scores have a bias, which linear-attention has no place for",)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_masks_of_padding_and_order_are_replaced_and_biases_refused(name: str) -> None:
    (architecture,) = find_architectures([name])
    model = architecture.build()
    applied, whys = CLASSES[name]
    graph = capture(model, (), architecture.inputs(model, *architecture.shapes[0]), architecture.dynamic)
    record = Pipeline([replace(ALL, feature_map="elu1")], verify=False).run(graph).records[-1]
    assert record.applied == applied and (not whys or {d.why for d in record.declined} == set(whys))


# -- gates --------------------------------------------------------------------------------------------------------------


def test_too_few_tokens_are_refused_with_the_crossover() -> None:
    x = tokens(1, 65, 32)
    (said,) = why(run(LinearAttention(window=0, keep=0, untrained="allow"), capture(Attention(), (x,)), (x,), "cpu"))
    assert said.startswith("it has 65 tokens, and on cpu linear attention (hedgehog_softmax, 16 features) is predicted to be faster only from ")
    least = int(said.split("only from ")[1].split(" tokens")[0].replace(",", ""))
    assert 65 < least < 5000
    longer = tokens(1, least, 32)
    record = run(LinearAttention(window=0, keep=0, untrained="allow"), capture(Attention(), (longer,)), (longer,), "cpu").records[-1]
    assert record.applied == 1
    assert run(LinearAttention(window=0, keep=0, untrained="allow", force=True), capture(Attention(), (x,)), (x,), "cpu").records[-1].applied == 1


def test_digits_vit_has_too_few_tokens() -> None:
    """T23, on the model that comes with us."""
    declined = plan("zoo:digits-vit", recipe=[LinearAttention()]).records[-1].declined
    assert len(declined) == 6 and all("it has 65 tokens" in d.why and "is predicted to be faster only from" in d.why for d in declined)


def test_without_training_it_refuses_unless_told(graph: Graph) -> None:
    said = why(run(replace(ALL, untrained="refuse"), graph))
    assert len(said) == 2 and all("no pass after this one trains the program" in s for s in said)
    after = run(ALL, graph).graph
    assert any("they need training to be of use" in n for n in after.notes)
    outcome = Pipeline([replace(ALL, untrained="refuse"), Finetune(steps=1)], verify=False).run(graph)
    assert outcome.records[-2].applied == 2 and not any("need training" in n for n in outcome.graph.notes)


def test_the_layers_that_move_least_are_replaced(graph: Graph) -> None:
    both = run(ALL, graph)
    (note,) = (n for n in both.graph.notes if "outputs moved" in n)
    errors = {x.split()[0]: float(x.split()[1]) for x in note.split(": ")[-1].split(", ")}
    half = run(replace(ALL, keep=0.5), graph)
    assert half.records[-1].layers == [min(errors, key=errors.__getitem__)]
    (said,) = why(half)
    assert said == f"keep = 0.5 leaves 1 of 2 layers softmax, and its output would move by {max(errors.values()):.2f} of its length"


def test_errors_are_those_of_real_tokens(graph: Graph) -> None:
    flat = graph.flat_inputs((), example())
    attention = graph.find(ours.attention.default)[0]
    value = attention.args[2]
    found = layer_errors(graph, {"": (attention, value)}, [flat])[""]  # type: ignore[dict-item]
    old, new = (x.transpose(1, 2)[flat[1] != 0] for x in values_of(graph, [attention.name, value.name])(*flat))  # type: ignore[union-attr]
    assert found == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-5)


def test_a_limit_on_the_error_of_a_layer(graph: Graph) -> None:
    said = why(run(replace(ALL, max_layer_error=0.01), graph))
    assert len(said) == 2 and all("more than max_layer_error = 0.01" in s for s in said)


def test_choosing_layers_needs_data(graph: Graph) -> None:
    outcome = Pipeline([replace(ALL, keep=0.5)]).run(graph)
    assert (
        outcome.records[-1].undone == "linear-attention chooses layers by their error on calibration data, and there is none; give some, or keep = 0 and `only`"
    )
    assert Pipeline([ALL]).run(graph).records[-1].applied == 2


def test_packed_heads_are_left_alone(graph: Graph) -> None:
    flat = graph.flat_inputs((), example())
    assert set(why(run(ALL, graph, flat, None, PackHeads()))) == {"its heads are packed; put linear-attention before pack-heads"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 1.0}, "keep is a share"),
        ({"window": -1}, "window is at least 0"),
        ({"features": 4, "feature_map": "elu1"}, "elu1 has as many features as it has; features is for performer, t2r, hedgehog_softmax, hedgehog_exp"),
        ({"max_layer_error": 0.0}, "max_layer_error is above 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        LinearAttention(**options)
