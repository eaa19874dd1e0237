"""Token merging on real architectures: exact where it has to be, and no where it can't."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rewright as rw
from rewright.ir.cost import cost, node_costs
from rewright.ir.errors import RecipeError
from rewright.ir.graph import Graph
from rewright.passes.rewrite import Context
from rewright.passes.tokens.merge_places import places_of, prefix_of
from rewright.passes.tokens.merging import Merging
from rewright.passes.tokens.schedule import TokenFlops, allocated, clamped, ramp, solved
from rewright.passes.tokens.token_merging import TokenMerging
from rewright.tools.models import load_model, runner_of
from rewright.tools.zoo import load_zoo

from .twins import ARCHITECTURES, pair, timm_vit, twin_images

torch.set_num_threads(1)
ours = torch.ops.rewright


def captured(model: nn.Module, inputs: Any) -> Graph:
    """The canonical graph, with only the batch dynamic. inputs: positional, or by name."""
    if isinstance(inputs, dict):
        return rw.capture(model.eval(), (), inputs, dynamic_shapes={name: {0: "batch"} for name in inputs})
    return rw.capture(model.eval(), inputs)


@cache
def architecture(name: str) -> tuple[Graph, tuple]:
    """One of ARCHITECTURES in float64 with its flat inputs, captured once: `run` edits clones."""
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name][0]()
    graph = captured(model.double(), inputs)
    return graph, graph.flat_inputs((), inputs) if isinstance(inputs, dict) else graph.flat_inputs(inputs)


@cache
def zoo(name: str) -> Graph:
    """A model of ours in canonical form."""
    return rw.optimize(load_model(f"zoo:{name}"), recipe=[], verify=False).graph


def run(graph: Graph, **options: Any) -> tuple[Graph, Context]:
    """The pass alone."""
    context = Context()
    return TokenMerging(**{"min_agreement": 0.0, **options}).run(graph.clone(), context), context


def worst(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The largest relative error of flat outputs."""
    pairs = [(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True) if isinstance(x, Tensor)]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_equal_tokens_leaves_the_outputs_as_they_are(name: str) -> None:
    _, prefix, pairs = ARCHITECTURES[name]
    graph, flat = architecture(name)
    after, context = run(graph, r=(pairs, 0, 0))
    assert len(context.applied) == 1, context.declined
    assert after.find(ours.token_match.default)[0].args[2] == prefix
    assert [n.args[1] for n in after.find(ours.token_match.default)] == [pairs]
    assert worst(graph.run(flat), after.run(flat)) < 1e-12


@pytest.mark.parametrize("name", ["vit", "dense head"])
def test_in_float32_within_rounding(name: str) -> None:
    torch.manual_seed(0)
    model, (image,) = ARCHITECTURES[name][0]()
    graph = captured(model.float(), (image.float(),))
    after, _ = run(graph, r=(ARCHITECTURES[name][2], 0, 0))
    assert worst(graph.run((image.float(),)), after.run((image.float(),))) < 1e-5


def test_the_digits_model_with_its_real_weights_merges_equal_tokens_exactly() -> None:
    torch.manual_seed(0)
    graph = zoo("digits-vit").clone()
    table = next(n for n, t in graph.weights().items() if tuple(t.shape) == (1, 65, 192) or (t.dim() == 3 and t.shape[1] == 65))
    positions = graph.weight(table).detach().clone()
    pair(positions, 1)
    node = next(n for n in graph.fx.find_nodes(op="get_attr") if n.target == table)
    node.replace_all_uses_with(graph.add_constant("paired_positions", positions))
    graph.clean()
    image = graph.inputs[0].meta["val"].shape
    patch = int(image[-1]) // 8
    x = torch.randn(3, int(image[1]), 8, patch, 8, patch)
    x[..., 1::2, :] = x[..., 0::2, :]
    flat = (x.reshape(3, int(image[1]), 8 * patch, 8 * patch),)
    after, context = run(graph, r=(32, 0, 0, 0, 0, 0))
    assert len(context.applied) == 1
    assert worst(graph.run(flat), after.run(flat)) < 1e-5
    assert (graph.run(flat)[0].argmax(-1) == after.run(flat)[0].argmax(-1)).all()


