"""shift-linear: fitted scales and codes, what it declines, what it says of time, trained and frozen forms, company of other passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx.session import Session
from rewright.backends.target import Target
from rewright.ir.capture import capture as capture_meta
from rewright.ir.errors import RecipeError
from rewright.ir.pot import unpack_codes
from rewright.passes.outliers.outlier_migration import OutlierMigration
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.quantization.mixed_precision import MixedPrecision
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.rewrite import Pass
from rewright.passes.shiftadd.freeze_shift import FreezeShift
from rewright.passes.shiftadd.shift_codes import fitted_scales, power_terms, shift_tensors
from rewright.passes.shiftadd.shift_linear import ShiftLinear
from rewright.passes.statistics import Calibration
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture, load, optimize, predicted_seconds
from rewright.tools.trainable import with_own_weights

from ...backends.test_onnx_quantized import kinds, optimized
from ..encoder import encoder, example

torch.set_num_threads(1)
ours = torch.ops.rewright


def value(made: dict[str, Tensor], width: int) -> Tensor:
    """What codes and scales stand for."""
    return (unpack_codes(made["w"], width).float() * made["scale"][..., None]).sum(0)


def snr(w: Tensor, q: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(w.square().sum() / (w - q).square().sum()))


def run(steps: list[Pass], module: nn.Module, inputs: Any, target: str | None = None, **options: Any) -> Outcome:
    graph = capture(module, *((), inputs) if isinstance(inputs, dict) else (inputs,))
    flat = as_flat(graph, inputs)
    machine = Target.load(target) if target else None
    predict = (lambda g: predicted_seconds(g, machine)) if machine else None
    return Pipeline(steps, machine, predict=predict, calibration=Calibration([flat]), **options).run(graph, [flat])


def mlp(width: int = 64, hidden: int = 256) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)), (torch.randn(128, width) * torch.linspace(0.1, 3, width),)


# -- codes and scales -------------------------------------------------------------------------------------------------


def weights(kind: str) -> Tensor:
    torch.manual_seed(0)
    if kind == "student":
        return torch.distributions.StudentT(4.0).sample((512, 1024))
    w = torch.randn(512, 1024)
    if kind == "outliers":
        w[:, torch.randperm(1024)[:10]] *= 20
    return w


@pytest.mark.parametrize(
    ("kind", "levels", "terms", "spec", "measured"),
    [
        ("gauss", 7, 1, 14.1, 14.45),
        ("gauss", 15, 1, 14.2, 14.45),
        ("gauss", 7, 2, 28.6, 30.15),
        ("student", 7, 1, 14.4, 14.70),
        ("student", 15, 1, 14.4, 14.72),
        ("student", 7, 2, 29.0, 30.38),
        ("outliers", 7, 1, 15.9, 16.05),
        ("outliers", 15, 1, 16.3, 16.53),
        ("outliers", 7, 2, 32.1, 32.42),
    ],
)
def test_the_signal_to_noise_is_the_specifications_or_better(kind: str, levels: int, terms: int, spec: float, measured: float) -> None:
    """specs/quant_shiftadd.md 1, 512 x 1024."""
    w = weights(kind)
    if levels == 7:
        found = snr(w, value(shift_tensors(w, terms), 1024))
    else:
        scale = fitted_scales(w, terms, levels=levels)
        found = snr(w, (power_terms(w, scale, levels) * scale[..., None]).sum(0))
    assert found > spec - 0.3 and found == pytest.approx(measured, abs=0.1)


@pytest.mark.parametrize("terms", [1, 2])
def test_rows_of_powers_of_two_are_kept_exactly(terms: int) -> None:
    """A scale of the grid that is not the first, a row of zeros, and nothing left for a second term."""
    c = 2.0 ** torch.randint(0, 7, (8, 32)) * torch.randint(0, 2, (8, 32)).mul(2).sub(1)
    c[:, 0], c[3] = 64, 0
    w = c * torch.linspace(0.5, 2, 8)[:, None]
    made = shift_tensors(w, terms)
    torch.testing.assert_close(value(made, 32), w, rtol=1e-6, atol=0)
    assert (made["scale"] > 0).all()


@pytest.mark.parametrize("terms", [1, 2])
def test_least_squares_never_raises_the_error_of_a_row(terms: int) -> None:
    w, importance = torch.randn(64, 96) ** 3, torch.rand(96) ** 4
    for weigh in (None, importance):
        scale = fitted_scales(w, terms, weigh)
        before = (w - (power_terms(w, scale) * scale[..., None]).sum(0)).square()
        after = (w - value(shift_tensors(w, terms, weigh), 96)).square()
        sums = [e.sum(1) if weigh is None else e @ weigh for e in (before, after)]
        assert (sums[1] <= sums[0] * (1 + 1e-5)).all() and (sums[1] < sums[0] * 0.999).any()


def test_importance_lowers_the_error_of_the_outputs() -> None:
    w, x = torch.randn(64, 96), torch.randn(500, 96) * torch.logspace(-1, 1, 96)
    importance = x.square().mean(0)
    plain, weighed = (((w - value(shift_tensors(w, 1, i), 96)) @ x.T).square().mean() for i in (None, importance))
    assert weighed < 0.97 * plain


@pytest.mark.parametrize("terms", [1, 2])
def test_gptq_lowers_the_error_under_the_gram(terms: int) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(48, 96), torch.randn(500, 12) @ torch.randn(12, 96) + 0.3 * torch.randn(500, 96)
    gram = (x.T @ x / len(x)).double()
    errors = []
    for g in (None, gram):
        rest = (w - value(shift_tensors(w, terms, None if g is not None else gram.diagonal().float(), g), 96)).double()
        errors.append(float((rest @ gram * rest).sum()))
    assert errors[1] < 0.7 * errors[0]


# -- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["int8-dynamic", "int8-token", "none"])
@pytest.mark.parametrize("terms", [1, 2])
def test_a_linear_becomes_its_op_and_4_bits_a_term(activations: Any, terms: int) -> None:
    module, inputs = mlp()
    outcome = run([ShiftLinear(terms=terms, activations=activations)], module, inputs)
    assert [n.target for n in outcome.graph.nodes if n.target is not torch.ops.aten.gelu.default] == [ours.shift_linear.default] * 2
    assert outcome.graph.weight_bytes() == 2 * 64 * 256 * terms // 2 + 4 * (terms + 1) * (256 + 64)
    assert outcome.total is not None and outcome.total.cosine > (0.96 if terms == 1 else 0.999)


def test_scope_takes_the_feed_forward_linears_alone() -> None:
    outcome = run([ShiftLinear(scope="ffn", min_weights=1)], encoder(), example())
    record = outcome.records[-1]
    assert record.applied == 4 and not record.declined
    assert len(outcome.graph.find(torch.ops.aten.linear.default)) == 8


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_weights": 10**6}, "its 16,384 weights are fewer than min_weights = 1,000,000"),
        ({"skip": ("0", "2")}, "skip names 0"),
        ({"only": ("1",)}, "it is not within only = 1"),
    ],
)
def test_declines_in_words(options: dict[str, Any], why: str) -> None:
    outcome = run([ShiftLinear(**options)], *mlp())
    assert why in [d.why for d in outcome.records[-1].declined] and not outcome.records[-1].applied
    assert not any(note.startswith("shift-linear") for note in outcome.graph.notes)


def test_declines_a_tied_weight_and_copies_it_when_asked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.table(ids), self.table.weight)

    ids = (torch.arange(8).view(2, 4),)
    assert "is also read by embedding" in run([ShiftLinear()], Tied(), ids).records[-1].declined[0].why
    for train in ("none", "q"):
        outcome = run([ShiftLinear(tied="copy", train=train), FreezeShift()], Tied(), ids)
        assert [r.applied for r in outcome.records[-2:]] == [1, int(train == "q")]
        assert any("has quantized codes of its own" in note for note in outcome.graph.notes)
    trained = run([ShiftLinear(tied="copy", train="q")], Tied(), ids).graph
    q = trained.find(ours.shift_linear_q.default)[0]
    assert trained.weight(q.args[1]) is not trained.weight("table.weight")  # type: ignore[arg-type]  # training one leaves the other


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"terms": 3}, "terms is 1 (4 bits a weight) or 2"),
        ({"train": "ps", "terms": 2}, 'train = "ps" has one term'),
        ({"train": "q", "affine_correction": True}, "corrects finished codes"),
        ({"train": "q", "algorithm": "gptq"}, "gptq would be lost"),
        ({"algorithm": "gptq", "calibrated": False}, "gptq reads the inputs' Gram"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        ShiftLinear(**options)


def test_quantize_linear_sends_powers_of_two_to_this_pass() -> None:
    with pytest.raises(RecipeError, match="pot4-channel are shift-linear's weights"):
        QuantizeLinear(weights="pot4-channel")  # type: ignore[arg-type]


def test_without_calibration_it_needs_no_data_and_all_channels_count_alike() -> None:
    module, inputs = mlp()
    graph = capture(module, inputs)
    outcome = Pipeline([ShiftLinear(calibrated=False)]).run(graph, [as_flat(graph, inputs)])
    held = outcome.graph.weights()
    assert torch.equal(held["0.weight_pot4"], shift_tensors(module[0].weight.detach())["w"])  # type: ignore[index]
    calibrated = run([ShiftLinear()], module, inputs).graph.weights()
    assert torch.equal(calibrated["0.weight_pot4"], shift_tensors(module[0].weight.detach(), 1, inputs[0].square().mean(0))["w"])  # type: ignore[index]
    assert not torch.equal(calibrated["0.weight_pot4"], held["0.weight_pot4"])


def test_affine_correction_lowers_the_error() -> None:
    module, inputs = mlp()
    want = module[0](*inputs)  # type: ignore[index]
    errors = [(run([ShiftLinear(affine_correction=a)], module[0], inputs).graph.module(*inputs) - want).square().mean() for a in (False, True)]  # type: ignore[index]
    assert errors[1] < 0.99 * errors[0]


def test_a_graph_without_data_gets_recipes_that_make_the_same_codes() -> None:
    module, inputs = mlp()
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    for step in (ShiftLinear(calibrated=False), ShiftLinear(calibrated=False, train="ps", terms=1)):
        steps: list[Pass] = [step, FreezeShift()]
        late = Pipeline(steps, verify=False).run(capture_meta(empty, tuple(x.to("meta") for x in inputs)))
        late.graph.materialize(dict(module.state_dict()))
        early = Pipeline(steps, verify=False).run(capture(module, inputs))
        assert torch.equal(late.graph.module(*inputs), early.graph.module(*inputs))


# -- what it says of time ---------------------------------------------------------------------------------------------


def test_the_result_says_that_it_is_not_faster_than_8_bit_integers() -> None:
    outcome = run([ShiftLinear()], *mlp(), target="cpu")
    (note,) = [n for n in outcome.graph.notes if n.startswith("shift-linear")]
    assert "32,768 weights of 4 bits; predicted" in note
    assert note.endswith("on cpu; no faster than int8 weights, which round less: against those the codes buy smaller weights and modelled energy, not time")


def test_where_it_is_not_faster_than_float_the_result_says_so() -> None:
    outcome = run([ShiftLinear(activations="none")], *mlp(), target="cpu")
    (note,) = [n for n in outcome.graph.notes if n.startswith("shift-linear")]
    assert note.endswith("not faster: onnxruntime and torch make float weights of the codes, which buy a smaller file and modelled energy, not time")


def test_without_8_bit_products_two_terms_are_not_faster_than_one_float_product() -> None:
    module, inputs = mlp()
    graph, machine = capture(module, inputs), Target.load("cpu")
    plain = dataclasses.replace(machine, peak={"fp32": machine.peak["fp32"]})
    outcome = Pipeline([ShiftLinear(terms=2, calibrated=False)], plain, predict=lambda g: predicted_seconds(g, plain)).run(graph, [as_flat(graph, inputs)])
    (note,) = [n for n in outcome.graph.notes if n.startswith("shift-linear")]
    assert "not faster: predicted" in note and note.endswith("smaller weights and additions for multiplications (modelled energy), not time")


def test_two_terms_are_said_to_be_slower_than_8_bit_integers() -> None:
    outcome = run([ShiftLinear(terms=2)], *mlp(), target="cpu")
    assert any("slower than int8 weights, which round less and take one product, not two" in n for n in outcome.graph.notes)


# -- trained and frozen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "terms"), [("q", 1), ("q", 2), ("ps", 1)])
def test_freezing_is_exact_and_gives_what_the_pass_gives_at_once(train: Any, terms: int) -> None:
    module, inputs = mlp()
    outcome = run([ShiftLinear(train=train, terms=terms), FreezeShift()], module, inputs)
    frozen = outcome.records[-1]
    assert frozen.applied == 2 and frozen.measured["step_error"] == 0.0
    at_once = run([ShiftLinear(terms=terms)], module, inputs)
    errors = [1 - o.total.cosine for o in (outcome, at_once)]  # type: ignore[union-attr]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)  # the scales are fitted anew behind the codes, and "q" rounds on those
    assert outcome.graph.weight_bytes() == at_once.graph.weight_bytes()
    assert outcome.graph.notes[-1].startswith("freeze-shift: 32,768 weights of 4 bits a term; no faster than int8 weights")
    floats = run([ShiftLinear(train=train, terms=terms, activations="none"), FreezeShift()], module, inputs)
    assert floats.graph.notes[-1].startswith("freeze-shift: 32,768 weights of 4 bits a term; not faster: onnxruntime and torch make float weights")


@pytest.mark.parametrize("train", ["q", "ps"])
def test_what_is_to_be_trained_has_parameters_with_gradients(train: Any) -> None:
    module, inputs = mlp()
    graph = run([ShiftLinear(train=train)], module, inputs).graph
    trained = dict(graph.module.named_parameters())
    expected = {"0.weight", "0.weight_largest"} if train == "q" else {"0.weight_shift", "0.weight_sign", "0.weight_largest"}
    assert expected <= set(trained)
    for p in trained.values():
        p.requires_grad_(True)
    graph.module(*inputs).square().mean().backward()
    assert all(trained[name].grad is not None and trained[name].grad.abs().max() > 0 for name in expected)  # type: ignore[union-attr]
    assert any("to be trained in float before freeze-shift" in n for n in graph.notes)


def test_exponents_start_at_the_codes_and_zeros_where_they_came_from() -> None:
    module, inputs = mlp()
    held = run([ShiftLinear(train="ps")], module, inputs).graph.weights()
    sign, shift = held["0.weight_sign"], held["0.weight_shift"]
    zero = sign == 0
    assert zero.any() and set(sign.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(shift[~zero], shift[~zero].round()) and (shift[zero] == 0).all()


def test_a_few_steps_of_training_lower_the_error() -> None:
    module, inputs = mlp()
    with torch.no_grad():
        want = module(*inputs)
    for train, rate, most in (("q", 3e-4, 0.5), ("ps", 2e-2, 0.7)):
        graph = with_own_weights(run([ShiftLinear(train=train)], module, inputs).graph)
        optimizer = torch.optim.Adam(graph.module.parameters(), rate)
        losses = []
        for _ in range(120):
            loss = (graph.module(*inputs) - want).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert min(losses[-5:]) < most * losses[0], (train, losses[0], losses[-5:])


# -- company ----------------------------------------------------------------------------------------------------------


def test_migration_before_it_is_exact_and_leaves_powers_of_two_to_fit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    with torch.no_grad():
        module[0].weight[:2] = 60  # type: ignore[index]
    x = (torch.randn(256, 64),)
    plain = run([ShiftLinear(activations="int8-dynamic")], module, x).total
    moved = run([OutlierMigration(weights="pot4-channel", pot_scales=True), ShiftLinear()], module, x)
    assert moved.records[-2].applied == 1 and moved.records[-2].measured["step_error"] < 1e-6 and moved.records[-1].applied == 2
    assert 1 - moved.total.cosine < 1.2 * (1 - plain.cosine)  # type: ignore[union-attr]


def test_mixed_precision_keeps_the_layer_that_suffers_most_at_8_bits() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    with torch.no_grad():
        module[2].weight.copy_(torch.eye(64) * 40 + torch.randn(64, 64))  # type: ignore[union-attr]
        module[0].weight.copy_(2.0 ** torch.randint(-6, 1, (64, 64)) * torch.randn(64, 64).sign())  # type: ignore[union-attr]
    steps: list[Pass] = [MixedPrecision(choices=("pot4-channel/int8-dynamic", "int8-channel/int8-dynamic"), budget_bits=5.6, drift="mse")]
    outcome = run(steps, module, (torch.randn(64, 64),))
    targets = [n.target for n in outcome.graph.nodes]
    assert targets[0] is ours.shift_linear.default  # powers of two already
    assert targets.count(ours.linear_int8_dynamic.default) == 1
    assert any("3 x pot4-channel/int8-dynamic, 1 x int8-channel/int8-dynamic" in n for n in outcome.graph.notes)


@pytest.mark.parametrize("activations", ["int8-dynamic", "int8-token", "none"])
@pytest.mark.parametrize("terms", [1, 2])
def test_a_file_has_4_bits_a_term_and_onnxruntime_runs_8_bit_products(activations: Any, terms: int, tmp_path: Path) -> None:
    module, inputs = mlp(128, 512)
    result = optimize(module, inputs, recipe=[ShiftLinear(terms=terms, activations=activations, calibrated=False)])
    for profile in ("ort", "pure"):
        exported = result.export(tmp_path / "m.onnx", profile)
        assert exported.parity is not None and exported.parity.cosine > 0.9999
        assert exported.bytes < 2 * 128 * 512 * terms / 2 + 4 * (terms + 1) * 640 + 9000
        ops = kinds(optimized(tmp_path / "m.onnx"))
        if activations == "none":
            assert ops["Gemm"] + ops["MatMul"] == 2
        else:
            assert ops["DynamicQuantizeMatMul"] + ops["MatMulIntegerToFloat"] == 2 and not ops["Gather"] and not ops["BitShift"]
        (found,) = Session(tmp_path / "m.onnx")(inputs)
        torch.testing.assert_close(torch.as_tensor(found), result.module(*inputs), rtol=1e-2, atol=2e-2)


def test_saved_results_come_back(tmp_path: Path) -> None:
    module, inputs = mlp()
    for train in ("none", "q", "ps"):
        result = optimize(module, inputs, recipe=[ShiftLinear(calibrated=False, train=train)])
        result.save(tmp_path / train)
        assert torch.equal(load(tmp_path / train).module(*inputs), result.module(*inputs))


def test_the_exported_trainable_form_is_right_too(tmp_path: Path) -> None:
    module, inputs = mlp()
    for train in ("q", "ps"):
        result = optimize(module, inputs, recipe=[ShiftLinear(calibrated=False, train=train)])
        assert result.export(tmp_path / "m.onnx").parity.cosine > 0.9999  # type: ignore[union-attr]
