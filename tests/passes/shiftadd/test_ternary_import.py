"""Ternary layers imported: every form training code and transformers have, equal in integers, what is refused and why."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks.describe import describe
from rewright.ir.blocks.edges import edges
from rewright.ir.formats import unpack
from rewright.ir.graph import Graph
from rewright.ir.verify import has_steps, local_error
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.shiftadd import ternary_import as module
from rewright.passes.shiftadd.ternary_import import TernaryImport
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example

torch.set_num_threads(1)
OPS = torch.ops.rewright


def imported(model: nn.Module, inputs: Any, verify: bool = True, **options: Any) -> Outcome:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    graph = capture(model.eval(), args, kwargs)
    return Pipeline([TernaryImport(**{"min_weights": 1, **options})], verify=verify).run(graph, [as_flat(graph, inputs)])


def why(outcome: Outcome) -> str:
    """The one reason given."""
    (declined,) = outcome.records[-1].declined
    assert outcome.records[-1].applied == 0
    return declined.why


def calls(graph: Graph) -> list:
    return graph.find(OPS.ternary_linear.default)


def codes(outcome: Outcome) -> tuple[Tensor, Tensor, str]:
    """The values -1, 0 and 1, the scale, and the activations of the one imported layer."""
    (call,) = calls(outcome.graph)
    x, packed, scale, _, activations = call.args
    return unpack(outcome.graph.weight(packed), 2, x.meta["val"].shape[-1]).long() - 1, outcome.graph.weight(scale).detach(), activations


def ternary_matrix(outputs: int, inputs: int, rows: bool = False) -> tuple[Tensor, Tensor]:
    """-1, 0 and 1, and the sizes that go with them."""
    torch.manual_seed(0)
    t = torch.randint(-1, 2, (outputs, inputs)).float()
    t[:, 0] = 1
    return t, torch.rand(outputs, 1) + 0.1 if rows else torch.tensor([[0.37]])


# -- the weight ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_weight_becomes_codes_and_a_scale_a_tensor_or_a_row(rows: bool, bias: bool, dtype: torch.dtype) -> None:
    t, g = ternary_matrix(9, 21, rows)
    layer = nn.Linear(21, 9, bias)
    layer.weight.data = t * g
    layer, x = layer.to(dtype), torch.randn(4, 21, dtype=dtype)
    outcome = imported(layer, (x,))
    found, scale, activations = codes(outcome)
    assert torch.equal(found, t.long())
    assert torch.equal(scale, g.to(dtype).float()[:, 0])
    assert activations == "none"
    assert [n.target for n in outcome.graph.nodes] == [OPS.ternary_linear.default]
    torch.testing.assert_close(outcome.graph.module(x), layer(x))


def test_a_row_of_zeros_and_a_matrix_of_signs_or_of_zeros_are_ternary_too() -> None:
    for t in (torch.tensor([[0.0, 0], [2, -2]]), torch.tensor([[3.0, -3], [-3, -3]]), torch.zeros(2, 2), torch.tensor([[0.0, 0], [2, 0], [0, 5]])):
        layer = nn.Linear(2, len(t), bias=False)
        layer.weight.data = t
        outcome = imported(layer, (torch.randn(3, 2),))
        found, scale, _ = codes(outcome)
        assert torch.equal(found * scale[:, None], t)
        assert len(scale) == (3 if len(t) == 3 else 1)
        assert (scale > 0).all()


class Quantized(nn.Linear):
    """Weights and inputs rounded at every call, as `form` does it."""

    def __init__(self, form: str, inputs: int = 40, outputs: int = 24, bias: bool = True, weight_form: str = "straight-through") -> None:
        super().__init__(inputs, outputs, bias)
        self.form, self.weight_form = form, weight_form

    def forward(self, x: Tensor) -> Tensor:
        g = self.weight.abs().mean().clamp(min=1e-5)
        w = torch.clamp(torch.round(self.weight / g), -1, 1) * g
        if self.weight_form == "straight-through":
            w = self.weight + (w - self.weight).detach()
        return F.linear(rounded(x, self.form), w, self.bias)


def rounded(x: Tensor, form: str) -> Tensor:
    least = 1e-4 if form == "another least value" else 1e-5
    axis = 0 if form == "another axis" else -1
    largest = x.abs().amax(axis, keepdim=True) if form == "amax" else x.abs().max(axis, keepdim=True).values
    s = 127 / largest.clamp(min=least)
    if form == "quotient":
        s = largest.clamp(min=least) / 127
        return (x / s).round().clamp(-128, 127) * s
    q = (x * s).round().clamp(-127 if form == "another range" else -128, 127) / s
    return {"none": x, "straight-through": x + (q - x).detach()}.get(form, q)


@pytest.mark.parametrize("outputs", [24, 9000])
@pytest.mark.parametrize("weight_form", ["plain", "straight-through"])
def test_a_weight_rounded_at_every_call_is_folded_or_computed_here(outputs: int, weight_form: str) -> None:
    torch.manual_seed(0)
    layer, x = Quantized("none", 40, outputs, weight_form=weight_form), torch.randn(5, 40)
    graph = capture(layer.eval(), (x,))
    (linear,) = graph.find(torch.ops.aten.linear.default)
    assert graph.is_weight(linear.args[1]) == (outputs == 24), "1.4 MB more than there were are more than fold-constants adds"
    outcome = imported(layer, (x,))
    found, scale, _ = codes(outcome)
    g = layer.weight.detach().abs().mean()
    assert torch.equal(found, (layer.weight.detach() / g).round().clamp(-1, 1).long())
    torch.testing.assert_close(scale, g[None])
    assert outcome.graph.weight_bytes() == outputs * 40 // 4 + 4 * (1 + outputs), "the float weight is gone"
    assert not [n for n in outcome.graph.nodes if n.target is torch.ops.aten.round.default]


def test_values_of_the_straight_through_form_may_differ_in_the_last_places() -> None:
    t, g = ternary_matrix(30, 50)
    layer = nn.Linear(50, 30)
    layer.weight.data = t * g * (1 + 4 * torch.finfo(torch.float32).eps * (torch.rand(30, 50) - 0.5))
    assert len(layer.weight.unique()) > 3
    assert torch.equal(codes(imported(layer, (torch.randn(2, 50),)))[0], t.long())
    layer.weight.data = t * g * (1 + 1e-4 * torch.rand(30, 50))
    assert "distinct values" in why(imported(layer, (torch.randn(2, 50),)))


# -- the input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "amax", "straight-through"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_of_bitnet_goes_into_the_op_with_the_same_integers(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = Quantized(form).to(dtype), torch.randn(2, 7, 40, dtype=dtype)
    x[0, 0], x[0, 1] = 0, 1e-7 * torch.randn(40)
    outcome = imported(layer, (x,))
    assert codes(outcome)[2] == "int8-token"
    assert [n.target for n in outcome.graph.nodes] == [OPS.ternary_linear.default]
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(outcome.graph.module(x), layer(x), rtol=limit, atol=limit)
    assert outcome.graph.notes == []


@pytest.mark.parametrize("form", ["quotient", "another least value", "another range", "another axis"])
def test_another_rounding_stays_and_is_said(form: str) -> None:
    torch.manual_seed(0)
    layer, x = Quantized(form).double(), torch.randn(6, 40, dtype=torch.float64)
    outcome = imported(nn.Sequential(layer), (x,))
    assert codes(outcome)[2] == "none"
    assert outcome.graph.notes == ["0: its input is rounded in another way than ternary_linear rounds a token, so the rounding stays a step of its own"]
    torch.testing.assert_close(outcome.graph.module(x), layer(x), rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    """Rounding around a product that constants scale afterwards."""

    def __init__(self, way: str, size: int = 1) -> None:
        super().__init__()
        self.way = way
        self.w = nn.Parameter(ternary_matrix(24, 40)[0])
        self.b = nn.Parameter(torch.randn(24)) if way == "bias" else None
        self.c = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        s = 127 / x.abs().max(-1, keepdim=True).values.clamp(min=1e-5)
        q = (x * s).round().clamp(-128, 127)
        if self.way == "integers":
            return F.linear(q.to(torch.int8).to(x.dtype), self.w) / (self.c * s)
        if self.way == "integers alone":
            return F.linear(q, self.w) / s
        y = F.linear(q / s, self.w, self.b)
        if self.way == "read twice":
            return y * self.c + y
        return y / self.c if self.way == "quotient" else self.c / y if self.way == "under" else y * self.c


@pytest.mark.parametrize(
    ("way", "size", "left"),
    [
        ("integers", 1, 0),
        ("integers", 24, 0),
        ("integers alone", 1, 0),
        ("product", 1, 0),
        ("product", 24, 0),
        ("quotient", 24, 0),
        ("bias", 1, 1),
        ("read twice", 1, 2),
        ("under", 24, 1),
    ],
)
def test_constants_behind_the_product_go_into_its_scale_where_nothing_stands_between(way: str, size: int, left: int) -> None:
    torch.manual_seed(0)
    layer, x = Scaled(way, size).double(), torch.randn(5, 40, dtype=torch.float64)
    outcome = imported(layer, (x,), verify=way != "under")  # which divides by sums of 0
    assert len(outcome.graph.nodes) == 1 + left
    found, scale, activations = codes(outcome)
    assert torch.equal(found, layer.w.long())
    assert activations == "int8-token"
    assert scale.dtype == torch.float64
    if way != "under":
        torch.testing.assert_close(outcome.graph.module(x), layer(x), rtol=1e-12, atol=1e-12)


def test_half_precision_is_rounded_as_the_model_does_it() -> None:
    class Half(nn.Linear):
        def __init__(self, wide: bool) -> None:
            super().__init__(40, 24, bias=False, dtype=torch.bfloat16)
            self.wide = wide
            self.weight.data = ternary_matrix(24, 40)[0].bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            f = x.float() if self.wide else x
            return F.linear(rounded(f, "plain").to(x.dtype), self.weight)

    x = torch.randn(6, 40).bfloat16()
    for wide, activations in ((True, "int8-token"), (False, "none")):
        layer = Half(wide)
        outcome = imported(layer, (x,))
        assert codes(outcome)[2] == activations, "ternary_linear's codes are those of float32"
        torch.testing.assert_close(outcome.graph.module(x), layer(x), rtol=0.02, atol=0.02)


# -- models -------------------------------------------------------------------------------------------------------------------

Storage = Literal["packed", "offline", "online"]


def bitnet(storage: Storage, norm: bool = False) -> nn.Module:
    """transformers' BitNet with random weights, as its quantizer stores them: packed bytes, ternary floats, or floats rounded at every call."""
    from transformers import BitNetForCausalLM
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, replace_with_bitnet_linear
    from transformers.models.bitnet.configuration_bitnet import BitNetConfig
    from transformers.utils.quantization_config import BitNetQuantConfig

    torch.manual_seed(0)
    config = BitNetConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = BitNetForCausalLM(config).eval()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    kind, mode = ("bitlinear" if storage == "packed" else "autobitlinear"), ("online" if storage == "online" else "offline")
    model = replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(linear_class=kind, quantization_mode=mode, use_rms_norm=norm))
    for name, layer in model.named_modules():
        if not isinstance(layer, BitLinear | AutoBitLinear):
            continue
        w = trained[f"{name}.weight"]
        g = w.abs().mean().clamp(min=1e-5)
        t = (w / g).round().clamp(-1, 1)
        layer.to_empty(device="cpu")
        if layer.rms_norm is not None:
            nn.init.uniform_(layer.rms_norm.weight, 0.5, 1.5)
        if isinstance(layer, BitLinear):
            layer.dtype = torch.float32
            layer.weight.copy_(pack_weights(t))
            layer.weight_scale.fill_(1 / g)
        else:
            layer.weight.data = w if storage == "online" else t
            if storage == "offline":
                layer.weight_scale.fill_(g)
    return model


