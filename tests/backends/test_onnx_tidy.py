"""Tidied ONNX models: fewer nodes, the same results, each rule where it holds and not where it does not; faulty steps are left out and named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from rewright.backends.onnx import node_rules, tidy
from rewright.backends.onnx.agreement import agreement, difference, made_inputs, runnable, session
from rewright.tools.onnx_file import TidiedFile
from rewright.tools.optimize import optimize

HEADER = '<ir_version: 8, opset_import: ["": 18]>'
RNG = np.random.default_rng(0)


def model(body: str, **weights: np.ndarray) -> Any:
    """An onnx_ir model of ONNX's text form, its shapes inferred."""
    proto = onnx.parser.parse_model(f"{HEADER} agraph {body}")
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def ops(of: Any) -> list[str]:
    return [n.op_type for n in of.graph]


HEADS = "(float[2, 3, 5, 4] x) => (float[2, 3, 4, 5] y) { a = Reshape (x, s) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape (b, t) }"
QK = "(float[2, 5, 4] q, float[2, 4, 5] k) => (float[2, 5, 5] y) { a = Mul (q, s) b = Mul (k, t) y = MatMul (a, b) }"
LINEAR = "(float[2, 5, 4] x) => (float[2, 5, 3] y) { a = MatMul (x, w) b = Add (a, v) y = Mul (b, g) }"
THROUGH = (
    """(float[2, 6, 4] x) => (float[2, 3, 6] y) { a = MatMul (x, w) b = Add (a, v) c = Reshape (b, s) d = Transpose <perm = [0, 2, 1]> (c) y = Mul (d, g) }"""
)
CUT = """(float[3, 2, 4] x) => (float[2, 4] y, float[2, 4] z)
    { a = Slice (x, zero, one, zero) y = Squeeze (a, zero) b = Slice (x, one, two, zero) z = Squeeze (b, zero) }"""
SPLIT = "(float[2, 2, 4] x) => (float[2, 4] y, float[2, 4] z) { a, b = Split <axis = 1> (x, s) y = Squeeze (a, one) z = Squeeze (b, one) }"

APPLIED: dict[str, tuple[Any, Any, list[str]]] = {
    "merged heads": (node_rules.merge_transposed_heads, lambda: model(HEADS, s=ints(-1, 5, 4), t=ints(2, 3, 4, 5)), ["Transpose"]),
    "two transposes": (
        node_rules.merge_transposes,
        lambda: model("(float[2, 3, 4] x) => (float[4, 2, 3] y) { a = Transpose <perm = [2, 1, 0]> (x) y = Transpose <perm = [0, 2, 1]> (a) }"),
        ["Transpose"],
    ),
    "cuts of one": (node_rules.gather_single_parts, lambda: model(CUT, zero=ints(0), one=ints(1), two=ints(2)), ["Gather", "Gather"]),
    "parts of one": (node_rules.gather_single_parts, lambda: model(SPLIT, s=ints(1, 1), one=ints(1)), ["Gather", "Gather"]),
    "a reciprocal": (
        node_rules.divide,
        lambda: model("(float[4] x, float[4] z) => (float[4] y) { a = Exp (z) b = Reciprocal (a) y = Mul (b, x) }"),
        ["Exp", "Div"],
    ),
    "both sides scaled": (node_rules.scale_queries_only, lambda: model(QK, s=np.float32(0.5), t=np.float32(0.3)), ["Mul", "MatMul"]),
    "a scale a channel": (node_rules.scale_weights, lambda: model(LINEAR, w=floats(4, 3), v=floats(3), g=floats(3)), ["MatMul", "Add", "Identity"]),
    "a number through a transpose": (
        node_rules.scale_weights,
        lambda: model(THROUGH, w=floats(4, 3), v=floats(3), g=np.float32(0.7), s=ints(2, 6, 3)),
        ["MatMul", "Add", "Reshape", "Transpose", "Identity"],
    ),
}


