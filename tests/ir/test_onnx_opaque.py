"""What we have no meaning of stays what it is: run by onnxruntime, seen by no pass, written back verbatim; only tensors cross its edge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import rewright as rw
from rewright.backends.onnx.export import export
from rewright.ir.errors import CaptureError, InputFileError, UsageError
from rewright.ir.graph import Graph
from rewright.ir.onnx_import import import_onnx
from rewright.ir.ops import onnx_node

HEADER = '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1, "ai.onnx.ml": 3]>'
LOOP = """(float[n, 4] x) => (float[n, 4] y) <int64 count = {3}> { a = Relu (x) y = Sigmoid (b)
    b = Loop (count, , a) <body = b (int64 i, bool c, float[n, 4] h) => (bool again, float[n, 4] next) { again = Identity (c) next = Add (h, x) }> }"""
BRANCH = """(float[n] x, bool c) => (float[n] y) { z = Exp (x)
    y = If (c) <then_branch = t () => (float[n] a) { a = Relu (z) }, else_branch = e () => (float[n] b) { b = Neg (z) }> }"""
SEQUENCE = """(float[n, 4] x) => (float[n, 4] y) <int64 one = {1}, int64 zero = {0}> { a = Relu (x) s = SequenceConstruct (a, x) t = Exp (x)
    u = SequenceInsert (s, t) p = SequenceAt (u, one) q = SequenceAt (u, zero) y = Add (p, q) }"""
LATE = """(float[n, 4] x) => (float[n, 4] y) <int64 zero = {0}> { s = SequenceConstruct (x, x) p = SequenceAt (s, zero) e = Exp (p)
    u = SequenceInsert (s, e) q = SequenceAt (u, zero) y = Add (q, e) }"""
STRINGS = "(float[n] x) => (float[n] y) <float one = {1.0}> { s = Cast <to = 8> (x) t = Cast <to = 1> (s) y = Add (t, one) }"
LSTM = "(float[t, b, 3] x, float[1, 8, 3] w, float[1, 8, 2] r) => (float[t, 1, b, 2] y) { z = Relu (x) y = LSTM <hidden_size = 2> (z, w, r) }"
ML = '(float[n, 2] x) => (float[n, 2] y) { z = Relu (x) y = ai.onnx.ml.Normalizer <norm = "L2"> (z) }'
FOUND = "(float[n, 4] x) => (int64[2, k] y) { a = Relu (x) b = NonZero (a) y = Add (b, b) }"
TWICE = """(float[n, 4] x) => (float[n, 4] y) { a = Relu (x) y = Add (b, c)
    b = ai.onnx.ml.Scaler <offset = [0.5], scale = [2.0]> (a) c = ai.onnx.ml.Scaler <offset = [0.5], scale = [2.0]> (a) }"""

# body -> the sizes of its inputs, the nodes that stay
KEPT: dict[str, tuple[str, Sequence[tuple[int, ...]], list[str]]] = {
    "a loop": (LOOP, [(3, 4)], ["Loop"]),
    "a branch on data": (BRANCH, [(3,), ()], ["If"]),
    "a sequence": (SEQUENCE, [(3, 4)], ["SequenceConstruct", "SequenceInsert", "SequenceAt", "SequenceAt"]),
    "a sequence around other nodes": (LATE, [(3, 4)], ["SequenceConstruct", "SequenceAt", "Exp", "SequenceInsert", "SequenceAt"]),
    "strings": (STRINGS, [(3,)], ["Cast", "Cast"]),
    "a recurrent net": (LSTM, [(5, 2, 3), (1, 8, 3), (1, 8, 2)], ["LSTM"]),
    "another domain": (ML, [(3, 2)], ["Normalizer"]),
    "a length that data tell": (FOUND, [(3, 4)], ["NonZero"]),
    "the same twice": (TWICE, [(3, 4)], ["Scaler", "Scaler"]),
}


def written(path: Path, body: str, header: str = HEADER, **weights: np.ndarray) -> Path:
    model = onnx.parser.parse_model(f"{header} agraph {body}")
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in weights.items())
    onnx.save(model, path)
    return path


def given(sizes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(s) if s else torch.tensor(True) for s in sizes)


def in_onnxruntime(path: Path, flat: Sequence[Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), flat)})  # type: ignore[return-value]


def left(graph: Graph) -> list[str]:
    """The nodes inside the graph's opaque ones."""
    return [n.op_type for call in graph.find(torch.ops.rewright.onnx_node.default) for n in onnx_node.decoded(call.args[1]).graph.node]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", KEPT)