@pytest.mark.parametrize(("storage", "norm"), [("packed", False), ("offline", False), ("online", False), ("packed", True)])
def test_every_linear_of_a_bitnet_is_imported_from_any_storage(storage: Storage, norm: bool) -> None:
    model = bitnet(storage, norm=norm)
    outcome = imported(model, {"input_ids": torch.randint(0, 60, (3, 17))}, min_weights=500)
    record = outcome.records[-1]
    assert record.undone is None
    assert [layer.rpartition(".")[2] for layer in record.layers] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [(d.layer, d.why) for d in record.declined] == [
        ("lm_head", "row 0 of its weight has 32 distinct values; ternary ones are at most three: -g, 0 and g")
    ]
    assert {call.args[4] for call in calls(outcome.graph)} == {"int8-token"}
    assert not [n for n in outcome.graph.nodes if n.target is torch.ops.aten.round.default]
    norms = outcome.graph.find(OPS.rms_norm.default)
    assert len(norms) == (7 if norm else 5), "norms stay; of the layers' own, those of one input share a part and stay in parts"
    read = [call.args[0] for call in calls(outcome.graph)]
    assert norm or read[0] is read[1] is read[2] and read[4] is read[5]
    assert outcome.graph.notes == []


def deep(layers: int, width: int) -> nn.Module:
    """Ternary layers in a row, a norm in front of each."""
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.RMSNorm(width, 1e-6), Quantized("plain", width, width))))


