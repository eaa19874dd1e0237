"""ONNX files come in: equal to onnxruntime, names and dynamic dims kept, numbers stay numbers, and what can't be imported is said."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import rewright as rw
from rewright.backends.onnx.export import export
from rewright.backends.onnx.silence import silent
from rewright.ir.blocks.attention import attention_blocks
from rewright.ir.blocks.feed_forward import ffn_blocks
from rewright.ir.capture import capture
from rewright.ir.errors import CaptureError, InputFileError, RewrightError, UsageError
from rewright.ir.graph import Graph, quiet
from rewright.ir.onnx import table
from rewright.ir.onnx.model import torch_tensor
from rewright.ir.onnx.module import OnnxModule
from rewright.ir.onnx_import import import_onnx
from rewright.passes.pipeline import Pipeline
from rewright.tools.models import load_model

CLOSE = 1e-5


def written(path: Path, text: str, weights: Mapping[str, np.ndarray] | None = None) -> Path:
    """A file of ONNX's text form, with initialisers."""
    model = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def header(opset: int = 20, ort: bool = False) -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}{", " + chr(34) + "com.microsoft" + chr(34) + ": 1" if ort else ""}]>'


def in_onnxruntime(path: Path, given: Mapping[str, Tensor]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})  # type: ignore[return-value]


def error(graph: Graph, path: Path, given: Mapping[str, Tensor]) -> float:
    """Largest difference between the graph and onnxruntime over all outputs."""
    with torch.no_grad():
        found = graph(**given)
    wanted = in_onnxruntime(path, given)
    assert len(found) == len(wanted)
    for a, b in zip(found.values(), wanted):
        assert tuple(a.shape) == b.shape and a.numpy().dtype == b.dtype
    return max(float(np.abs(a.double().numpy() - b.astype(np.float64)).max()) for a, b in zip(found.values(), wanted))


def exported(path: Path, module: nn.Module, args: tuple, dynamic: Any, opset: int, names: tuple[list[str], list[str]]) -> Path:
    with quiet(), silent():
        program = torch.onnx.export(
            module.eval(), args, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, input_names=names[0], output_names=names[1], verbose=False
        )
        assert program is not None
        program.save(path)
    return path


class Encoder(nn.Module):
    """One block of a BERT: attention under a padding mask, a feed-forward net, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (p(x).unflatten(-1, (4, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].bool())
        x = self.first(x + self.out(y.transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


@pytest.fixture(scope="module", params=[18])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    dims = {0: "batch", 1: "tokens"}
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    return exported(path, Encoder(), (ids, torch.ones_like(ids)), (dims, dims), request.param, (["ids", "mask"], ["hidden"]))


def test_an_exported_encoder_equals_onnxruntime_and_its_blocks_are_found(encoder: Path) -> None:
    graph = import_onnx(encoder)
    assert list(graph.dims) == ["batch", "tokens"] and list(graph.call.names) == ["ids", "mask"]
    assert graph.notes == ["rows of 'words.weight' are chosen as by an embedding: negative indices, which ONNX counts from the end, are refused"]
    for batch, tokens in ((1, 1), (1, 9), (3, 24)):
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[-1, tokens // 2 + 1 :] = 0
        given = {"ids": torch.randint(0, 50, (batch, tokens)), "mask": mask}
        assert list(graph(**given)) == ["hidden"]
        assert error(graph, encoder, given) < CLOSE
    canonical = Pipeline([], verify=False).run(graph).graph
    (attention,), (ffn,) = attention_blocks(canonical), ffn_blocks(canonical)
    assert str(attention) == "4 heads of 8, bidirectional with a key mask" and str(ffn) == "32 -> 64, gelu"
    assert not canonical.find(torch.ops.aten._safe_softmax.default, torch.ops.aten.erf.default, torch.ops.aten.mul.Tensor)
    assert {"words.weight", "first.weight", "up.bias"} <= set(graph.weights())


def test_an_imported_graph_exports_again_before_anything_is_raised(encoder: Path, tmp_path: Path) -> None:
    graph = import_onnx(encoder)
    flat = graph.flat_inputs((), {"ids": torch.randint(0, 50, (2, 16)), "mask": torch.ones(2, 16, dtype=torch.int64)})
    found = export(graph, tmp_path / "back.onnx", [flat])
    assert found.parity is not None and found.parity.max_error < CLOSE
    assert [o.name for o in onnx.load(found.path).graph.output] == ["hidden"]


def test_capture_and_the_command_line_take_an_onnx_file(encoder: Path) -> None:
    ids = torch.randint(0, 50, (2, 5))
    assert [str(n.target) for n in capture(encoder, (ids, torch.ones_like(ids))).inputs] == ["ids", "mask"]
    loaded = load_model(str(encoder))
    assert [tuple(t.shape) for t in loaded.inputs[0]] == [(2, 16), (2, 16)] and list(loaded.graph.dims) == ["batch", "tokens"]


class Picture(nn.Module):
    """What convolutional nets are made of, for pictures of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.deep, self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.GroupNorm(2, 8)
        self.grow, self.alone = nn.ConvTranspose2d(8, 8, 2, 2), nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 1, 1)
        x = x + F.silu(self.groups(F.hardswish(self.deep(x))))
        x = self.alone(self.grow(F.avg_pool2d(x, 2)))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_convolutional_net_equals_onnxruntime_at_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Picture().eval()
    nn.init.uniform_(net.norm.running_mean)  # type: ignore[arg-type]
    dims = {0: "batch", 2: "height", 3: "width"}
    path = exported(tmp_path / "net.onnx", net, (torch.randn(2, 3, 24, 32),), (dims,), 18, (["x"], ["y"]))
    graph = import_onnx(path)
    assert set(graph.dims) == {"batch", "height", "width"}
    for shape in ((1, 3, 16, 16), (3, 3, 40, 24)):
        assert error(graph, path, {"x": torch.randn(shape)}) < CLOSE