def test_it_stays_gives_the_same_and_goes_back_into_the_file(tmp_path: Path, what: str) -> None:
    body, sizes, nodes = KEPT[what]
    path = written(tmp_path / "m.onnx", body)
    graph = import_onnx(path)
    assert left(graph) == nodes
    assert any(note.startswith(f"{len(nodes)} nodes stay as they are and run in onnxruntime") for note in graph.notes)
    for flat in (given(sizes), given([(7, *s[1:]) if len(s) == 2 else s for s in sizes])):
        wanted = in_onnxruntime(path, flat)
        assert all(np.allclose(a.numpy(), b, 1e-5, 1e-6) and a.numpy().dtype == b.dtype for a, b in zip(graph.run(flat), wanted))
    done = export(graph, tmp_path / "out.onnx", [given(sizes)], opset=18)
    made, old = onnx.load(done.path), onnx.load(path)
    assert counted(made) == counted(old)
    for name in set(nodes):
        assert [n.attribute for n in nodes_of(made, name) if not n.attribute or not n.attribute[0].HasField("g")] == [
            n.attribute for n in nodes_of(old, name) if not n.attribute or not n.attribute[0].HasField("g")
        ]
    assert not [o.domain for o in made.opset_import if o.domain.startswith("rewright")] and not made.functions
    assert all(np.allclose(a, b, 1e-5, 1e-6) for a, b in zip(in_onnxruntime(done.path, given(sizes)), in_onnxruntime(path, given(sizes))))


def counted(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def nodes_of(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == name]


def test_passes_work_around_it_and_neither_merge_nor_compute_it(tmp_path: Path) -> None:
    """A linear layer before and one behind two recurrent nets that are equal; a third reads weights alone."""
    body = """(float[t, b, 4] x) => (float[t, b, 4] y, float[2, 1, 1, 4] s) { a = MatMul (x, w) f, f1, f2 = LSTM <hidden_size = 4> (a, p, r)
        g, g1, g2 = LSTM <hidden_size = 4> (a, p, r) d = Add (f, g) e = Squeeze (d, one) y = MatMul (e, w) s = LSTM <hidden_size = 4> (v, p, r) }"""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in {"w": (4, 4), "p": (1, 16, 4), "r": (1, 16, 4), "v": (2, 1, 4)}.items()}
    path = written(tmp_path / "m.onnx", body, **weights, one=np.array([1]))
    flat = given([(5, 2, 4)])
    result = rw.optimize(path, {"x": flat[0]}, recipe=[rw.passes.QuantizeLinear(min_weights=1)])
    assert left(result.graph) == ["LSTM"] * 3 and not result.outcome.undone
    assert next(r.applied for r in result.records if r.name == "quantize-linear") == 2
    assert np.allclose(result.graph.run(flat)[0], in_onnxruntime(path, flat)[0], atol=0.05)
    result.export(tmp_path / "out.onnx")
    assert counted(onnx.load(tmp_path / "out.onnx"))["LSTM"] == 3


def test_a_saved_result_holds_it(tmp_path: Path) -> None:
    result = rw.optimize(written(tmp_path / "m.onnx", LOOP), {"x": torch.ones(2, 4)}, recipe="clean")
    result.save(tmp_path / "saved")
    assert torch.equal(rw.load(tmp_path / "saved").graph.run(given([(3, 4)]))[0], result.graph.run(given([(3, 4)]))[0])