def test_ties_that_fall_to_the_other_side_later_do_not_undo_the_import_and_wrong_scales_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = deep(8, 96), (torch.randn(500, 96),)
    record = imported(model, inputs).records[-1]
    assert (record.applied, record.undone) == (8, None)
    assert record.measured["step_error"] > 1e-4, "a tie in front of so many layers"
    assert record.measured["local_error"] < 2e-6, "but every value is right given those before it"
    right = module.ternary
    monkeypatch.setattr(module, "ternary", lambda w: t if isinstance(t := right(w), str) else module.Ternary(t.packed, t.scale * 1.0001))
    record = imported(model, inputs).records[-1]
    assert record.applied == 0
    assert "promised exact, but the outputs moved" in (record.undone or "")


def test_the_error_of_a_value_given_those_before_it_does_not_grow_with_depth() -> None:
    layers, x = deep(4, 32), torch.randn(200, 32)
    graph = capture(layers.eval(), (x,))
    after = imported(layers, (x,)).graph
    assert has_steps(graph)
    assert local_error(graph, after, (x,)) < 2e-6
    assert local_error(graph, graph, (x,)) == 0
    assert not has_steps(capture(nn.Linear(3, 3), (torch.randn(2, 3),)))


def test_an_error_of_an_inner_value_counts_though_the_program_goes_on_from_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.ternary
    monkeypatch.setattr(module, "ternary", lambda w: t if isinstance(t := right(w), str) else module.Ternary(t.packed, t.scale * 1.0001))
    model, x = nn.Sequential(deep(1, 32), nn.ReLU(), nn.Softmax(-1)), torch.randn(20, 32)
    graph, after = capture(model.eval(), (x,)), imported(model, (x,), verify=False).graph
    assert 5e-5 < local_error(graph, after, (x,)) < 2e-4