@pytest.mark.parametrize("what", APPLIED)
def test_a_rule_rewrites_and_the_results_stay(what: str) -> None:
    rule, make, wanted = APPLIED[what]
    before = make()
    after = before.clone()
    assert rule(after) >= 1
    onnx_ir.passes.common.RemoveUnusedNodesPass()(after)
    assert ops(after) == wanted
    found = agreement(before, after)
    assert found.ran and found.why_not is None and found.error < 1e-6
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]


SHARED = "(float[2, 3, 5, 4] x) => (float[2, 3, 4, 5] y, float[6, 4, 5] b) { a = Reshape (x, s) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape (b, t) }"
LEFT: dict[str, tuple[Any, Any]] = {
    "heads that change places": (
        node_rules.merge_transposed_heads,
        lambda: model(HEADS.replace("[2, 3, 4, 5] y", "[3, 2, 4, 5] y"), s=ints(-1, 5, 4), t=ints(3, 2, 4, 5)),
    ),
    "merged heads read elsewhere": (node_rules.merge_transposed_heads, lambda: model(SHARED, s=ints(-1, 5, 4), t=ints(2, 3, 4, 5))),
    "parts of two": (
        node_rules.gather_single_parts,
        lambda: model("(float[4, 2] x) => (float[2, 2] y, float[2, 2] z) { a, b = Split <axis = 0> (x, s) y = Identity (a) z = Identity (b) }", s=ints(2, 2)),
    ),
    "a cut of two that is squeezed elsewhere": (
        node_rules.gather_single_parts,
        lambda: model("(float[3, 1, 4] x) => (float[2, 4] y) { a = Slice (x, zero, two, zero) y = Squeeze (a, one) }", zero=ints(0), one=ints(1), two=ints(2)),
    ),
    "a reciprocal that is read twice": (
        node_rules.divide,
        lambda: model("(float[4] x) => (float[4] y, float[4] z) { b = Reciprocal (x) y = Mul (b, x) z = Exp (b) }"),
    ),
    "scales that are channels": (node_rules.scale_queries_only, lambda: model(QK, s=floats(4), t=floats(4, 1))),
    "a scale along the rows": (node_rules.scale_weights, lambda: model(LINEAR.replace("[2, 5, 3]", "[2, 5, 5]"), w=floats(4, 5), v=floats(5), g=floats(5, 1))),
    "channels through a transpose": (node_rules.scale_weights, lambda: model(THROUGH, w=floats(4, 3), v=floats(3), g=floats(6), s=ints(2, 6, 3))),
    "channels that a transpose has moved": (
        node_rules.scale_weights,
        lambda: model(THROUGH.replace("[2, 3, 6]", "[2, 6, 6]"), w=floats(4, 6), v=floats(6), g=floats(6), s=ints(2, 6, 6)),
    ),
    "a product that is an output": (
        node_rules.scale_weights,
        lambda: model("(float[2, 4] x) => (float[2, 3] y, float[2, 3] a) { a = MatMul (x, w) y = Mul (a, g) }", w=floats(4, 3), g=floats(3)),
    ),
    "a scale that is an input": (
        node_rules.scale_weights,
        lambda: model("(float[2, 4] x, float[3] g) => (float[2, 3] y) { a = MatMul (x, w) y = Mul (a, g) }", w=floats(4, 3)),
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_a_rule_leaves_what_it_would_change(what: str) -> None:
    rule, make = LEFT[what]
    given = make()
    before = ops(given)
    assert rule(given) == 0 and ops(given) == before


NORMED = """(float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w, v) b = BatchNormalization (a, s, t, m, q) c = Identity (b) two = Constant <value_float = 2.0> () y = Mul (c, two) }"""


def normed() -> Any:
    return model(NORMED, w=floats(4, 3, 3, 3), v=floats(4), s=floats(4), t=floats(4), m=floats(4), q=np.abs(floats(4)) + 1)


def test_old_arithmetic_which_broadcasts_by_attributes_is_left() -> None:
    given = APPLIED["a reciprocal"][1]()
    given.opset_imports[""] = 6
    assert tidy._own_rules(given) == 0 and ops(given) == ["Exp", "Reciprocal", "Mul"]


def test_a_norm_goes_into_its_convolution_and_every_step_says_what_it_did() -> None:
    before = normed()
    done = tidy.tidy(before)
    assert (done.before, done.after, ops(done.model)) == (5, 2, ["Conv", "Mul"])
    assert done.why_not is None and done.agreement.ran and 0 < done.agreement.error < 1e-5
    steps = {s.name: s for s in done.steps}
    assert sum(s.nodes for s in done.steps) == -3 and steps["lift-constants"].nodes == -1 and not any(s.undone for s in done.steps)
    assert ops(before) == ["Conv", "BatchNormalization", "Identity", "Constant", "Mul"]  # the original is left as it was


def test_a_step_that_harms_is_left_out_and_named(monkeypatch) -> None:
    def harm(given: Any) -> int:
        for node in given.graph:
            if node.op_type == "Conv":
                node.inputs[1].const_value = onnx_ir.tensor(node.inputs[1].const_value.numpy() * 1.01)
                return 1
        return 0

    def fails(given: Any) -> int:
        raise ValueError("no such thing")

    kinds = (tidy.KINDS[0], tidy._Kind("harm", harm, again=False), tidy._Kind("fails", fails), *tidy.KINDS[1:])
    monkeypatch.setattr(tidy, "KINDS", kinds)
    done = tidy.tidy(normed())
    undone = {s.name: s.undone for s in done.steps if s.undone}
    assert set(undone) == {"harm", "fails"} and done.after == 2 and done.why_not is None
    assert "the output 'y' differs by" in str(undone["harm"]) and undone["fails"] == "fails raised ValueError: no such thing"


def test_a_model_that_would_grow_stays_as_it_is(monkeypatch) -> None:
    def grow(given: Any) -> int:
        node = next(iter(given.graph))
        for _ in range(9):
            given.graph.append(onnx_ir.node("Exp", [node.outputs[0]]))
        return 1

    monkeypatch.setattr(tidy, "KINDS", (tidy._Kind("grow", grow, again=False),))
    done = tidy.tidy(normed())
    assert (done.after, done.why_not) == (5, "it would have had 14 nodes in place of 5")


@pytest.mark.parametrize(("rows", "folded"), [(100, True), (10_000_000, False)])
def test_what_would_not_fit_the_budget_is_not_even_computed(monkeypatch, rows: int, folded: bool) -> None:
    """4 bytes x rows x 100: within a megabyte, and four gigabytes."""
    from onnxscript.optimizer import _constant_folding as folding

    computed, evaluate = [], folding._reference_evaluator.evaluate
    monkeypatch.setattr(folding._reference_evaluator, "evaluate", lambda d, op, *args, **kwargs: computed.append(op) or evaluate(d, op, *args, **kwargs))
    given = model("(float[1, 100] x) => (float[n, 100] y) { big = Tile (w, s) y = Add (big, x) }", w=floats(1, 100), s=ints(rows, 1))
    done, _ = tidy._take(given.clone(), tidy.KINDS)
    assert ops(done) == (["Add"] if folded else ["Tile", "Add"])
    assert ("Tile" in computed) == folded


def test_traces_of_the_exporting_machine_go_and_the_models_own_metadata_stays() -> None:
    given = normed()
    node = next(iter(given.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/someone/secret.py"
    node.metadata_props["mine"] = given.metadata_props["author"] = "me"
    given.producer_name, given.doc_string = "someone", "what it is for"
    done = tidy.tidy(given).model
    assert dict(done.graph[0].metadata_props) == {"mine": "me"}
    assert (done.metadata_props["author"], done.producer_name, done.doc_string) == ("me", "someone", "what it is for")


# -- comparing ----------------------------------------------------------------------------------------------------------


def test_outputs_are_compared_in_kind_shape_dtype_and_value() -> None:
    x = np.array([1.0, np.nan, np.inf], np.float32)
    assert difference(x, x.copy()) == 0
    assert difference(x, np.array([1.5, np.nan, np.inf], np.float32)) == 0.5
    for other in (x.astype(np.float64), x[None], np.array([1.0, np.nan, -np.inf], np.float32), np.array([1.0, 2.0, np.inf], np.float32), [x], None):
        assert difference(x, other) == np.inf
    assert difference(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert difference(np.array(["a"], object), np.array(["b"], object)) == np.inf
    assert difference([x, x], [x, x]) == 0 and difference([x], [x, x]) == np.inf
    assert difference(x, x + 1, same_numbers=False) == 0  # random numbers


def test_inputs_are_made_for_every_kind_and_at_batch_1() -> None:
    given = model("(float[batch, n] x, int64[batch] i, bool c, string[2] t) => (float[batch, n] y) { y = Identity (x) }")
    with runnable(given) as content:
        feeds = list(made_inputs(session(content).get_inputs()))
    assert [f["x"].shape for f in feeds] == [(2, 3), (1, 3)] and [f["i"].shape for f in feeds] == [(2,), (1,)]
    assert feeds[0]["c"].dtype == bool and feeds[0]["t"].tolist() == ["a", "a"]


def test_a_changed_signature_is_no_agreement() -> None:
    one, other = model("(float[4] x) => (float[4] y) { y = Exp (x) }"), model("(float[4] x) => (float[4] z) { z = Exp (x) }")
    assert agreement(one, other).why_not == "the outputs are no longer the same"
    assert agreement(one, model("(float[4] v) => (float[4] y) { y = Exp (v) }")).why_not == "the inputs are no longer the same"


# -- the recipe ---------------------------------------------------------------------------------------------------------


def saved(given: Any, path: Path, beside: bool = False) -> Path:
    onnx_ir.save(given, path, external_data="w.bin" if beside else None, size_threshold_bytes=0)
    return path


@pytest.mark.parametrize("beside", [False, True])
def test_the_recipe_takes_a_file_and_writes_one_with_its_names_opset_and_layout(tmp_path: Path, beside: bool) -> None:
    given = normed()
    given.metadata_props["author"] = "me"
    result = optimize(saved(given, tmp_path / "m.onnx", beside), recipe="clean-onnx")
    assert isinstance(result, TidiedFile)
    assert [r.name for r in result.records] == [k.name for k in tidy.KINDS] and sum(r.predicted["nodes"] for r in result.records) == -3
    done = result.export(tmp_path / "out.onnx")
    made = onnx.load(done.path, load_external_data=False)
    assert (done.nodes, done.opset, made.opset_import[0].version, made.producer_name) == (2, 18, 18, given.producer_name or "")
    assert {p.key: p.value for p in made.metadata_props} == {"author": "me"}
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in (*made.graph.input, *made.graph.output)] == ["n", "n"]
    assert (tmp_path / "out.onnx.data").exists() == beside == any(t.data_location for t in made.graph.initializer)
    assert agreement(None, None, tmp_path / "m.onnx", tmp_path / "out.onnx").why_not is None


def test_a_file_in_which_nothing_applies_comes_back_and_the_result_says_so(tmp_path: Path) -> None:
    result = optimize(saved(model("(float[n] x) => (float[n] y) { y = Exp (x) }"), tmp_path / "m.onnx"), recipe="clean-onnx")
    assert result.notes == ["nothing applied: the nodes are as they were"]  # type: ignore[attr-defined]
    assert result.verification == {"inputs": 2, "relative_error": 0.0, "bit_equal": True}
    result.export(tmp_path / "out.onnx")
    assert Counter(n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node) == {"Exp": 1}


def test_the_graph_is_there_for_those_who_ask(tmp_path: Path) -> None:
    result = optimize(saved(normed(), tmp_path / "m.onnx"), recipe="clean-onnx")
    assert [str(n.target) for n in result.graph.nodes][:1] == ["aten.conv2d.default"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 6), nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x) * self.scale)


def test_what_is_exported_of_a_module_is_tidied_too(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    plain = optimize(Scaled(), x, recipe=[]).export(tmp_path / "plain.onnx")
    done = optimize(Scaled(), x, recipe="clean-onnx").export(tmp_path / "out.onnx")
    assert "Mul" in ops(onnx_ir.load(plain.path)) and ops(onnx_ir.load(done.path)) == ["MatMul", "Add", "Relu"]
    assert done.parity is not None and done.parity.relative_error < 1e-5 and done.nodes == 3