# -- numbers, names, dims -------------------------------------------------------------------------------------------

HEADS = """
agraph (float[batch, tokens, 12] x) => (float[batch, 3, tokens, 4] y, int64[1] z)
<int64[1] zero = {0}, int64[1] one = {1}, float[1] four = {4.0}, int64[2] heads = {3, 4}, int64 first = {0}> {
   s = Shape (x)
   b = Gather (s, first)
   bs = Unsqueeze (b, zero)
   t = Slice (s, one, two)
   two_t = Mul (t, two)
   half = Div (two_t, two)
   shape = Concat <axis = 0> (bs, half, heads)
   r = Reshape (x, shape)
   y = Transpose <perm = [0, 2, 1, 3]> (r)
   f = Cast <to = 1> (t)
   g = Div (f, four)
   h = Mul (g, four)
   z = Cast <to = 7> (h)
}"""


def test_arithmetic_on_shapes_stays_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", header() + HEADS, {"two": np.array([2])})
    graph = import_onnx(path)
    assert list(graph.dims) == ["batch", "tokens"]
    for shape in ((1, 5, 12), (3, 2, 12)):
        assert error(graph, path, {"x": torch.randn(shape)}) == 0
    without = written(tmp_path / "n.onnx", header() + HEADS.replace(", int64[1] z", "").replace("z = Cast <to = 7> (h)", ""), {"two": np.array([2])})
    assert {str(n.target) for n in import_onnx(without).nodes} <= {
        "aten.sym_size.int",
        "aten.view.default",
        "aten.permute.default",
        "<built-in function mul>",
        "<built-in function floordiv>",
    }


def test_a_bounded_fill_is_computed_ahead_and_a_large_one_is_not_carried_as_numbers(tmp_path: Path) -> None:
    text = """
    agraph (float[2, n] x) => (float[2, n] y, float[large, large] z)
    <int64[1] small = {2}, int64[2] large_shape = {300, 300}> {
       ones = ConstantOfShape <value = int64[1] {1}> (small)
       tiled = Tile (x, ones)
       y = Relu (tiled)
       z = ConstantOfShape (large_shape)
    }"""
    path = written(tmp_path / "m.onnx", header() + text)
    graph = import_onnx(path)
    assert graph.dims.keys() == {"n"} and error(graph, path, {"x": torch.randn(2, 3)}) == 0


