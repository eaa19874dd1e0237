"""An imported ONNX file's own names, opset, metadata and layout survive saving; so do the other names of tied weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import rewright as rw
from rewright.ir.capture import capture
from rewright.ir.errors import InputFileError
from rewright.ir.save import load_graph, save_graph
from rewright.passes import QuantizeLinear


def theirs(path: Path, beside: bool = False) -> Path:
    """A file of opset 19 with names that Python does not take and properties of its own."""
    nodes = "{ a = MatMul (input, w) b = Add (a, v) c = Relu (b) d = MatMul (c, u) out = Sigmoid (d) }"
    head = '<ir_version: 9, opset_import: ["": 19]>'
    model = onnx.parser.parse_model(f"{head} agraph (float[rows, 40] input) => (float[rows, 30] out) {nodes}")
    names = {"input": "in.put:0", "out": "123", "w": "enc/w", "v": "enc/v:0", "u": "head/u"}
    for node in model.graph.node:
        node.input[:], node.output[:] = ([names.get(n, n) for n in each] for each in (node.input, node.output))
    model.graph.input[0].name, model.graph.output[0].name = names["input"], names["out"]
    generator = np.random.default_rng(0)
    for name, shape in (("w", (40, 50)), ("v", (50,)), ("u", (50, 30))):
        model.graph.initializer.append(numpy_helper.from_array(generator.standard_normal(shape, np.float32), names[name]))
    model.producer_name, model.producer_version = "maker", "3"
    model.metadata_props.add(key="author", value="me")
    onnx.save(model, path, save_as_external_data=beside, location="w.bin", size_threshold=0)
    return path


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_exported_of_a_saved_result_is_what_is_exported_of_the_result(tmp_path: Path, beside: bool) -> None:
    result = rw.optimize(theirs(tmp_path / "m.onnx", beside), recipe=[QuantizeLinear(min_weights=1800, weights="int8-channel")])
    assert result.records[-1].applied == 1
    done = [result.export(tmp_path / "direct" / "x.onnx"), rw.load(result.save(tmp_path / "saved")).export(tmp_path / "loaded" / "x.onnx")]
    direct, loaded = (onnx.load(each.path, load_external_data=False) for each in done)
    assert [v.name for v in loaded.graph.input] == ["in.put:0"] and [v.name for v in loaded.graph.output] == ["123"]
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in (*loaded.graph.input, *loaded.graph.output)} == {"rows"}
    assert "enc/v:0" in {t.name for t in loaded.graph.initializer}
    assert {p.key: p.value for p in loaded.metadata_props}.items() >= {"author": "me", "rewright.made_of": "maker 3"}.items()
    assert done[1].opset == loaded.opset_import[0].version == 19
    assert (tmp_path / "loaded" / "x.onnx.data").exists() == beside
    assert loaded == direct


class Tied(nn.Module):
    """Two linear layers of one weight, which the graph reads by one name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_a_saved_graph_without_data_is_filled_from_a_checkpoint_that_has_a_tied_weight_by_its_other_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        save_graph(capture(Tied().eval(), (torch.ones(2, 4),)), tmp_path)
    held = torch.randn(4, 4)
    read = set(load_graph(tmp_path).weights())
    for name in ("first.weight", "second.weight"):
        graph = load_graph(tmp_path)
        graph.materialize({name: held})
        assert all(torch.equal(t, held) for t in graph.weights().values()), read


DAMAGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "a name that is none": (lambda data: data["source"]["inputs"].update({"x": 1}), r"its source has \['in.put:0', 1\] where names are expected"),
    "outputs that are no list": (lambda data: data["source"].update(outputs="123"), "its source has '123' where names are expected"),
    "an unknown opset": (lambda data: data["source"].update(opset=99), "its source is damaged: opset 99, external False; expected 1 to 26"),
    "an opset with a point": (lambda data: data["source"].update(opset=19.0), r"its source is damaged: opset 19\.0"),
    "a layout in words": (lambda data: data["source"].update(external="no"), "external 'no'"),
    "no weights": (lambda data: data["source"].pop("weights"), "damaged: KeyError: 'weights'"),
    "nothing": (lambda data: data.update(source=None), "damaged: TypeError"),
    "ties that are no list": (lambda data: data.update(ties={"a": "b"}), "its list of ties has 'b' where names are expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    change, sentence = DAMAGES[damage]
    save_graph(rw.capture(theirs(tmp_path / "m.onnx")), tmp_path)
    data = json.loads((tmp_path / "graph.json").read_text(encoding="utf8"))
    change(data)
    (tmp_path / "graph.json").write_text(json.dumps(data), encoding="utf8")
    with pytest.raises(InputFileError, match=sentence) as refused:
        load_graph(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_folder_saved_before_there_was_a_source_still_loads(tmp_path: Path) -> None:
    graph = rw.capture(theirs(tmp_path / "m.onnx"))
    save_graph(graph, tmp_path)
    data = json.loads((tmp_path / "graph.json").read_text(encoding="utf8"))
    del data["source"]
    (tmp_path / "graph.json").write_text(json.dumps(data), encoding="utf8")
    loaded = load_graph(tmp_path)
    assert loaded.source is None and graph.source is not None
    assert torch.equal(loaded.run((torch.ones(2, 40),))[0], graph.run((torch.ones(2, 40),))[0])