def test_weights_of_some_size_stay_weights_and_numbers_go_inside(tmp_path: Path) -> None:
    w, r = np.ones((1, 128, 3), np.float32) * 0.1, np.ones((1, 128, 32), np.float32) * 0.01
    body = "(float[t, b, 3] x) => (float[t, 1, b, 32] y) { y = LSTM <hidden_size = 32> (x, w, r, v) }"
    graph = import_onnx(written(tmp_path / "m.onnx", body, w=w, r=r, v=np.zeros((1, 256), np.float32)))
    assert sorted(graph.weights()) == ["r"]  # 16 kB; w has 1.5 and v 1
    assert len(onnx_node.decoded(graph.find(torch.ops.rewright.onnx_node.default)[0].args[1]).graph.initializer) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [LOOP, LOOP.replace("next = Add (h, x)", "s = ReduceSum <axes = [1]> (h) next = Add (h, s)")])
def test_it_is_brought_to_another_opset(tmp_path: Path, body: str) -> None:
    """At 13 ReduceSum's axes became an input."""
    path = written(tmp_path / "m.onnx", body, '<ir_version: 8, opset_import: ["": 12]>')
    done = export(import_onnx(path), tmp_path / "out.onnx", [given([(3, 4)])], opset=18)
    assert done.opset == 18
    assert np.allclose(in_onnxruntime(done.path, given([(3, 4)]))[0], in_onnxruntime(path, given([(3, 4)]))[0], atol=1e-6)