def test_a_fill_of_a_declared_terabyte_is_never_made(tmp_path: Path) -> None:
    text = "agraph (float[n] x) => (float[n] y, int64[1] z) <int64[1] huge = {1099511627776}> { a = ConstantOfShape (huge) z = Shape (a) y = Relu (x) }"
    graph = import_onnx(written(tmp_path / "m.onnx", header() + text))
    assert graph(torch.ones(2))["z"].tolist() == [1 << 40]


def test_names_are_made_legal_and_the_notes_say_so(tmp_path: Path) -> None:
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x.1", "onnx::MatMul_7"], ["12"]), helper.make_node("Add", ["12", "layer.bias"], ["a/y:0"])],
            "g",
            [helper.make_tensor_value_info("x.1", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("a/y:0", TensorProto.FLOAT, ["n", 3])],
            [numpy_helper.from_array(np.ones((4, 3), np.float32), "onnx::MatMul_7"), numpy_helper.from_array(np.ones(3, np.float32), "layer.bias")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    graph = import_onnx(tmp_path / "m.onnx")
    assert list(graph.call.names) == ["x_1"] and set(graph.weights()) == {"onnx__MatMul_7", "layer.bias"}
    assert list(graph(torch.ones(2, 4))) == ["a/y:0"]
    assert "the file's input 'x.1' is called 'x_1' here" in graph.notes and "the file's weight 'onnx::MatMul_7' is called 'onnx__MatMul_7' here" in graph.notes


def test_a_weight_may_be_called_like_another_ones_folder(tmp_path: Path) -> None:
    text = "agraph (float[n, 2] x) => (float[n, 2] y) { a = Add (x, w) y = Mul (a, w2) }"
    path = written(tmp_path / "m.onnx", header() + text, {"w": np.ones((1, 2), np.float32), "w2": np.full((1, 2), 3, np.float32)})
    model = onnx.load(path)
    for old, new in (("w", "block"), ("w2", "block.scale")):
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
        next(i for i in model.graph.initializer if i.name == old).name = new
    onnx.save(model, path)
    graph = import_onnx(path)
    assert error(graph, path, {"x": torch.randn(2, 2)}) == 0 and len(graph.weights()) == 2


def test_sizes_that_are_sums_follow_from_their_parts(tmp_path: Path) -> None:
    inputs = "float[batch, past, 2] a, float[batch, sum, 2] b, float[batch, new, 2] c"
    model = onnx.parser.parse_model(header() + f"agraph ({inputs}) => (float[batch, m, 2] y) {{ d = Concat <axis = 1> (a, c) y = Add (d, b) }}")
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + new"
    onnx.save(model, tmp_path / "m.onnx")
    graph = import_onnx(tmp_path / "m.onnx")
    given = {"a": torch.randn(1, 3, 2), "b": torch.randn(1, 5, 2), "c": torch.randn(1, 2, 2)}
    assert error(graph, tmp_path / "m.onnx", given) == 0


def test_batches_without_a_name_are_one_size_and_the_notes_say_so(tmp_path: Path) -> None:
    text = "agraph (float[s72, 4] x, float[s43, 4] y) => (float[s72, 4] z) { z = Add (x, y) }"
    graph = import_onnx(written(tmp_path / "m.onnx", header() + text))
    assert list(graph.dims) == ["s72"] and graph.notes == ["y axis 0 (s43) is taken to be as long as s72: neither has a name of its own"]


def test_two_names_of_one_size_are_found_by_the_trace(tmp_path: Path) -> None:
    text = "agraph (float[batch, n] x, float[batch, m] y) => (float[batch, n] z) { z = Add (x, y) }"
    graph = import_onnx(written(tmp_path / "m.onnx", header() + text))
    assert list(graph.dims) == ["batch", "n"] and graph.notes == ["y axis 1 (m) is as long as n: the model needs them equal"]


def test_a_branch_whose_condition_is_known_is_taken(tmp_path: Path) -> None:
    text = """
    agraph (float[n, 3] x) => (float[n, 3] y) <int64 two = {2}> {
       s = Shape (x)
       r = Size (s)
       flat = Equal (r, two)
       y = If (flat) <then_branch = t () => (float[n, 3] a) { a = Relu (x) }, else_branch = e () => (float[n, 3] b) { b = Neg (x) }>
    }"""
    path = written(tmp_path / "m.onnx", header() + text)
    graph = import_onnx(path)
    assert [n.target for n in graph.nodes] == [torch.ops.aten.relu.default] and error(graph, path, {"x": torch.randn(2, 3)}) == 0


def test_known_indices_may_count_from_the_end(tmp_path: Path) -> None:
    weights = {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "i": np.array([-1, 0])}
    graph = import_onnx(
        written(tmp_path / "m.onnx", header() + "agraph (float[n, 2] x) => (float[2, 2] y) { a = Gather (w, i) b = ReduceSum (x) y = Add (a, b) }", weights)
    )
    assert graph(torch.zeros(1, 2))["y"].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_what_is_written_of_a_graph_keeps_the_files_names_dims_metadata_opset_and_layout(tmp_path: Path) -> None:
    """Names that Python does not take; an input and a weight whose legal names are the other one's own."""
    nodes = "{ a = Add (input, other) b = MatMul (a, w) c = Add (b, v) out = Sigmoid (c) }"
    model = onnx.parser.parse_model(f"{header(19)} agraph (float[rows, 40] input, float[rows, 40] other) => (float[rows, 30] out) {nodes}")
    names = {"input": "in.put:0", "other": "in_put_0", "out": "123", "w": "enc/w", "v": "enc_b/"}
    for node in model.graph.node:
        node.input[:], node.output[:] = ([names.get(n, n) for n in each] for each in (node.input, node.output))
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    model.graph.initializer.extend(numpy_helper.from_array(floats(*shape), names[n]) for n, shape in (("w", (40, 30)), ("v", (30,))))
    model.producer_name, model.producer_version = "maker", "3"
    model.metadata_props.add(key="author", value="me")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    graph = Pipeline([], verify=False).run(import_onnx(tmp_path / "m.onnx")).graph
    flat = (torch.randn(3, 40), torch.randn(3, 40))
    done = export(graph.clone(), tmp_path / "out.onnx", [flat])
    made = onnx.load(done.path, load_external_data=False)
    assert [v.name for v in made.graph.input] == ["in.put:0", "in_put_0"] and [v.name for v in made.graph.output] == ["123"]
    assert "enc_b/" in {t.name for t in made.graph.initializer}
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*made.graph.input, *made.graph.output)} == {"rows"}
    assert {p.key: p.value for p in made.metadata_props} == {"author": "me", "rewright.made_of": "maker 3"}
    assert done.opset == 19 and made.opset_import[0].version == 19
    assert (tmp_path / "out.onnx.data").exists() and any(t.data_location for t in made.graph.initializer)
    given = {"in.put:0": flat[0], "in_put_0": flat[1]}
    assert np.abs(in_onnxruntime(done.path, given)[0] - in_onnxruntime(tmp_path / "m.onnx", given)[0]).max() < CLOSE
    assert export(graph, tmp_path / "other.onnx", [flat], opset=20).opset == 20


