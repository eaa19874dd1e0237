"""Weights of an ONNX file take no memory before they are written: those beside it are the file's own pages, those inside it are there once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rewright.backends.onnx.export import export
from rewright.ir.errors import InputFileError
from rewright.ir.onnx.external import SMALLEST
from rewright.ir.onnx.model import read_onnx, torch_tensor
from rewright.ir.onnx_import import import_onnx

ROOT = Path(__file__).resolve().parent.parent.parent
WIDTH = 160  # a weight of 102,400 bytes, more than is copied


def layers(count: int, width: int, seed: int = 0) -> onnx.ModelProto:
    """x -> Relu(MatMul(x, w)), so many times."""
    generator, nodes, weights = np.random.default_rng(seed), [], []
    for i in range(count):
        weights.append(numpy_helper.from_array(generator.standard_normal((width, width), dtype=np.float32), f"w{i}"))
        nodes += [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"]), helper.make_node("Relu", [f"m{i}"], [f"h{i + 1}"])]
    ends = [helper.make_tensor_value_info(name, 1, ["n", width]) for name in ("h0", f"h{count}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])


def beside(path: Path, model: onnx.ModelProto, before: int = 0, place: str = "w.bin") -> Path:
    """The model with its weights in a file beside it, behind so many bytes of something else."""
    held = bytearray(before)
    for tensor in model.graph.initializer:
        content = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", place), ("offset", len(held)), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
        held += content
    path.parent.mkdir(exist_ok=True)
    path.with_name(place).write_bytes(held)
    path.write_bytes(model.SerializeToString())
    return path


MEASURE = """
import json, sys
from rewright.ir.onnx_import import import_onnx

def anonymous():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))

