"""A file and the module it was exported from become the same program: the same layers by name, the same calls, the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from rewright.backends.onnx.silence import silent
from rewright.ir.graph import Graph, quiet
from rewright.ir.onnx.model import read_onnx
from rewright.ir.onnx.provenance import SCOPES, layer_of
from rewright.ir.onnx_import import import_onnx
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.tools.optimize import capture, optimize

from ..passes.encoder import encoder, example


class Numbered(nn.Module):
    """The encoder with what BERT looks up of its positions: types by a table of places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.kinds = encoder(), nn.Embedding(2, 64)
        self.register_buffer("positions", torch.arange(40)[None], persistent=False)
        self.register_buffer("types", torch.arange(40)[None] % 2, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = self.positions[:, : input_ids.shape[1]]
        types = torch.gather(self.types.expand(places.shape[0], -1), 1, places).expand_as(input_ids)
        return self.encoder(input_ids, attention_mask) + self.kinds(types)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Numbered().eval()


@pytest.fixture(scope="module")
def file(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, dims = tmp_path_factory.mktemp("onnx") / "encoder.onnx", {0: "batch", 1: "sequence"}
    with quiet(), silent():
        program = torch.onnx.export(module, (), kwargs=example(), dynamo=True, opset_version=18, dynamic_shapes=dict.fromkeys(example(), dims), verbose=False)
        assert program is not None
        program.save(path)
    return path


@pytest.fixture(scope="module")
def ours(module: nn.Module) -> Graph:
    return capture(module, (), example())


@pytest.fixture(scope="module")
def theirs(file: Path) -> Graph:
    return capture(file)


def test_a_file_becomes_the_program_of_its_module_bit_by_bit(ours: Graph, theirs: Graph) -> None:
    assert sorted(str(n.target) for n in theirs.nodes) == sorted(str(n.target) for n in ours.nodes)
    attention = torch.ops.rewright.attention.default
    assert [n.args[6] for n in theirs.find(attention)] == [0.25, 0.25], "the scale is 1/sqrt(16), not the square of its root in float32"
    mask = example()["attention_mask"]
    for rows, tokens in itertools.product((1, 3), (5, 9)):
        flat = example()["input_ids"][:rows, :tokens], mask[:rows, :tokens].clone().index_fill_(1, torch.tensor([0]), 1)
        assert torch.equal(ours.run(flat)[0], theirs.run(flat)[0])


def test_its_layers_have_the_modules_names(ours: Graph, theirs: Graph) -> None:
    def named(graph: Graph) -> set[tuple[str, str]]:
        return {(str(n.target), n.meta["path"]) for n in graph.find(torch.ops.aten.linear.default, torch.ops.rewright.attention.default)}

    assert named(theirs) == named(ours) and ("aten.linear.default", "encoder.layers.0.q") in named(ours)


def test_a_lossy_recipe_gives_the_same_bits_on_both_roads(ours: Graph, theirs: Graph) -> None:
    passes = [QuantizeLinear(activations="int8-static", algorithm="gptq", min_weights=0)]
    batches = [example() for _ in range(4)]
    a, b = (optimize(m, example(), recipe=passes, calibration=batches) for m in (ours, theirs))
    assert a.records[-1].applied == b.records[-1].applied == 12
    flat = tuple(example().values())
    assert torch.equal(a.graph.run(flat)[0], b.graph.run(flat)[0])


def test_indices_that_count_from_the_start_need_no_arithmetic(file: Path, theirs: Graph) -> None:
    assert "GatherElements" in {n.op_type for n in onnx.load(file).graph.node}
    assert not theirs.find(torch.ops.aten.lt.Scalar)


@pytest.mark.parametrize("given", [False, True])
def test_indices_that_may_count_from_the_end_do(tmp_path: Path, given: bool) -> None:
    indices = torch.tensor([[-1, 0], [1, -2]])
    inputs = "float[2, 3] x, int64[2, 2] i" if given else "float[2, 3] x"
    text = f'<ir_version: 8, opset_import: ["": 20]> main ({inputs}) => (float[2, 2] y) {{ y = GatherElements<axis = 1>(x, i) }}'
    model = onnx.parser.parse_model(text)
    if not given:
        model.graph.initializer.append(numpy_helper.from_array(indices.numpy(), "i"))
    onnx.save(model, tmp_path / "m.onnx")
    x = torch.randn(2, 3)
    found = import_onnx(tmp_path / "m.onnx")(**({"x": x, "i": indices} if given else {"x": x}))["y"]
    assert torch.equal(found, x.gather(1, indices % 3))


@pytest.mark.parametrize(
    ("node", "scopes", "weight", "layer"),
    [
        ("node_linear", "['', 'encoder', 'encoder.layer.0', 'linear']", "w", "encoder.layer.0"),
        ("node_linear", "['', 'linear']", "encoder.w", ""),
        ("node_linear", "nonsense", "encoder.q.weight", "encoder.q"),
        ("/encoder/layer.0/q/MatMul", None, "onnx::MatMul_12", "encoder.layer.0.q"),
        ("model/dense/MatMul", None, "w", "model.dense"),
        ("MatMul_3", None, "encoder.q.weight", "encoder.q"),
        ("MatMul_3", None, "onnx::MatMul_12", ""),
        ("", None, "w", ""),
    ],
)
def test_the_layer_of_a_node_is_what_the_exporter_says_or_names_say(tmp_path: Path, node: str, scopes: str | None, weight: str, layer: str) -> None:
    made = helper.make_node("MatMul", ["x", weight], ["y"], name=node)
    if scopes is not None:
        made.metadata_props.add(key=SCOPES, value=scopes)
    floats = onnx.TensorProto.FLOAT
    ends = [[helper.make_tensor_value_info(name, floats, [2, 4])] for name in "xy"]
    held = numpy_helper.from_array(torch.eye(4).numpy(), weight)
    model = helper.make_model(helper.make_graph([made], "g", *ends, [held]), ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, tmp_path / "m.onnx")
    assert layer_of(next(iter(read_onnx(tmp_path / "m.onnx").model.graph))) == layer
    assert [n.meta["path"] for n in import_onnx(tmp_path / "m.onnx").nodes][-1] == layer