def test_nodes_may_stand_out_of_order(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", header() + "agraph (float[n, 3] x) => (float[n, 3] y) { a = Relu (x) y = Neg (a) }")
    model = onnx.load(path)
    model.graph.node.reverse()
    path.write_bytes(model.SerializeToString())
    assert import_onnx(path)(torch.tensor([[1.0, -1.0, 2.0]]))["y"].tolist() == [[-1.0, 0.0, -2.0]]


@pytest.mark.parametrize(("opset", "summed"), [(11, (1, 2)), (13, 1)])
def test_softmax_means_what_it_meant_in_the_files_opset(tmp_path: Path, opset: int, summed: int | tuple[int, ...]) -> None:
    path = written(tmp_path / "m.onnx", header(opset) + "agraph (float[n, 3, 5] x) => (float[n, 3, 5] y) { y = Softmax <axis = 1> (x) }")
    graph = import_onnx(path)
    given = {"x": torch.randn(2, 3, 5)}
    assert error(graph, path, given) < CLOSE
    assert graph(**given)["y"].sum(summed).allclose(torch.ones(()))


# -- onnxruntime's own operators ------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


X = "float[batch, tokens, 16] x"
Y = "float[batch, tokens, 16] y"
FUSED: dict[str, tuple[str, str, dict[str, np.ndarray]]] = {
    "SkipLayerNormalization": (
        f"{X}, {X[:-1]}s",
        "y = com.microsoft.SkipLayerNormalization <epsilon = 0.1> (x, s, g, b, c)",
        {"g": floats(16), "b": floats(16), "c": floats(16)},
    ),
    "SkipSimplifiedLayerNormalization": (f"{X}, {X[:-1]}s", "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> (x, s, g)", {"g": floats(16)}),
    "BiasGelu": (X, "y = com.microsoft.BiasGelu (x, b)", {"b": floats(16)}),
    "FastGelu": (X, "y = com.microsoft.FastGelu (x, b)", {"b": floats(16)}),
    "QuickGelu": (X, "y = com.microsoft.QuickGelu <alpha = 1.702> (x)", {}),
    "FusedMatMul": (X, "y = com.microsoft.FusedMatMul <alpha = 0.3, transB = 1> (x, w)", {"w": floats(16, 16)}),
    "MultiHeadAttention": (
        f"{X}, int32[batch, tokens] m",
        "y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x, b, m)",
        {"b": floats(48)},
    ),
    "Attention": (f"{X}, int32[batch, tokens] m", "y = com.microsoft.Attention <num_heads = 2> (x, w, b, m)", {"w": floats(16, 48), "b": floats(48)}),
    "RotaryEmbedding": (
        f"{X}, int64[batch, tokens] p",
        "y = com.microsoft.RotaryEmbedding <num_heads = 2> (x, p, c, s)",
        {"c": floats(8, 4), "s": floats(8, 4)},
    ),
    "MatMulNBits": (
        X,
        "y = com.microsoft.MatMulNBits <K = 16, N = 16, bits = 4, block_size = 16, accuracy_level = 1> (x, q, s, z)",
        {"q": RANDOM.integers(0, 255, (16, 1, 8), np.uint8), "s": np.abs(floats(16)), "z": RANDOM.integers(0, 15, 16, np.uint8)},
    ),
    "DynamicQuantizeMatMul": (
        X,
        "y = com.microsoft.DynamicQuantizeMatMul (x, w, s, z)",
        {"w": RANDOM.integers(-100, 100, (16, 16), np.int8), "s": np.abs(floats(16)) * 0.01, "z": np.zeros(16, np.int8)},
    ),
    "MatMulInteger": (
        X,
        "q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, z) f = Cast <to = 1> (i) y = Mul (f, s)",
        {"w": RANDOM.integers(-100, 100, (16, 16), np.int8)},
    ),
    "QuantizeLinear": (
        X,
        "q = QuantizeLinear <axis = 2> (x, s, z) y = DequantizeLinear <axis = 2> (q, s, z)",
        {"s": np.abs(floats(16)), "z": RANDOM.integers(-9, 9, 16, np.int8)},
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_operator_equals_onnxruntimes(tmp_path: Path, name: str) -> None:
    inputs, body, weights = FUSED[name]
    path = written(tmp_path / "m.onnx", header(ort=True) + f"agraph ({inputs}) => ({Y}) {{ {body} }}", weights)
    graph = import_onnx(path)
    for batch, tokens in ((1, 3), (2, 6)):
        given = {"x": torch.randn(batch, tokens, 16)}
        if "s" in graph.call.names:
            given["s"] = torch.randn(batch, tokens, 16)
        if "m" in graph.call.names:
            given["m"] = torch.ones(batch, tokens, dtype=torch.int32)
            given["m"][-1, -1] = 0
        if "p" in graph.call.names:
            given["p"] = torch.arange(tokens).repeat(batch, 1)
        assert error(graph, path, given) < 3 * CLOSE


# -- the backend suite ----------------------------------------------------------------------------------------------

# onnxruntime gives the same as we: 16-bit attention rounds elsewhere than the reference, and scales that don't divide a size
APART = {
    *(
        f"test_attention_{rank}_{kind}_{dtype}{form}"
        for rank in ("3d", "4d")
        for kind in ("causal", "attn_mask_causal", "causal_padded_kv", "padded_kv")
        for dtype in ("fp16", "bf16")
        for form in ("", "_expanded")
    ),
    "test_attention_4d_fp16",
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
    *(f"test_dft{form}{opset}" for form in ("", "_axis", "_inverse", "_rfft", "_irfft") for opset in ("", "_opset19")),  # these are left to onnxruntime
    "test_stft",
    "test_stft_with_window",
}
IMPORTED = 1200  # of 1884 node cases of onnx 1.23; the others take shapes from data, or hold strings, sequences, loops, detection, 2- and 4-bit types


def in_torch(case: Any) -> list[Tensor] | None:
    """The outputs of a node case's model run as torch, or None if it can't be imported."""
    if any(v.type.WhichOneof("value") != "tensor_type" for v in (*case.model.graph.input, *case.model.graph.output)):
        return None
    try:
        module = OnnxModule(onnx_ir.serde.deserialize_model(case.model), case.name)
        arrays = [numpy_helper.to_array(a) if isinstance(a, TensorProto) else np.asarray(a) for a in case.data_sets[0][0]]
        given = {name: torch_tensor(onnx_ir.tensor(a), name) for name, a in zip(module.inputs, arrays)}
        with torch.no_grad():
            return [v.detach() for v in module(**given).values()]
    except RewrightError:
        return None


def agree(found: Tensor, wanted: Any, rtol: float, atol: float) -> bool:
    array = numpy_helper.to_array(wanted) if isinstance(wanted, TensorProto) else np.asarray(wanted)
    if found.dtype.is_complex:
        return np.allclose(found.numpy(), array, rtol, atol)
    return tuple(found.shape) == array.shape and np.allclose(found.double().numpy(), array.astype(np.float64), rtol, atol, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_the_operators_give_the_backend_suites_results() -> None:
    from onnx.backend.test.loader import load_model_tests

    right, wrong = 0, []
    logging.disable(logging.WARNING)
    cases: list[Any] = load_model_tests(kind="node")
    try:
        for case in cases:
            found = in_torch(case)
            if found is not None:
                ok = all(agree(a, b, case.rtol, case.atol) for a, b in zip(found, case.data_sets[0][1], strict=True))
                right += ok
                wrong += [] if ok else [case.name]
    finally:
        logging.disable(logging.NOTSET)
    assert set(wrong) <= APART
    assert right >= IMPORTED


def test_every_operator_of_the_table_takes_its_inputs_by_place() -> None:
    for op in table.OPS:
        assert callable(op.function) and (op.domain in ("", "com.microsoft")), op.name
    assert len({(op.domain, op.name) for op in table.OPS}) >= 150


# -- no, in words ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str]] = {
    "operators we lack, all of them": (
        "agraph (float[n, 4] x) => (float[n, 4] y) { a = Foo.Bar (x) b = Foo.Bar (a) y = Bernoulli (b) }",
        "m.onnx uses operators rewright can't import: Bar of Foo 1 (2 nodes), Bernoulli of ai.onnx 20 (1 node)",
    ),
    "an attribute we don't know": (
        "agraph (float[n, 4] x) => (float[n, 4] y) { y = com.microsoft.Gelu <sharp = 1> (x) }",
        "the Gelu node that makes 'y' has the attribute sharp, which rewright does not know",
    ),
    "dropout that drops": (
        "agraph (float[n, 4] x) => (float[n, 4] y) <float half = {0.5}, bool on = {1}> { y = Dropout (x, half, on) }",
        "it drops values at random (training_mode), which a captured model does not",
    ),
    "shapes that don't fit": (
        "agraph (float[n, 4] x) => (float[n, 5] y) <float[3, 1] w = {1.0, 2.0, 3.0}> { y = com.microsoft.FusedMatMul (x, w) }",
        "the FusedMatMul node that makes 'y' can't be imported for inputs [",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_imported_is_said_in_a_sentence(tmp_path: Path, why: str) -> None:
    text, sentence = REFUSED[why]
    path = written(tmp_path / "m.onnx", '<ir_version: 8, opset_import: ["": 20, "Foo": 1, "com.microsoft": 1]>' + text)
    with pytest.raises(CaptureError) as caught:
        import_onnx(path)
    assert sentence in str(caught.value) and str(caught.value).startswith("m.onnx") and "\n" not in str(caught.value)


def test_strings_and_4_bit_integers_are_refused_and_4_bit_weights_read(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="the input 'x' is of type string, which torch has no tensors of"):
        import_onnx(written(tmp_path / "s.onnx", header() + "agraph (string[n] x) => (string[n] y) { y = Identity (x) }"))
    with pytest.raises(InputFileError, match="the input 'x' is of 4-bit integers"):
        import_onnx(written(tmp_path / "i.onnx", header(21) + "agraph (int4[n] x) => (int4[n] y) { y = Identity (x) }"))
    body = "agraph (float[n, 4] x) => (float[n, 4] y) { w = DequantizeLinear (q, s) y = Add (x, w) }"
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]>' + body)
    model.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [4], [-8, 7, 1, -1]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "s"))
    onnx.save(model, tmp_path / "w.onnx")
    graph = import_onnx(tmp_path / "w.onnx")
    assert graph(torch.zeros(1, 4))["y"].tolist() == [[-4.0, 3.5, 0.5, -0.5]]


def outside(folder: Path, place: str, length: int = 16, offset: int = 0) -> Path:
    """A model whose weight of 16 bytes lies in `place`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", str(offset)), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    model = onnx.parser.parse_model(header() + "agraph (float[n, 4] x) => (float[n, 4] y) { y = Add (x, w) }")
    model.graph.initializer.append(weight)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def _linked(link: Callable[[Path, Path], None], folder: Path) -> None:
    (folder.parent / "secret.bin").write_bytes(bytes(16))
    link(folder.parent / "secret.bin", folder / "w.bin")


@pytest.mark.parametrize(
    ("place", "prepare", "sentence"),
    [
        ("../secret.bin", lambda f: _linked(os.link, f), "leaves the model's folder; the file is unsafe"),
        ("/etc/hostname", lambda f: None, "leaves the model's folder; the file is unsafe"),
        ("w.bin", lambda f: None, "which is missing; it belongs beside the model"),
        ("w.bin", lambda f: _linked(os.symlink, f), "goes through a symbolic link"),
        ("w.bin", lambda f: _linked(os.link, f), "is a hard link to another file"),
        ("w.bin", lambda f: (f / "w.bin").write_bytes(bytes(8)), "at bytes 0 to 16; that file has 8"),
    ],
)
def test_external_data_stays_in_the_models_folder(tmp_path: Path, place: str, prepare: Callable[[Path], None], sentence: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(InputFileError, match="the weight 'w' lies in") as caught:
        import_onnx(outside(folder, place))
    assert sentence in str(caught.value)


def test_external_data_beside_the_model_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    graph = import_onnx(outside(tmp_path, "w.bin"))
    with torch.no_grad():
        graph.weight("w").add_(1)  # as training does
    assert graph(torch.zeros(1, 4))["y"].tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "has 0 bytes"), (b"\x08\x07garbage\xff\xff", "is not an ONNX model, or is damaged"), (None, "no file")],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputFileError, match=sentence):
        import_onnx(path)


BROADCAST = """<ir_version: 3, opset_import: ["": 6]> agraph (float[2, 3, 4] x, float[3, 4] b) => (float[2, 3, 4] y) {
    z = Add <broadcast = 1> (x, b) y = Relu (z) }"""


def test_a_file_of_an_older_opset_is_brought_to_one_we_read(tmp_path: Path) -> None:
    """From 7 on axes broadcast without being asked; onnxruntime has no Add of before."""
    graph = import_onnx(written(tmp_path / "m.onnx", BROADCAST))
    x, b = torch.randn(2, 3, 4), torch.randn(3, 4)
    assert torch.equal(graph(x=x, b=b)["y"], torch.relu(x + b))
    assert "the file is of opset 6; onnx's converter brought it to 7" in graph.notes


def test_an_older_opset_that_cannot_be_brought_to_one_we_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr("onnx.version_converter.convert_version", fails)
    with pytest.raises(CaptureError, match=r"is of opset 6; rewright imports from 7 on, and onnx can't bring it there \(no adapter\)"):
        import_onnx(written(tmp_path / "m.onnx", BROADCAST))


def test_a_file_newer_than_the_exporter_is_written_at_its_newest_opset(tmp_path: Path) -> None:
    graph = import_onnx(written(tmp_path / "m.onnx", f"{header(26)} agraph (float[n] x) => (float[n] y) {{ y = Relu (x) }}"))
    assert export(graph, tmp_path / "out.onnx", [(torch.randn(3),)]).opset == 25
    with pytest.raises(UsageError, match="opset 26 can't be written; the newest that can is 25"):
        export(graph, tmp_path / "out.onnx", opset=26)


def test_a_mask_without_heads_survives_the_attention_operator(tmp_path: Path) -> None:
    """Here heads, queries and keys are of different numbers: no axis is taken for another."""
    text = "(float[1, 2, 3, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 4] v, float[3, 5] m) => (float[1, 2, 3, 4] y) { y = Attention (q, k, v, m) }"
    path = written(tmp_path / "m.onnx", f"{header(23)} agraph {text}")
    given = {name: torch.randn(shape) for name, shape in (("q", (1, 2, 3, 4)), ("k", (1, 2, 5, 4)), ("v", (1, 2, 5, 4)), ("m", (3, 5)))}
    done = rw.optimize(path, recipe=[], verify=False).export(tmp_path / "out.onnx")
    assert "Attention" in [n.op_type for n in onnx.load(done.path).graph.node]
    assert np.allclose(in_onnxruntime(done.path, given)[0], in_onnxruntime(path, given)[0], atol=CLOSE)


def test_a_large_convolution_of_codes_is_exact_and_runs_in_onnxruntime(tmp_path: Path) -> None:
    """300 channels of 3 x 3 products of up to 255 * 255: their sums are beyond what float32 holds."""
    text = "(uint8[1, 300, 5, 5] x) => (int32[1, 2, 3, 3] y) { y = ConvInteger (x, w) }"
    weights = {"w": np.random.default_rng(0).integers(200, 256, (2, 300, 3, 3)).astype(np.uint8)}
    path = written(tmp_path / "m.onnx", f"{header(20)} agraph {text}", weights)
    given = {"x": torch.randint(200, 256, (1, 300, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))}
    graph = import_onnx(path)
    assert error(graph, path, given) == 0
    done = export(graph, tmp_path / "out.onnx", [tuple(given.values())])
    assert np.array_equal(in_onnxruntime(done.path, given)[0], in_onnxruntime(path, given)[0])


def test_what_quantize_dynamic_writes_of_a_convolution_goes_back_into_a_file(tmp_path: Path) -> None:
    text = "(float[1, 2, 5, 5] x) => (int32[1, 3, 3, 3] y, float s) { c, s, z = DynamicQuantizeLinear (x) y = ConvInteger (c, w, z) }"
    weights = {"w": np.random.default_rng(0).integers(-9, 9, (3, 2, 3, 3)).astype(np.int8)}
    path = written(tmp_path / "m.onnx", f"{header(20)} agraph {text}", weights)
    given = {"x": torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))}
    done = export(import_onnx(path), tmp_path / "out.onnx", [tuple(given.values())])
    for found, wanted in zip(in_onnxruntime(done.path, given), in_onnxruntime(path, given), strict=True):
        assert np.array_equal(found, wanted)


def test_a_quantized_convolution_is_imported_with_a_warning(tmp_path: Path) -> None:
    text = f"""{header()} main (float[1, 2, 5, 5] x) => (float[1, 3, 3, 3] y) {{
        s = Constant<value_float = 0.1>()
        z = Constant<value = uint8 {{128}}>()
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        y = Conv(d, w)
    }}"""
    path, x = written(tmp_path / "m.onnx", text, {"w": floats(3, 2, 3, 3)}), torch.randn(1, 2, 5, 5)
    graph = import_onnx(path)
    assert [n for n in graph.notes if n.startswith("1 quantized convolutions become float arithmetic")]
    assert error(graph, path, {"x": x}) < CLOSE