def test_imported_linears_are_projections_of_the_same_blocks_and_no_pass_may_edit_them() -> None:
    torch.manual_seed(0)
    model = encoder()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = 0.1 * torch.randint(-1, 2, layer.weight.shape)
    before = capture(model.eval(), (), example())
    outcome = imported(model, example())
    assert outcome.records[-1].applied == 12
    assert describe(outcome.graph) == describe(before) != []
    found = edges(outcome.graph)
    assert len(found) == len(edges(before))
    assert all("is ternary_linear, whose weights are not stored as a matrix of floats" in (edge.fixed or "") for edge in found)


def test_bytes_are_two_bits_a_weight() -> None:
    t, g = ternary_matrix(64, 128)
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = t * g
    assert imported(layer, (torch.randn(2, 128),)).graph.weight_bytes() == 64 * 128 // 4 + 4


def test_an_imported_model_still_learns_its_scales() -> None:
    torch.manual_seed(0)
    layer, x = Quantized("straight-through"), torch.randn(30, 40)
    module = imported(layer, (x,)).graph.module
    target = 1.5 * layer(x).detach()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = F.mse_loss(module(x), target).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * before


# -- what is refused ------------------------------------------------------------------------------------------------------------


def test_it_never_makes_a_model_ternary_that_is_not() -> None:
    outcome = imported(encoder(), example())
    assert outcome.records[-1].applied == 0
    assert len(outcome.records[-1].declined) == 12
    assert {d.why.partition(" has ")[2] for d in outcome.records[-1].declined} >= {"64 distinct values; ternary ones are at most three: -g, 0 and g"}
    assert not calls(outcome.graph)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, 0, 2, 3], "row 1 of its weight has 4 distinct values; ternary ones are at most three: -g, 0 and g"),
        ([-1.0, 0, 2, 0], "row 1 of its weight holds -1, 0, 2, which are not -g, 0 and g"),
        ([1.0, 2, 1, 2], "row 1 of its weight holds 1, 2, which are not -g, 0 and g"),
        ([1.0, float("inf"), -1, 0], "row 1 of its weight has 4 distinct values; ternary ones are at most three: -g, 0 and g"),
        ([0.0, float("inf"), -float("inf"), 0], "row 1 of its weight holds -inf, 0, inf, which are not -g, 0 and g"),
        ([1.0, float("nan"), -1, 0], "row 1 of its weight has 4 distinct values; ternary ones are at most three: -g, 0 and g"),
    ],
)
def test_declines_other_values_and_says_which(values: list[float], sentence: str) -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.tensor([[1.0, -1, 0, 1], values])
    graph = capture(layer, (torch.randn(3, 4),))
    assert why(Pipeline([TernaryImport(min_weights=1)], verify=False).run(graph)) == sentence


