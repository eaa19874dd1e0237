"""Quantized ONNX files come in as our quantized layers: what onnxruntime's own quantizers write, and what they would not is left as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from rewright.backends.onnx.export import export
from rewright.ir.graph import Graph
from rewright.ir.onnx_import import import_onnx
from rewright.passes.pipeline import Pipeline

ours = torch.ops.rewright
RNG = np.random.default_rng(0)
HEADER = '<ir_version: 8, opset_import: ["": 18]>'
NET = """agraph (float[batch, n, 32] x) => (float[batch, n, 16] y) {
    a = MatMul (x, w1) b = Add (a, b1) r = Relu (b) c = MatMul (r, w2) d = Add (c, b2) y = Sigmoid (d) }"""
X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.onnx"
    model = onnx.parser.parse_model(f"{HEADER} {NET}")
    for name, shape in {"w1": (32, 64), "b1": (64,), "w2": (64, 16), "b2": (16,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(RNG.standard_normal(shape).astype(np.float32) * 0.2, name))
    onnx.save(model, path)
    return path


class Batches(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": X.numpy()}] * 2

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def dynamic(per_channel: bool, kind: QuantType) -> Callable[[Path, Path], None]:
    return lambda old, new: quantize_dynamic(old, new, per_channel=per_channel, weight_type=kind)


def static(kind: QuantType) -> Callable[[Path, Path], None]:
    return lambda old, new: quantize_static(
        str(old), str(new), Batches(), QuantFormat.QDQ, per_channel=True, activation_type=kind, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )


def nbits(symmetric: bool) -> Callable[[Path, Path], None]:
    def quantize(old: Path, new: Path) -> None:
        tool = MatMulNBitsQuantizer(onnx.load(old), block_size=16, is_symmetric=symmetric, accuracy_level=0)
        tool.process()
        onnx.save(tool.model.model, new)

    return quantize


QUANTIZED: dict[str, tuple[Callable[[Path, Path], None], Any, int]] = {
    "dynamic, a scale a tensor": (dynamic(False, QuantType.QInt8), ours.linear_int8_dynamic.default, 2),
    "dynamic, a scale a channel": (dynamic(True, QuantType.QInt8), ours.linear_int8_dynamic.default, 2),
    "QDQ in uint8": (static(QuantType.QUInt8), ours.linear_int8_static.default, 2),
    "QDQ in int8": (static(QuantType.QInt8), ours.linear_int8_static.default, 2),
    "4 bits, symmetric": (nbits(True), ours.linear_nbits.default, 2),
    "4 bits, with zero points": (nbits(False), ours.linear_nbits.default, 2),
}


def run(path: Path, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 4, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, given or {"x": X.numpy()})[0]  # type: ignore[return-value]


def canonical(path: Path) -> Graph:
    return Pipeline([], verify=False).run(import_onnx(path)).graph


@pytest.mark.parametrize("what", QUANTIZED)
def test_a_quantized_file_has_our_layers_with_their_biases_and_gives_the_same(plain: Path, tmp_path: Path, what: str) -> None:
    quantize, op, count = QUANTIZED[what]
    logging.disable(logging.WARNING)
    try:
        quantize(plain, tmp_path / "q.onnx")
    finally:
        logging.disable(logging.NOTSET)
    graph, wanted = canonical(tmp_path / "q.onnx"), run(tmp_path / "q.onnx")
    assert len(graph.find(op)) == count
    assert np.abs(graph.run((X,))[0].numpy() - wanted).max() < 1e-5
    assert np.abs(wanted - run(plain)).max() > 1e-4  # it is quantized
    done = export(graph, tmp_path / "out.onnx", [(X,)])
    rounds = op is ours.linear_nbits.default  # onnxruntime rounds the activations of such layers as well
    assert np.abs(run(done.path) - wanted).max() < (0.02 if rounds else 1e-5)
    assert done.bytes < 1.6 * (tmp_path / "q.onnx").stat().st_size


def test_biases_go_into_dynamic_layers(plain: Path, tmp_path: Path) -> None:
    quantize_dynamic(plain, tmp_path / "q.onnx")
    graph = canonical(tmp_path / "q.onnx")
    aten, layer = torch.ops.aten, ours.linear_int8_dynamic.default
    assert [n.target for n in graph.nodes] == [layer, aten.relu.default, layer, aten.sigmoid.default]


DYNAMIC = """agraph (float[n, 8] x, int8[8, 4] g) => (float[n, 4] y) { q, t, u = DynamicQuantizeLinear (x) i = MatMulInteger (q, W, Z, wz)
    f = Cast <to = 1> (i) o = Mul (t, ws) y = Mul (f, o) }"""
QDQ = """agraph (float[n, 8] x) => (float[n, 4] y) { q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, S, z)
    b = DequantizeLinear <axis = A> (w, ws, wz) y = MatMul (a, b) }"""
NUMBERS = {"w": RNG.integers(-99, 99, (8, 4)).astype(np.int8), "wz": np.int8(0), "ws": np.float32(0.02)}
NUMBERS |= {"s": np.float32(0.03), "s2": np.float32(0.04), "z": np.uint8(120), "z2": np.uint8(7)}
LEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "weights with a zero point": (DYNAMIC.replace("W", "w").replace("Z", "u"), {"wz": np.int8(3)}),
    "weights that are an input": (DYNAMIC.replace("W", "g").replace("Z", "u"), {}),
    "another zero point than its own": (DYNAMIC.replace("W", "w").replace("Z", "z2"), {}),
    "another scale behind than before": (QDQ.replace("S", "s2").replace("A", "1"), {}),
    "a scale a row": (QDQ.replace("S", "s").replace("A", "0"), {"ws": np.linspace(0.01, 0.05, 8, dtype=np.float32), "wz": np.zeros(8, np.int8)}),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_our_layers_do_not_mean_is_not_made_one(tmp_path: Path, what: str) -> None:
    body, other = LEFT[what]
    model = onnx.parser.parse_model(f"{HEADER} {body}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in {**NUMBERS, **other}.items() if n in read)
    onnx.save(model, tmp_path / "m.onnx")
    graph = canonical(tmp_path / "m.onnx")
    assert not graph.find(ours.linear_int8_dynamic.default, ours.linear_int8_static.default)
    given = {"x": X[0, :, :8].contiguous().numpy(), "g": NUMBERS["w"]}
    wanted = run(tmp_path / "m.onnx", {name: given[name] for name in graph.call.names})
    assert np.abs(graph.run(tuple(torch.from_numpy(given[n]) for n in graph.call.names))[0].numpy() - wanted).max() < 1e-5