import_onnx(sys.argv[1])
grown = {}
for path in sys.argv[2:]:
    before = anonymous()
    graph = import_onnx(path)
    grown[path] = (anonymous() - before) / graph.weight_bytes()
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not say whose pages are whose")
def test_an_import_takes_memory_once_for_weights_inside_and_none_for_those_beside(tmp_path: Path) -> None:
    first, inside = tmp_path / "first.onnx", tmp_path / "inside.onnx"
    onnx.save(layers(2, 8), first)
    model = layers(4, 2048)  # 64 MiB
    onnx.save(model, inside)
    askew, mapped = beside(tmp_path / "askew" / "m.onnx", layers(4, 2048), before=20), beside(tmp_path / "mapped" / "m.onnx", model)
    paths = [str(path) for path in (first, mapped, askew, inside)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, cwd=ROOT.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    grown = json.loads(done.stdout)
    assert grown[str(mapped)] < 0.2, grown
    assert 0.9 < grown[str(askew)] < 1.2, grown
    assert 0.9 < grown[str(inside)] < 1.5, grown  # twice would be the parsed file as well


def test_training_writes_into_copies_never_into_the_file(tmp_path: Path) -> None:
    graph = import_onnx(beside(tmp_path / "m.onnx", layers(2, WIDTH)))
    held = (tmp_path / "w.bin").read_bytes()
    before = graph.weight("w0").detach().clone()
    optimizer = torch.optim.Adam(graph.module.parameters(), lr=0.1)
    graph(torch.ones(3, WIDTH))["h2"].sum().backward()
    optimizer.step()
    assert not torch.equal(graph.weight("w0"), before)
    assert (tmp_path / "w.bin").read_bytes() == held
    assert torch.equal(import_onnx(tmp_path / "m.onnx").weight("w0"), before)


def test_a_file_that_is_replaced_stays_what_it_was_for_those_who_read_it(tmp_path: Path) -> None:
    """Exports to the very path that the graph came from, its weights still unread."""
    path, x = beside(tmp_path / "m.onnx", layers(1, WIDTH), place="m.onnx.data"), torch.ones(2, WIDTH)
    graph, wanted = import_onnx(path), import_onnx(path).run((x,))[0]
    other = import_onnx(beside(tmp_path / "other" / "m.onnx", layers(1, WIDTH, seed=1)))
    export(other, path)
    assert not torch.equal(import_onnx(path).run((x,))[0], wanted)
    assert torch.equal(graph.run((x,))[0], wanted)
    export(graph, path, [(x,)])
    assert torch.equal(import_onnx(path).run((x,))[0], wanted)


DTYPES = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "BOOL", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT64", "UINT64")


@pytest.mark.parametrize("before", [0, 20])
@pytest.mark.parametrize("dtype", [*DTYPES, "COMPLEX64", "COMPLEX128", "INT4", "UINT4"])
def test_numbers_of_every_type_are_the_same_inside_and_beside_and_lie_straight(tmp_path: Path, dtype: str, before: int) -> None:
    """Of more bytes than are copied, of a few and of none."""
    bits = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype)).itemsize * (4 if dtype.endswith("INT4") else 8)
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]> agraph (float[n] x) => (float[n] y) { y = Relu (x) }')
    for name, count in (("large", 8 * SMALLEST // bits), ("small", 6), ("empty", 0)):
        content = np.random.default_rng(0).integers(0, 2, count * bits // 8, np.uint8).tobytes()  # 0 and 1: what a bool may be
        model.graph.initializer.append(TensorProto(name=name, data_type=getattr(TensorProto, dtype), dims=[2, count // 2], raw_data=content))
    onnx.save(model, tmp_path / "inside.onnx")
    inside, outside = read_onnx(tmp_path / "inside.onnx").model, read_onnx(beside(tmp_path / "outside.onnx", model, before)).model
    for name in ("large", "small", "empty"):
        a, b = (torch_tensor(m.graph.initializers[name].const_value, name) for m in (inside, outside))
        assert a.dtype == b.dtype and a.shape == b.shape and a.data_ptr() % 64 == b.data_ptr() % 64 == 0
        assert a.contiguous().view(torch.uint8).tolist() == b.contiguous().view(torch.uint8).tolist()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _linked(file: Path) -> None:
    os.rename(file, file.with_name("secret.bin"))
    os.symlink("secret.bin", file)


def _hard_linked(file: Path) -> None:
    os.link(file, file.with_name("secret.bin"))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (_cut, "can't be read from"),
    "gone": (Path.unlink, "No such file"),
    "a link": (_linked, "has become a link since it was checked"),
    "a hard link": (_hard_linked, "has become a link since it was checked"),
}


@pytest.mark.parametrize("before", [0, 20])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_since_the_check_is_refused(tmp_path: Path, change: str, before: int) -> None:
    model = read_onnx(beside(tmp_path / "m.onnx", layers(1, WIDTH), before)).model
    prepare, sentence = CHANGES[change]
    prepare(tmp_path / "w.bin")
    with pytest.raises(InputFileError, match="the weight 'w0'") as caught:
        torch_tensor(model.graph.initializers["w0"].const_value, "the weight 'w0'")
    assert sentence in str(caught.value)


def test_constants_of_a_function_that_is_called_twice_train_apart(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "own": 1]> agraph (float[n, 2] x) => (float[n, 2] y) { a = own.f (x) y = own.f (a) }
    <domain: "own", opset_import: ["": 18]> f (x) => (y) { w = Constant <value = float[2] {1, 2}> () y = Mul (x, w) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    graph = import_onnx(tmp_path / "m.onnx")
    first, second = graph.module.parameters()
    with torch.no_grad():
        first.add_(1)
    assert second.tolist() == [1.0, 2.0]


def test_a_constant_of_a_function_lies_beside_the_model_too(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "own": 1]> agraph (float[n, 2] x) => (float[n, 2] y) { y = own.f (x) }
    <domain: "own", opset_import: ["": 18]> f (x) => (y) { w = Constant <value = float[2] {1, 2}> () y = Mul (x, w) }"""
    model = onnx.parser.parse_model(text)
    weight = model.functions[0].node[0].attribute[0].t
    weight.CopyFrom(TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL))
    weight.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(np.array([3, 4], np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert import_onnx(tmp_path / "m.onnx")(torch.ones(1, 2))["y"].tolist() == [[3.0, 4.0]]