def test_in_block_merging_of_equal_tokens_is_exact_and_keeps_the_stream() -> None:
    graph = architecture("vit")[0]
    after, context = run(graph, where="in-block", cell=(1, 2), share=0.5)
    assert len(context.applied) == 3
    flat = (twin_images(64, 16),)
    assert worst(graph.run(flat), after.run(flat)) < 1e-12
    assert [int(n.meta["val"].shape[2]) for n in after.find(ours.attention.default)] == [9, 9, 9]
    assert [int(b.meta["val"].shape[1]) for b in after.find(torch.ops.aten.gelu.default)] == [17, 17, 17]


class Reads(nn.Module):
    """Single tokens, the first ones and a plain sum of a ViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm_vit("vit_tiny_patch16_224", 1, img_size=64, num_classes=0)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.vit.forward_features(x)
        return tokens[:, 5], tokens[:, :4], tokens[:, 3:], tokens.sum(1)


def test_tokens_that_are_read_one_by_one_are_those_they_were_merged_into() -> None:
    torch.manual_seed(0)
    graph = captured(Reads().double(), (twin_images(64, 16),))
    after, context = run(graph, r=(8, 0, 0), prefix=1)
    assert len(context.applied) == 1
    flat = (twin_images(64, 16),)
    assert worst(graph.run(flat), after.run(flat)) < 1e-12


def test_a_mask_that_is_not_for_a_sum_stays_a_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = ARCHITECTURES["padded text"][0]()[0].bert

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden * attention_mask.unsqueeze(-1).to(hidden.dtype)

    torch.manual_seed(0)
    inputs = ARCHITECTURES["padded text"][0]()[1]
    graph = captured(Masked().double(), inputs)
    after, _ = run(graph, r=(8, 0, 0), prefix=1)
    flat = graph.flat_inputs((), inputs)
    real = inputs["attention_mask"].bool()
    assert worst(graph.run(flat)[0][real], after.run(flat)[0][real]) < 1e-12


# -- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "layers", "r", "last", "ratio"),
    [(197, 12, 8, 101, 1.34), (197, 12, 13, 41, 1.70), (197, 12, 16, 11, 2.02), (197, 24, 8, 7, 1.99), (577, 24, 23, 25, 1.99), (257, 32, 7, 33, 1.80)],
)
def test_counts_and_flops_ratios_are_those_of_the_formula(tokens: int, layers: int, r: int, last: int, ratio: float) -> None:
    """specs/attention_tokens.md 3.4, for the widths of ViT-B (12), L (24) and H (32)."""
    width = {12: 768, 24: 1024, 32: 1280}[layers]
    gone = clamped(ramp(r, 0.0, layers), tokens, 1)
    assert tokens - sum(gone) == last
    linear, quadratic = [8.0 * width**2 * tokens], [4.0 * width * tokens**2]
    for i in range(layers):
        more = i + 1 < layers
        linear.append(16.0 * width**2 * tokens + 8.0 * width**2 * tokens * more)
        quadratic.append(4.0 * width * tokens**2 * more)
    assert TokenFlops(tokens, 0.0, linear, quadratic).ratio(gone) == pytest.approx(ratio, abs=0.006)


def test_the_flops_counter_agrees_with_the_formula_before_and_after() -> None:
    graph = architecture("vit")[0]
    after, _ = run(graph, r=3)
    for program, counts in ((graph, [17] * 4), (after, [17, 14, 11, 8])):
        found = sum(c.cost.flops for c in node_costs(program) if c.op in ("linear", "attention") and c.layer.startswith("blocks"))
        attention = sum(8 * n * 192**2 + 4 * n**2 * 192 for n in counts[:3])
        assert found == 2 * (attention + sum(16 * n * 192**2 for n in counts[1:]))


def test_attention_counts_by_the_square_of_the_tokens() -> None:
    graph = architecture("vit")[0]
    merging = Merging(TokenMerging(r=1), graph, Context(), places_of(TokenMerging(r=1), graph, Context()))
    flops, attention = merging._flops(), [c.cost.flops for c in node_costs(graph) if c.op == "attention"]
    assert flops.quadratic == [attention[0], attention[1], attention[2], 0]
    assert flops.flops([0, 0, 0]) == sum(c.cost.flops for c in node_costs(graph))


@pytest.mark.parametrize("ratio", [1.25, 1.5, 2.0])
def test_a_ratio_is_solved_for_and_met(ratio: float) -> None:
    graph = architecture("vit")[0]
    after, _ = run(graph, ratio=ratio, prefix=1)
    reached = cost(graph).flops / cost(after).flops
    assert ratio - 0.02 <= reached < ratio + 0.1


def test_ramps_remove_early_or_late() -> None:
    assert ramp(10, 0.0, 5) == [10] * 5
    assert ramp(10, -1.0, 5) == [20, 15, 10, 5, 0]
    assert ramp(10, 1.0, 5) == [0, 5, 10, 15, 20]
    assert ramp(2.5, 0.0, 4) == [2, 3, 2, 3]
    assert clamped([100, 100, 100], 21, 1) == [10, 5, 2]
    assert clamped([3], 1, 1) == [0]


def test_the_solver_takes_the_smallest_schedule_that_is_enough() -> None:
    flops = TokenFlops(100, 0.0, [10.0, 100.0, 100.0], [0.0, 0.0, 0.0])
    gone = solved(flops, 1.5, 0.0, 0)
    assert flops.ratio(gone) >= 1.5 > flops.ratio(clamped(ramp((sum(gone) - 1) / 2, 0.0, 2), 100, 0))
    assert solved(flops, 1e9, 0.0, 0) == [50, 25]


def test_allocation_takes_from_where_the_outputs_move_least() -> None:
    flops = TokenFlops(100, 0.0, [10.0, 100.0, 100.0], [0.0, 0.0, 0.0])
    cheap_first = [[(10, 0.1), (20, 0.2), (40, 0.4)], [(10, 5.0), (20, 10.0), (40, 20.0)]]
    gone = allocated(flops, cheap_first, 1.3, 0)
    assert flops.ratio(gone) >= 1.3
    assert gone[1] == 0
    gone = allocated(flops, [cheap_first[1], cheap_first[0]], 1.2, 0)
    assert gone[0] == 0
    assert gone[1] > 0


@pytest.mark.parametrize("options", [{"r": 0}, {"ratio": 1.0}, {"share": 0.0}])
def test_nothing_to_remove_is_the_identity(options: dict[str, Any]) -> None:
    graph = architecture("vit")[0].clone()
    context = Context()
    assert TokenMerging(**options).run(graph, context) is graph
    assert not context.matched


def test_shapes_follow_the_schedule_at_every_batch() -> None:
    graph = architecture("rope")[0]
    after, _ = run(graph, r=(3, 2, 4))
    assert [int(n.meta["val"].shape[2]) for n in after.find(ours.attention.default)] == [17, 14, 12]
    for batch in (1, 2, 5, 8):
        flat = (torch.randn(batch, 3, 56, 56, dtype=torch.float64),)
        assert after.run(flat)[0].shape == (batch, 10)
    flat = (torch.randn(3, 3, 56, 56, dtype=torch.float64),)
    together = after.run(flat)[0]
    assert torch.allclose(together[[2, 0, 1]], after.run((flat[0][[2, 0, 1]],))[0], atol=1e-12)


# -- what it leaves alone -----------------------------------------------------------------------------------------------


def test_padding_goes_first_and_what_it_holds_does_not_matter() -> None:
    torch.manual_seed(0)
    graph = architecture("padded text")[0]
    ids = torch.randint(100, (2, 17))
    mask = torch.zeros_like(ids)
    mask[0, :9], mask[1, :6] = 1, 1
    after, _ = run(graph, r=(4, 2, 1), prefix=1)  # 8 and 11 tokens are padding: no real one goes
    assert worst(graph.run((ids, mask)), after.run((ids, mask))) < 1e-12
    other = torch.where(mask.bool(), ids, torch.randint(100, ids.shape))
    assert worst(after.run((ids, mask)), after.run((other, mask))) < 1e-12


def test_tokens_in_front_stay_where_they_are() -> None:
    graph = architecture("dinov2 with registers")[0]
    assert prefix_of(graph, 21) == 5
    after, _ = run(graph, r=4)
    flat = (torch.randn(2, 3, 56, 56, dtype=torch.float64),)
    keep = next(n for n in after.nodes if n.target.__name__ == "getitem" and n.args[0].target is ours.token_match.default and n.args[1] == 0)  # type: ignore[union-attr]
    after.output.args = ((keep,),)
    after.call = after.call
    after.recompile()
    values = torch.fx.Interpreter(after.module).run(*flat, enable_io_processing=False)[0]
    assert torch.equal(values[:, :5], torch.arange(5).expand(2, 5))


def test_without_merging_the_mean_over_tokens_would_be_wrong() -> None:
    """The mean-pooled case above fails if tokens are not weighted: the weights are there and are not all one."""
    graph = architecture("mean-pooled vit")[0]
    after, _ = run(graph, r=(5, 0, 0))
    means = [n for n in after.find(torch.ops.aten.mean.dim) if 1 in n.args[1] and n.meta["val"].dim() == 2]  # type: ignore[operator]
    assert len(means) == 1
    x: Any = means[0].args[0]
    while x.target is torch.ops.aten.mul.Tensor and not isinstance(x.args[1], torch.fx.Node):
        x = x.args[0]
    assert x.target is torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("variant", ["tofu", "pitome", "kth", "random"])
def test_every_variant_gives_the_schedule_it_was_asked_for(variant: str) -> None:
    torch.manual_seed(0)
    graph = architecture("vit")[0]
    after, context = run(graph, r=(4, 3, 2), variant=variant)
    assert len(context.applied) == 3
    assert [int(n.meta["val"].shape[2]) for n in after.find(ours.attention.default)] == [17, 13, 10]
    flat = (torch.randn(2, 3, 64, 64, dtype=torch.float64),)
    assert all(v.isfinite().all() for v in after.run(flat))
    assert worst(graph.run(flat), after.run(flat)) > 1e-6


def test_dropping_keeps_no_sizes() -> None:
    graph = architecture("vit")[0]
    after, _ = run(graph, r=4, rule="drop")
    assert not after.find(ours.token_merge.default)
    assert [int(n.meta["val"].shape[2]) for n in after.find(ours.attention.default)] == [17, 13, 9]
    assert all(n.kwargs.get("sizes") is None for n in after.find(ours.attention.default))


def test_without_proportional_attention_sizes_only_weigh_merges_and_means() -> None:
    graph = architecture("mean-pooled vit")[0]
    after, _ = run(graph, r=4, proportional=False)
    assert all(n.kwargs.get("sizes") is None for n in after.find(ours.attention.default))
    assert [n.args[4] is not None for n in after.find(ours.token_merge.default)] == [False, True, True]


# -- refusals -----------------------------------------------------------------------------------------------------------


def declined(graph: Graph, **options: Any) -> str:
    """Why the pass left a graph alone."""
    after, context = run(graph, **options)
    assert not context.applied
    assert after.fx.graph_copy is not None
    return " / ".join(d.why for d in context.declined)


def test_a_causal_model_is_refused() -> None:
    import transformers

    model = transformers.LlamaModel(
        transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    )
    model.config.use_cache = False
    graph = rw.capture(model.eval(), (), {"input_ids": torch.randint(50, (2, 12))}, dynamic_shapes={"input_ids": {0: "batch"}})
    assert "is causal" in declined(graph, r=2)


def test_a_dynamic_number_of_tokens_is_refused() -> None:
    assert "the number of tokens is dynamic" in declined(zoo("minilm"), r=2)


def test_a_causal_layer_behind_bidirectional_ones_is_refused() -> None:
    class Layer(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.norm, self.qkv, self.out, self.causal = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16), causal

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return x + self.out(y.transpose(1, 2).flatten(2))

    model = nn.Sequential(Layer(False), Layer(True)).eval()
    graph = rw.capture(model, (torch.randn(2, 12, 16),), dynamic_shapes={"input": {0: "batch"}})
    assert declined(graph, r=2).count("is causal") == 2


def test_a_bias_between_places_is_refused() -> None:
    from transformers import BeitConfig, BeitModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BeitModel(BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, **sizes))
    assert "adds a bias for every pair of places" in declined(rw.capture(model.eval(), (torch.randn(2, 3, 32, 32),)), r=2)


def test_windows_of_an_image_are_refused() -> None:
    why = declined(rw.capture(_swin().eval(), (torch.randn(2, 3, 32, 32),)), r=2)
    assert "not in [batch, tokens, channels]" in why


def _swin() -> nn.Module:
    from rewright.tools.torchvision_stand_in import torchvision_stand_in

    with torchvision_stand_in():
        timm = pytest.importorskip("timm")
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=32, window_size=4, depths=(2, 2), embed_dim=16, num_heads=(2, 4))


def test_learned_tokens_behind_the_others_are_refused() -> None:
    from transformers import YolosConfig, YolosModel

    model = YolosModel(
        YolosConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[32, 32], num_detection_tokens=5)
    )
    assert "learned tokens behind the others" in declined(rw.capture(model.eval(), (torch.randn(2, 3, 32, 32),)), r=1)


def test_dense_outputs_are_refused_where_copies_are_not_wanted() -> None:
    graph = architecture("dense head")[0]
    assert "needs all tokens again" in declined(graph, r=2, unmerge="never")


def test_dropped_tokens_cannot_be_copied_back() -> None:
    graph = architecture("dense head")[0]
    assert "can't be copied back" in declined(graph, r=2, rule="drop")


def test_a_slower_result_is_refused_with_its_figures() -> None:
    graph = architecture("vit")[0]
    context = Context(target=type("T", (), {"name": "a target"}), predict=lambda g: float(len(g.nodes)))
    after = TokenMerging(r=1, min_agreement=0).run(graph, context)
    assert not context.applied
    assert "predicted" in context.declined[0].why
    assert "a target" in context.declined[0].why
    assert not after.find(ours.token_match.default)


def test_one_token_less_a_layer_is_refused_by_the_cost_model_and_many_are_not() -> None:
    """Measured in onnxruntime, one image: 7 % slower with one token less behind each of the six layers, 2 % faster with five."""
    loaded = load_model("zoo:digits-vit")
    few, many = (rw.optimize(loaded, recipe=[TokenMerging(r=r, min_agreement=0.0)], target="cpu", verify=False).records[-1] for r in (1, 8))
    assert not few.applied
    assert "us with merging against" in few.declined[0].why
    assert many.applied == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [({"variant": "tomato"}, "variant"), ({"ratio": 0.5}, "at least 1"), ({"share": 1.0}, "share"), ({"layers": (0,), "depths": (0.5,)}, "not both")],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TokenMerging(**options)


# -- on a real model ------------------------------------------------------------------------------------------------------


def test_too_many_merged_tokens_are_made_fewer_by_the_agreement_asked_for() -> None:
    loaded = load_model("zoo:digits-vit")
    options = {"where": "in-block", "share": 0.7, "require_faster": False}
    free, held = (rw.optimize(loaded, recipe=[TokenMerging(min_agreement=a, **options)], verify=False) for a in (0.0, 0.99))
    merged = [sum(n.args[1] for n in r.graph.find(ours.token_match.default)) for r in (free, held)]
    assert 0 < merged[1] < merged[0]
    assert any("min_agreement" in note for note in held.graph.notes)


def test_half_the_flops_of_the_digits_model_cost_no_accuracy_to_speak_of() -> None:
    loaded = load_model("zoo:digits-vit")
    result = rw.optimize(loaded, recipe=[TokenMerging(ratio=2.0)], verify=False)
    scores = {s.name: s.value for s in load_zoo("digits-vit").judge(runner_of(result.module), 599)}
    assert scores["agreement"] > 0.98
    assert cost(loaded.graph).flops / cost(result.graph).flops > 1.95


def test_merging_places_are_behind_norms_in_post_norm_models() -> None:
    graph = architecture("padded text")[0]
    assert [p.value.target for p in places_of(TokenMerging(r=1), graph, Context())] == [torch.ops.aten.layer_norm.default] * 3