def test_what_cannot_be_brought_to_another_opset_is_refused_in_a_sentence(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr("onnx.version_converter.convert_version", fails)
    graph = import_onnx(written(tmp_path / "m.onnx", LSTM, '<ir_version: 8, opset_import: ["": 14]>'))
    with pytest.raises(UsageError, match=r"the ONNX node LSTM is of opset 14 and can't be brought to 18 \(no adapter\); export with the opset 14"):
        export(graph, tmp_path / "out.onnx", opset=18)
    assert not (tmp_path / "out.onnx").exists()


def test_a_node_whose_inputs_change_on_the_way_to_another_opset_is_refused(tmp_path: Path) -> None:
    """Before 9 a Scan took a batch of sequences."""
    body = """(float[1, 2] first, float[1, 3, 2] x) => (float[1, 2] y, float[1, 3, 2] z) {
        y, z = Scan ("", first, x) <num_scan_inputs = 1, body = b (float[2] a, float[2] b) => (float[2] c, float[2] d) { c = Add (a, b) d = Identity (c) }> }"""
    graph = import_onnx(written(tmp_path / "m.onnx", body, '<ir_version: 3, opset_import: ["": 8]>'))
    with pytest.raises(UsageError, match=r"the ONNX node Scan is of opset 8 and can't be brought to 18 \(the converter changes what it reads\)$"):
        export(graph, tmp_path / "out.onnx")


def test_what_onnxruntime_makes_of_other_operators_may_stay(tmp_path: Path) -> None:
    """CenterCropPad has no kernel; the standard says what it is made of."""
    path = written(tmp_path / "m.onnx", "(float[4, 4] x, int64[2] size) => (float[r, c] y) { z = Relu (x) y = CenterCropPad (z, size) }")
    graph = import_onnx(path)
    assert left(graph) == ["CenterCropPad"]
    flat = (torch.randn(4, 4), torch.tensor([2, 5]))
    assert np.array_equal(graph(*flat)["y"].numpy(), in_onnxruntime(path, flat)[0])


def test_ranks_are_those_the_file_declares(tmp_path: Path) -> None:
    """The sizes of Split's parts must sum up to 6: ones can't be tried."""
    path = written(tmp_path / "m.onnx", "(float[6] x, int64[2] parts) => (float[a] y, float[b] z) { w = Relu (x) y, z = Split (w, parts) }")
    graph = import_onnx(path)
    assert left(graph) == ["Split"]
    flat = (torch.randn(6), torch.tensor([2, 4]))
    assert np.array_equal(graph(*flat)["z"].numpy(), in_onnxruntime(path, flat)[1])


def test_unsigned_64_bit_integers_come_back_from_onnxruntime() -> None:
    model = onnx.parser.parse_model(f"{HEADER} agraph (uint64[2] x, uint64[2] z) => (uint64[2] y) {{ y = Max (x, z) }}")
    given = [torch.tensor([1, 5], dtype=torch.uint64), torch.tensor([4, 2], dtype=torch.uint64)]
    (found,) = torch.ops.rewright.onnx_node(given, onnx_node.encoded(model), ["uint64 2"])
    assert found.dtype == torch.uint64 and found.tolist() == [4, 5]


REFUSED = {
    "random numbers": ("(float[n] x) => (float[n] y) { r = RandomNormalLike (x) y = Add (r, x) }", "uses operators rewright can't import: RandomNormalLike"),
    "an operator nobody has": ("(float[n] x) => (float[n] y) { r = com.microsoft.Frobnicate (x) y = Add (r, x) }", "can't import: Frobnicate of com.microsoft"),
    "a sequence that leaves the file": ("(float[n] x) => (seq(float[n]) y) { y = SequenceConstruct (x, x) }", "the output 'y' is no tensor that torch has"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_stay_either_is_refused_and_clean_onnx_takes_it_all_the_same(tmp_path: Path, what: str) -> None:
    body, sentence = REFUSED[what]
    path = written(tmp_path / "m.onnx", body)
    with pytest.raises(CaptureError, match=sentence):
        import_onnx(path)
    rw.optimize(path, recipe="clean-onnx").export(tmp_path / "out.onnx")
    assert counted(onnx.load(tmp_path / "out.onnx")) == counted(onnx.load(path))


# -- the op itself ------------------------------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, case: tuple) -> None:
        super().__init__()
        self.case = case

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return torch.ops.rewright.onnx_node(list(inputs), *self.case[1:])


@pytest.mark.parametrize("case", list(onnx_node.cases(torch.float32, "cpu")), ids=("loop", "two", "found"))
def test_every_case_runs_and_stays_one_node_through_export(case: tuple) -> None:
    exported = torch.export.export(One(case), tuple(case[0]), strict=False).run_decompositions({})
    calls = [n for n in exported.graph.nodes if "onnx_node" in str(n.target)]
    assert len(calls) == 1
    for fake, real in zip(calls[0].meta["val"], torch.ops.rewright.onnx_node(*case), strict=True):
        assert fake.dtype == real.dtype and fake.dim() == real.dim()
        assert all(not isinstance(f, int) or f == r for f, r in zip(fake.shape, real.shape))


def test_the_loop_adds_three_times() -> None:
    case, *_ = onnx_node.cases(torch.float32, "cpu")
    torch.testing.assert_close(torch.ops.rewright.onnx_node(*case)[0], 4 * case[0][0])


def test_a_node_that_reads_files_of_its_own_is_unsafe() -> None:
    model = onnx.parser.parse_model(f"{HEADER} agraph (float[4] x) => (float[4] y) {{ y = Add (x, w) }}")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="hostname")
    model.graph.initializer.append(weight)
    with pytest.raises(InputFileError, match="reads weights from a file of its own; the graph is damaged or unsafe"):
        torch.ops.rewright.onnx_node([torch.ones(4)], onnx_node.encoded(model), ["float32 4"])


def test_inputs_it_does_not_take_are_said_with_its_name() -> None:
    (x, *_), model, outputs = next(iter(onnx_node.cases(torch.float32, "cpu")))
    with pytest.raises(UsageError, match="onnxruntime can't run the ONNX node Constant|onnxruntime can't run Constant and 1 more ONNX nodes"):
        torch.ops.rewright.onnx_node([x[:, :2]], model, outputs)