def test_declines_a_weight_computed_from_activations() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w.sign())

    assert why(imported(Computed(), (torch.randn(3, 4), torch.randn(5, 4)))) == "its weight is computed from activations, not stored"


def test_declines_small_layers_and_weights_of_one_axis() -> None:
    layer = nn.Linear(4, 2)
    layer.weight.data = torch.ones(2, 4)
    assert why(imported(layer, (torch.randn(3, 4),), min_weights=9)) == "its 8 weights are fewer than min_weights = 9"

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    assert why(imported(Vector(), (torch.randn(3, 4),))) == "its weight has 1 axes, a matrix has 2"


def test_declines_a_graph_without_weights() -> None:
    with torch.device("meta"):
        graph = capture(nn.Linear(8, 16).eval(), (torch.empty(4, 8),))
    found = why(Pipeline([TernaryImport(min_weights=1)]).run(graph))
    assert found == "the graph has no weights, and only their values say whether they are ternary; Graph.materialize gives it some"


class Tied(nn.Module):
    """A table read by an embedding and, rounded or as it is, by a linear."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.table, self.computed = nn.Parameter(ternary_matrix(200, 64)[0] * (1 if not computed else torch.rand(200, 64) + 0.5)), computed

    def forward(self, ids: Tensor) -> Tensor:
        w = self.table
        if self.computed:
            w = torch.clamp(torch.round(w / w.abs().mean()), -1, 1) * w.abs().mean()
        return F.linear(F.embedding(ids, self.table), w)


@pytest.mark.parametrize("computed", [False, True])
def test_declines_tied_weights_unless_they_may_be_copied(computed: bool) -> None:
    inputs = (torch.randint(0, 200, (2, 3)),)
    if not computed:
        assert why(imported(Tied(False), inputs)) == 'its weight table is also read by embedding; tied = "copy" gives it codes of its own'
        outcome = imported(Tied(False), inputs, tied="copy")
        assert outcome.graph.notes == ["linear has ternary codes of its own; table stays as it is for embedding"]
        assert len(calls(outcome.graph)) == 1
        return
    outcome = imported(nn.Sequential(Tied(True)), inputs, tied="copy")  # folded: the table is read by the embedding alone
    assert (len(calls(outcome.graph)), outcome.graph.notes) == (1, [])


def test_a_matrix_too_large_to_fold_that_an_embedding_reads_too_is_tied() -> None:
    class Large(Tied):
        def __init__(self) -> None:
            super().__init__(True)
            self.table = nn.Parameter(torch.randn(6000, 64))

    inputs = (torch.randint(0, 200, (2, 3)),)
    assert why(imported(Large(), inputs)) == 'its weight table is also read by embedding; tied = "copy" gives it codes of its own'
    outcome = imported(Large(), inputs, tied="copy")
    assert outcome.graph.notes == ["linear has ternary codes of its own; table stays as it is for embedding"]
