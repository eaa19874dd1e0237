"""Linear layers that onnxruntime's tools, its optimizer and our exporter write as Gemm or as one quantized operator come in as our layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from rewright.backends.onnx.export import export
from rewright.ir.graph import Graph
from rewright.ir.nodes import argument
from rewright.ir.onnx_import import import_onnx
from rewright.passes.pipeline import Pipeline

ours = torch.ops.rewright
STATIC, DYNAMIC = ours.linear_int8_static.default, ours.linear_int8_dynamic.default
HEADER = '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>'
CLOSE = 1e-5  # of the largest value

RNG = np.random.default_rng(0)
FLOATS = {
    name: RNG.standard_normal(shape).astype(np.float32) * 0.2
    for name, shape in {"w1": (32, 64), "b1": (64,), "w2": (64, 16), "b2": (16,), "r1": (64, 32), "r2": (16, 64)}.items()
}
X = torch.randn(15, 32, generator=torch.Generator().manual_seed(0))
NETS = {
    "MatMul": "agraph (float[n, 32] x) => (float[n, 16] y) { a = MatMul (x, w1) y = MatMul (a, w2) }",
    "Gemm": "agraph (float[n, 32] x) => (float[n, 16] y) { a = Gemm (x, w1, b1) y = Gemm (a, w2, b2) }",
    "Gemm of rows": "agraph (float[n, 32] x) => (float[n, 16] y) { a = Gemm <transB = 1> (x, r1, b1) b = Relu (a) y = Gemm <transB = 1> (b, r2, b2) }",
    "Gemm without bias": "agraph (float[n, 32] x) => (float[n, 16] y) { a = Gemm <transB = 1> (x, r1) b = Relu (a) y = Gemm (b, w2) }",
}


def written(path: Path, body: str, held: Mapping[str, Any]) -> Path:
    """A file with those of the constants that it reads."""
    model = onnx.parser.parse_model(f"{HEADER} {body}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in held.items() if n in read)
    onnx.save(model, path)
    return path


class Batches(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": X.numpy()}] * 2

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def run(path: Path, given: Mapping[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 4, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, dict(given))[0]  # type: ignore[return-value]


def canonical(path: Path) -> Graph:
    return Pipeline([], verify=False).run(import_onnx(path)).graph


def assert_close(got: Any, wanted: np.ndarray) -> None:
    assert np.abs(np.asarray(got, np.float32) - wanted).max() <= CLOSE * np.abs(wanted).max()


@pytest.mark.parametrize(("per_channel", "symmetric", "kind"), [(False, False, QuantType.QUInt8), (True, True, QuantType.QInt8)], ids=["tensor", "channel"])
@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_what_quantize_static_writes_has_our_layers(tmp_path: Path, net: str, form: QuantFormat, per_channel: bool, symmetric: bool, kind: QuantType) -> None:
    plain, path = written(tmp_path / "m.onnx", NETS[net], FLOATS), tmp_path / "q.onnx"
    logging.disable(logging.WARNING)
    try:
        options = {"ActivationSymmetric": symmetric}
        quantize_static(
            str(plain), str(path), Batches(), form, per_channel=per_channel, activation_type=kind, weight_type=QuantType.QInt8, extra_options=options
        )
    finally:
        logging.disable(logging.NOTSET)
    graph, wanted = canonical(path), run(path, {"x": X.numpy()})
    assert len(graph.find(STATIC)) == 2
    assert not graph.find(ours.onnx_node.default, torch.ops.aten.linear.default, torch.ops.aten.matmul.default)
    assert [argument(n, "b") is not None for n in graph.find(STATIC)] == [net in ("Gemm", "Gemm of rows")] * 2
    assert_close(graph.run((X,))[0], wanted)
    assert np.abs(wanted - run(plain, {"x": X.numpy()})).max() > 1e-4  # it is quantized


def test_a_file_we_wrote_of_quantized_layers_has_them_again(tmp_path: Path) -> None:
    path, x = written(tmp_path / "m.onnx", STATIC_FORMS["MatMulIntegerToFloat"], HELD), GIVEN["x"]
    graph = canonical(path)
    again = canonical(export(graph, tmp_path / "out.onnx", [(torch.from_numpy(x),)]).path)
    assert [n.target for n in again.nodes] == [n.target for n in graph.nodes] == [STATIC]
    assert_close(again.run((torch.from_numpy(x),))[0], run(path, {"x": x}))


GIVEN = {"x": X[:, :8].contiguous().numpy(), "c": RNG.standard_normal(4).astype(np.float32), "m": RNG.standard_normal((15, 4)).astype(np.float32)}
GIVEN["k"] = GIVEN["x"][:, :4].copy()
GIVEN["t"] = np.ascontiguousarray(X[:8, :5].numpy())
HELD: dict[str, Any] = {
    "s": np.float32(0.03), "s2": np.float32(0.05), "z": np.uint8(120), "i": np.int8(-7), "w": RNG.integers(-99, 99, (8, 4)).astype(np.int8),
    "r": RNG.integers(-99, 99, (4, 8)).astype(np.int8), "u": RNG.integers(28, 228, (8, 4)).astype(np.uint8), "wz": np.int8(0), "uz": np.uint8(128),
    "w3": np.int8(3), "u7": np.uint8(97), "ws": np.linspace(0.01, 0.04, 4, dtype=np.float32), "ws1": np.float32(0.02), "wz4": np.zeros(4, np.int8),
    "sq": RNG.integers(-99, 99, (4, 4)).astype(np.int8), "e": RNG.standard_normal((4, 4)).astype(np.float32), "b": RNG.standard_normal(4).astype(np.float32),
    "bq": RNG.integers(-9999, 9999, 4).astype(np.int32), "bs": np.linspace(3e-4, 1.2e-3, 4, dtype=np.float32), "b3": np.full(4, 3, np.int32),
    "ys": np.float32(0.08), "yz": np.uint8(100), "f": RNG.standard_normal((8, 4)).astype(np.float32), "fr": RNG.standard_normal((4, 8)).astype(np.float32),
    "ws2": np.linspace(0.011, 0.041, 4, dtype=np.float32),
}  # fmt: skip

IN, OUT = "agraph (float[n, 8] x) => (float[n, 4] y) {", "}"
Q = f"{IN} q = QuantizeLinear (x, s, z)"
QDQ = f"{Q} a = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 1> (w, ws, wz4)"
ROWS = f"{Q} a = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 0> (r, ws, wz4)"
SQUARE = "agraph (float[n, 4] k) => (float[n, 4] y) { q = QuantizeLinear (k, s, z) a = DequantizeLinear (q, s, z)"
COMES = f"{IN} q, t, o = DynamicQuantizeLinear (x)"
STATIC_FORMS = {
    "Gemm, a bias of codes": QDQ + "c = DequantizeLinear <axis = 0> (bq, bs) y = Gemm (a, v, c) }",
    "Gemm of rows, a bias of floats": ROWS + "y = Gemm <transB = 1> (a, v, b) }",
    "Gemm of rows, int8 codes": ROWS.replace(", z)", ", i)") + "y = Gemm <transB = 1> (a, v) }",
    "Gemm, weights of floats": QDQ.replace("v =", "p = QuantizeLinear <axis = 1> (f, ws, wz4) v =").replace("(w, ws", "(p, ws") + "y = Gemm (a, v, b) }",
    "Gemm of rows, weights of floats": ROWS.replace("v =", "p = QuantizeLinear <axis = 0> (fr, ws, wz4) v =").replace("(r, ws", "(p, ws")
    + "y = Gemm <transB = 1> (a, v, b) }",
    "MatMulIntegerToFloat": Q + "y = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz4, b) }",
    "QGemm to floats": Q + "y = com.microsoft.QGemm (q, s, z, w, ws, wz4, bq) }",
    "QGemm of rows to codes": Q + "c = com.microsoft.QGemm <transB = 1> (q, s, z, r, ws, wz4, bq, ys, yz) y = DequantizeLinear (c, ys, yz) }",
    "QGemm of codes of another grid": Q + "y = com.microsoft.QGemm (q, s2, z, u, ws1, uz) }",
    "QLinearMatMul": Q + "c = QLinearMatMul (q, s, z, u, ws1, uz, ys, yz) y = DequantizeLinear (c, ys, yz) }",
}
DYNAMIC_FORMS = {
    "DynamicQuantizeMatMul": IN + "y = com.microsoft.DynamicQuantizeMatMul (x, w, ws, wz4, b) }",
    "DynamicQuantizeMatMul, no more": IN + "y = com.microsoft.DynamicQuantizeMatMul (x, u, ws1, uz) }",
    "MatMulIntegerToFloat": COMES + "y = com.microsoft.MatMulIntegerToFloat (q, w, t, ws, o, wz4, b) }",
}


@pytest.mark.parametrize("form", [*STATIC_FORMS, *(f"dynamic {form}" for form in DYNAMIC_FORMS)])
def test_a_layer_in_every_form_is_one_of_ours(tmp_path: Path, form: str) -> None:
    dynamic = form.startswith("dynamic ")
    path = written(tmp_path / "m.onnx", DYNAMIC_FORMS[form.removeprefix("dynamic ")] if dynamic else STATIC_FORMS[form], HELD)
    graph = canonical(path)
    assert len(graph.find(DYNAMIC if dynamic else STATIC)) == 1
    assert not graph.find(ours.onnx_node.default, torch.ops.aten.linear.default, torch.ops.aten.matmul.default)
    assert_close(graph.run((torch.from_numpy(GIVEN["x"]),))[0], run(path, {"x": GIVEN["x"]}))


LEFT = {
    "Gemm: twice the product": QDQ + "y = Gemm <alpha = 2.0> (a, v, b) }",
    "Gemm: half of the bias": QDQ + "y = Gemm <beta = 0.5> (a, v, b) }",
    "Gemm: x turned": QDQ.replace("[n, 8] x", "[8, n] t").replace("(x", "(t") + "y = Gemm <transA = 1> (a, v, b) }",
    "Gemm: a bias that is an input": QDQ.replace("8] x", "8] x, float[4] c") + "y = Gemm (a, v, c) }",
    "Gemm: a bias a row": QDQ.replace("8] x", "8] x, float[n, 4] m") + "y = Gemm (a, v, m) }",
    "Gemm: a bias with a zero point": QDQ + "c = DequantizeLinear <axis = 0> (bq, bs, b3) y = Gemm (a, v, c) }",
    "Gemm: codes of another grid": QDQ.replace("(q, s, z)", "(q, s2, z)") + "y = Gemm (a, v, b) }",
    "Gemm: a scale an input channel": SQUARE + "v = DequantizeLinear <axis = 1> (sq, ws, wz4) y = Gemm <transB = 1> (a, v, b) }",
    "MatMul: a scale an input channel": SQUARE + "v = DequantizeLinear <axis = 0> (sq, ws, wz4) y = MatMul (a, v) }",
    "Gemm: weights with a zero point": QDQ.replace("<axis = 1> (w, ws, wz4)", "(w, ws1, w3)") + "y = Gemm (a, v, b) }",
    "Gemm: weights of floats of another grid": QDQ.replace("v =", "p = QuantizeLinear <axis = 1> (f, ws2, wz4) v =").replace("(w, ws", "(p, ws")
    + "y = Gemm (a, v, b) }",
    "Gemm: weights of floats along another axis": SQUARE
    + "p = QuantizeLinear <axis = 1> (e, ws, wz4) v = DequantizeLinear <axis = 0> (p, ws, wz4) y = Gemm <transB = 1> (a, v, b) }",
    "QGemm: twice the product": Q + "y = com.microsoft.QGemm <alpha = 2.0> (q, s, z, w, ws, wz4, bq) }",
    "QGemm: weights with a zero point": Q + "y = com.microsoft.QGemm <transB = 1> (q, s, z, r, ws1, w3, bq) }",
    "QGemm: weights with a zero point, to codes": Q + "c = com.microsoft.QGemm (q, s, z, u, ws1, u7, bq, ys, yz) y = DequantizeLinear (c, ys, yz) }",
    "QLinearMatMul: weights with a zero point": Q + "c = QLinearMatMul (q, s, z, u, ws1, u7, ys, yz) y = DequantizeLinear (c, ys, yz) }",
    "DynamicQuantizeMatMul: weights with a zero point": IN + "y = com.microsoft.DynamicQuantizeMatMul (x, u, ws1, u7, b) }",
    "MatMulIntegerToFloat: another zero point": COMES + "y = com.microsoft.MatMulIntegerToFloat (q, w, t, ws, z, wz4, b) }",
    "MatMulIntegerToFloat: weights with a zero point": Q + "y = com.microsoft.MatMulIntegerToFloat (q, w, s, ws1, z, w3, b) }",
}


@pytest.mark.parametrize("what", LEFT)
def test_what_our_layers_do_not_mean_is_not_made_one(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "m.onnx", LEFT[what], HELD)
    graph = canonical(path)
    assert not graph.find(STATIC, DYNAMIC)
    given = {str(n.target): GIVEN[str(n.target)] for n in graph.inputs}
    assert_close(graph.run(tuple(map(torch.from_numpy, given.values())))[0], run(path, given))


CODES = f"{IN} q = QuantizeLinear (x, s, z) m = com.microsoft.QGemm (q, s, z, w, ws, wz4, bq, ys, yz)"
BETWEEN = {
    "QLinearAdd": "c = com.microsoft.QLinearAdd (m, ys, yz, m4, s2, z, s, z)",
    "QLinearMul": "c = com.microsoft.QLinearMul (m, ys, yz, m4, s2, z, s2, z)",
    "QLinearSigmoid": "c = com.microsoft.QLinearSigmoid (m, ys, yz, s01, z)",
    "QLinearLeakyRelu": "c = com.microsoft.QLinearLeakyRelu <alpha = 0.3> (m, ys, yz, s, z)",
}


@pytest.mark.parametrize("op", BETWEEN)
def test_what_stands_between_quantized_layers_is_no_barrier(tmp_path: Path, op: str) -> None:
    grid = {"QLinearMul": "s2", "QLinearSigmoid": "s01"}.get(op, "s")
    held = {**HELD, "m4": np.array([3, 200, 120, 90], np.uint8), "s01": np.float32(0.01)}
    path = written(tmp_path / "m.onnx", f"{CODES} {BETWEEN[op]} y = DequantizeLinear (c, {grid}, z) {OUT}", held)
    graph = canonical(path)
    assert graph.find(STATIC) and not graph.find(ours.onnx_node.default)
    wanted = run(path, {"x": GIVEN["x"]})
    assert len(np.unique(wanted)) > 5
    assert_close(graph.run((torch.from_numpy(GIVEN["x"]),))[0], wanted)
