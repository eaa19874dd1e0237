"""Quantized linears: every pair of formats, every algorithm in the graph, what is refused, gradients, the layers left out over a budget."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.blocks.describe import describe
from rewright.ir.blocks.edges import edges
from rewright.ir.errors import RecipeError, UsageError
from rewright.ir.formats import ACTIVATIONS, WEIGHTS, fake_quantize
from rewright.ir.graph import Graph
from rewright.passes.pipeline import Budget, Outcome, Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.quantization.scheme import OPS, Activations, Powers, Weights
from rewright.passes.statistics import Calibration
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example

PAIRS = [(op, *pair) for op, pairs in OPS.items() for pair in pairs if op != "shift_linear"]  # which is shift-linear's


def quantize(module: nn.Module, inputs: dict | tuple, calibrate: bool = False, **options: Any) -> Outcome:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    graph = capture(module, args, kwargs)
    budget, ignore = options.pop("budget", Budget()), options.pop("ignore", ())
    flat = as_flat(graph, inputs)
    return Pipeline([QuantizeLinear(**options)], budget=budget, ignore=ignore, calibration=Calibration([flat]) if calibrate else None).run(graph, [flat])


def linear(inputs: int = 96, outputs: int = 48, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A layer and an input of channels that differ in size."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator))
        if bias:
            layer.bias.copy_(30 * torch.randn(outputs, generator=generator))
    x = torch.randn(40, 8, generator=generator) @ torch.randn(8, inputs, generator=generator) + torch.randn(40, inputs, generator=generator)
    return layer, x * torch.exp(torch.randn(inputs, generator=generator))


# -- formats ----------------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_tables() -> None:
    assert (*get_args(Weights), *get_args(Powers)) == tuple(WEIGHTS)
    assert get_args(Activations) == tuple(ACTIVATIONS)


@pytest.mark.parametrize(("op", "weights", "activations"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_pair_becomes_its_op_and_computes_what_the_formats_say(op: str, weights: str, activations: str, bias: bool) -> None:
    layer, x = linear(bias=bias)
    outcome = quantize(layer, (x,), calibrate=True, weights=weights, activations=activations, group_size=32)
    assert outcome.records[-1].applied == 1, outcome.records[-1]
    assert [n.target for n in outcome.graph.nodes] == [getattr(torch.ops.rewright, op).default]
    w = fake_quantize(layer.weight.detach(), WEIGHTS[weights], 32)
    want = nn.functional.linear(fake_quantize(x, ACTIVATIONS[activations]), w, layer.bias)
    torch.testing.assert_close(outcome.graph.module(x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(("op", "weights", "activations"), [(op, *pairs[0]) for op, pairs in OPS.items() if op != "shift_linear"])
def test_quantized_linears_are_projections_of_the_same_blocks_and_no_pass_may_edit_them(op: str, weights: str, activations: str) -> None:
    before = capture(encoder(), (), example())
    outcome = quantize(encoder(), example(), calibrate=True, weights=weights, activations=activations, group_size=32, min_weights=1)
    assert outcome.records[-1].applied == 12
    assert describe(outcome.graph) == describe(before) != []
    found = edges(outcome.graph)
    assert len(found) == len(edges(before)) == 8
    assert all(f"is {op}, whose weights are not stored as a matrix of floats" in (edge.fixed or "") for edge in found)


@pytest.mark.parametrize(
    ("weights", "activations", "per_weight"),
    [
        ("int8-channel", "int8-dynamic", 8 + 32 / 96),
        ("int4-group", "none", 4 + 32 / 32 + 8 / 48),
        ("int8-group", "none", 8 + 1 + 8 / 32),
        ("fp8-channel", "fp8-token", 8 + 32 / 96),
    ],
)
def test_bytes_are_those_of_codes_and_scales(weights: str, activations: str, per_weight: float) -> None:
    layer, x = linear(bias=False)
    outcome = quantize(layer, (x,), weights=weights, activations=activations, group_size=32)
    assert outcome.graph.weight_bytes() == 48 * 96 * per_weight / 8


@pytest.mark.parametrize(("weights", "activations"), [("int8-group", "int8-dynamic"), ("int6-channel", "none"), ("fp8-channel", "int8-token")])
def test_a_pair_without_an_op_is_answered_with_those_there_are(weights: Any, activations: Any) -> None:
    with pytest.raises(RecipeError, match=f"{weights} weights with {activations} activations .* there are int8-channel/int8-dynamic, .*fp8-channel/fp8-token"):
        QuantizeLinear(weights=weights, activations=activations)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"range": "percentile:banana"}, 'no range named \'percentile:banana\'; there are "minmax", "mse" and "percentile:99.99"'),
        ({"group_size": 48}, "group_size must be a power of two from 16 on, got 48"),
        ({"clip": True, "algorithm": "hqq"}, "leave one of them out"),
        ({"damp": -1.0}, "damp must not be negative"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options: dict, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence.replace("(", r"\(")):
        QuantizeLinear(**options)


def test_groups_shrink_to_narrow_layers_and_a_short_last_one_is_filled_up() -> None:
    for inputs, group, groups in ((40, 32, 2), (300, 128, 3), (16, 16, 1)):
        layer, x = linear(inputs, 300)
        outcome = quantize(layer, (x,), weights="int4-group", activations="none")
        (node,) = outcome.graph.nodes
        assert node.args[-1] == group
        assert node.args[2].meta["val"].shape == (300, groups)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("weights", "activations"), [("int4-group", "none"), ("int8-channel", "int8-token"), ("fp8-channel", "fp8-token")])
def test_half_precision_layers_keep_their_dtype(dtype: torch.dtype, weights: str, activations: str) -> None:
    layer, x = linear()
    want = layer(x)
    outcome = quantize(layer.to(dtype), (x.to(dtype),), weights=weights, activations=activations, group_size=32)
    assert outcome.records[-1].applied == 1
    y = outcome.graph.module(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - want).norm() < 0.12 * want.norm()
    stored = {n.rpartition("_")[2]: t for n, t in outcome.graph.weights().items()}
    assert stored["scale"].dtype == dtype
    if weights == "int8-channel":  # codes are those of the scale as it is stored
        error = stored["int8"] * stored["scale"].float()[:, None] - layer.weight.float()
        assert (error.abs() <= stored["scale"].float()[:, None] * 0.501).all()


# -- algorithms in the graph ------------------------------------------------------------------------------------------


def output_error(**options: Any) -> float:
    layer, x = linear(256, 64)
    outcome = quantize(layer, (x,), calibrate=True, **{"weights": "int4-group", "activations": "none", "group_size": 64, **options})
    assert outcome.records[-1].undone is None
    want = layer(x)
    return ((outcome.graph.module(x) - want).norm() / want.norm()).item()


def test_data_lowers_the_error_of_the_layer() -> None:
    nearest = output_error()
    assert output_error(algorithm="gptq") < 0.8 * nearest
    assert output_error(algorithm="gptq", act_order=False) < 0.9 * nearest
    assert output_error(clip=True) < 0.97 * nearest
    assert output_error(clip=True, algorithm="gptq") < 0.8 * nearest


def test_hqq_moves_zero_points_between_codes_only_when_asked() -> None:
    layer, x = linear(256, 64)
    for real in (False, True):
        outcome = quantize(layer, (x,), weights="int4-group", activations="none", algorithm="hqq", real_zero_point=real)
        (zero,) = (t for n, t in outcome.graph.weights().items() if n.endswith("_zero_point"))
        assert zero.dtype == (torch.float32 if real else torch.uint8)


def test_gptq_falls_back_to_rounding_above_max_k_and_says_so() -> None:
    layer, x = linear(256, 64)
    outcome = quantize(layer, (x,), calibrate=True, weights="int4-group", activations="none", algorithm="gptq", max_k=128)
    plain = quantize(layer, (x,), weights="int4-group", activations="none")
    assert torch.equal(outcome.graph.module(x), plain.graph.module(x))
    assert outcome.graph.notes[-1].startswith("rounded to nearest instead of gptq, with more than max_k = 128 inputs: linear")


def test_dependent_inputs_without_damping_are_noted() -> None:
    layer, x = linear(256, 64)  # 40 rows
    outcome = quantize(layer, (x,), calibrate=True, weights="int4-group", activations="none", algorithm="gptq", damp=0.0)
    assert "its inputs are linearly dependent: damp = 0 was too little" in outcome.graph.notes[-1]


def test_without_calibration_one_sentence_says_what_is_needed() -> None:
    layer, x = linear()
    for options in ({"algorithm": "gptq"}, {"clip": True}, {"activations": "int8-static"}, {"affine_correction": True}):
        with pytest.raises(UsageError, match="^quantize-linear needs statistics .* and there is no calibration data"):
            quantize(layer, (x,), **options)
    assert quantize(layer, (x,), algorithm="hqq").records[-1].applied == 1  # needs none


def test_only_what_the_options_need_is_gathered() -> None:
    layer, x = linear()
    graph = capture(layer, (x,))
    kinds = {
        frozenset(): QuantizeLinear(),
        frozenset({"gram"}): QuantizeLinear(algorithm="gptq"),
        frozenset({"rows"}): QuantizeLinear(clip=True),
        frozenset({"min", "max"}): QuantizeLinear(activations="int8-static"),
        frozenset({"min", "max", "histogram"}): QuantizeLinear(activations="int8-static", range="mse"),
    }
    for expected, step in kinds.items():
        assert frozenset().union(*(r.kinds for r in step.requests(graph))) == step.requires == expected
    assert not QuantizeLinear(algorithm="gptq", max_k=95).requests(graph)
    assert not QuantizeLinear(algorithm="gptq", skip=("",), min_weights=1 << 20).requests(graph)


def test_affine_correction_lowers_the_error_and_makes_a_bias_where_there_is_none() -> None:
    for bias in (True, False):
        layer, x = linear(256, 64, bias)
        options = {"weights": "int4-group", "activations": "none", "group_size": 64}
        plain, corrected = (quantize(layer, (x,), calibrate=True, affine_correction=a, **options).graph for a in (False, True))
        want = layer(x)
        before, after = ((g.module(x) - want).square().sum(0) for g in (plain, corrected))
        assert (after <= before * 1.001).all()
        assert after.sum() < 0.98 * before.sum()
        assert len(corrected.weights()) == len(plain.weights()) + (not bias)


# -- static ranges ----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x))


def test_linears_that_share_their_input_share_its_range() -> None:
    outcome = quantize(Shared(), (torch.randn(6, 64),), calibrate=True, activations="int8-static")
    q, k, out = outcome.graph.find(torch.ops.rewright.linear_int8_static.default)
    assert q.args[1:3] == k.args[1:3]
    assert out.args[1] is not q.args[1]


def test_a_clipped_range_serves_data_with_few_large_values_better() -> None:
    layer, _ = linear(64, 64)
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 30
    errors = {}
    for how in ("minmax", "percentile:99.9", "mse"):
        y = quantize(layer, (x,), calibrate=True, activations="int8-static", range=how).graph.module(x)
        errors[how] = (y - layer(x))[1:].norm().item(), (y - layer(x)).norm().item()  # without the large value, and with it
    assert errors["percentile:99.9"][0] < 0.5 * errors["minmax"][0]
    assert errors["mse"][1] < 0.95 * min(errors["minmax"][1], errors["percentile:99.9"][1])


# -- what is refused --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.small = nn.Embedding(100, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        return nn.functional.linear(x, self.embed.weight), self.small(x)


IDS = torch.arange(6).view(2, 3)


def test_refuses_small_tied_and_half_precision_layers_in_words() -> None:
    outcome = quantize(Tied(), (IDS,))
    assert [d.why for d in outcome.records[-1].declined] == [
        'its weight embed.weight is also read by embedding; tied = "copy" gives it codes of its own',
        "its 512 weights are fewer than min_weights = 4,096",
    ]
    half = quantize(nn.Linear(64, 64).half(), (torch.randn(2, 64).half(),))
    assert half.records[-1].declined[0].why == "its weight is torch.float16; linear_int8_dynamic pays against float32"


def test_a_tied_weight_is_copied_when_asked_and_the_other_reader_keeps_its_own() -> None:
    model = Tied()
    outcome = quantize(model, (IDS,), tied="copy")
    assert outcome.records[-1].applied == 1
    assert torch.equal(outcome.graph.weight("embed.weight"), model.embed.weight)
    assert outcome.graph.weight("embed.weight_int8").dtype == torch.int8
    assert outcome.graph.notes[-1].endswith("has quantized codes of its own; embed.weight stays as it is for embedding")


def test_refuses_computed_weights_and_biases() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return nn.functional.linear(x, self.w * scale), nn.functional.linear(x, self.w, self.b * scale)

    outcome = quantize(Computed(), (torch.randn(2, 64), torch.ones(64)), min_weights=1, tied="copy")
    assert [d.why for d in outcome.records[-1].declined] == ["its weight is computed, not stored", "its bias is computed, not stored"]


def test_refuses_sums_that_could_overflow_32_bits() -> None:
    with torch.device("meta"):
        graph = capture(nn.Linear(70_000, 8), (torch.empty(2, 70_000),))
    for activations, why in (
        ("int8-dynamic", "the sum of its 70,000 products can overflow 32 bits; int8-channel/int8-dynamic is safe up to 66,311 inputs"),
        ("int8-token", None),
    ):
        record = Pipeline([QuantizeLinear(activations=activations)], verify=False).run(graph).records[-1]
        assert [d.why for d in record.declined] == ([why] if why else [])


def test_only_and_skip_choose_layers_by_path() -> None:
    outcome = quantize(
        encoder(), example(), only=("layers.0", "layers.1.up"), skip=("layers.0.q", "layers.0.k", "layers.1.u")
    )  # the last is no module, only how one begins
    assert outcome.records[-1].layers == ["layers.0.v", "layers.0.out", "layers.0.up", "layers.0.down", "layers.1.up"]
    whys = [d.why for d in outcome.records[-1].declined]
    assert whys.count("skip names layers.0.q") == whys.count("skip names layers.0.k") == 1
    assert whys.count("it is not within only = layers.0, layers.1.up") == 5


def test_ignored_modules_stay_as_they_are() -> None:
    outcome = quantize(encoder(), example(), ignore=("layers.0",))
    assert all(layer.startswith("layers.1") for layer in outcome.records[-1].layers)
    assert {d.why for d in outcome.records[-1].declined} == {"the user asked to leave layers.0 alone"}


# -- whole models -----------------------------------------------------------------------------------------------------


def test_every_linear_of_an_encoder_is_quantized_and_fine_tunes() -> None:
    for weights, activations in (("int8-channel", "int8-dynamic"), ("fp8-channel", "fp8-token")):
        outcome = quantize(encoder(layers=1), example(), calibrate=True, weights=weights, activations=activations)
        assert outcome.records[-1].applied == 6
        assert outcome.graph.weight_bytes() < 0.5 * outcome.original.weight_bytes()
        assert outcome.total is not None
        assert 0.99 < outcome.total.cosine < 1
        outcome.graph.module(**example()).sum().backward()
        assert all(p.grad is not None for p in outcome.graph.module.parameters())


@pytest.mark.parametrize("options", [{"algorithm": "gptq", "clip": True}, {"algorithm": "hqq", "real_zero_point": True}, {"affine_correction": True}])
def test_a_graph_without_data_is_quantized_to_the_same_bits_when_it_is_filled(options: dict) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).eval()

    inputs = (linear()[1],)
    full = capture(model(), inputs)
    with torch.device("meta"):
        meta = capture(model(), (torch.empty(40, 96),))
    weights = dict(full.weights())
    outcomes: list[Graph] = []
    for graph, store in ((full, None), (meta, weights)):
        calibration = Calibration([as_flat(graph, inputs)], weights=store)
        step = QuantizeLinear(weights="int4-group", activations="none", group_size=32, **options)
        outcomes.append(Pipeline([step], verify=False, calibration=calibration).run(graph).graph)
    assert outcomes[1].on_meta
    outcomes[1].materialize(weights)
    quantized = [n for n in outcomes[0].weights() if "_int4" in n]
    assert len(quantized) == 2
    for name in outcomes[0].weights():
        assert torch.equal(outcomes[0].weight(name), outcomes[1].weight(name)), name


def test_over_budget_the_most_harmful_layers_are_left_out() -> None:
    model = encoder()
    with torch.no_grad():
        model.layers[0].up.bias[0] += 50  # one hidden channel takes the whole shared range, and nothing reads it
        model.layers[0].down.weight[:, 0] = 0
    free = quantize(model, example())
    assert free.total is not None
    outcome = quantize(model, example(), budget=Budget(min_cosine=1 - (1 - free.total.cosine) / 3))
    record = outcome.records[-1]
    assert record.undone is None
    assert 0 < record.applied < 12
    assert "layers.0.down" not in record.layers
    assert any("left out" in d.why for d in record.declined)


def test_an_impossible_budget_undoes_the_pass_and_says_so() -> None:
    outcome = quantize(encoder(layers=1), example(), budget=Budget(min_cosine=1.0))
    assert outcome.records[-1].undone is not None
    assert "no subset" in outcome.records[-1].undone
    assert outcome.total is not None
    assert outcome.total.bit_equal
