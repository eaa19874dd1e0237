"""ONNX files nobody should trust: each is refused with code 3 and one sentence, and nothing is written; odd but valid ones are taken as they are."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewright.backends.onnx.agreement import agreement
from rewright.ir.errors import InputFileError
from rewright.tools import cli
from rewright.tools.optimize import optimize

HEADER = '<ir_version: 8, opset_import: ["": 18]>'
ADD = f"{HEADER} agraph (float[n, 4] x) => (float[n, 4] y) {{ y = Add (x, w) }}"
ROOT = Path(__file__).resolve().parent.parent.parent


def parsed(body: str, header: str = HEADER) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{header} {body}")


def with_weight(**fields: object) -> onnx.ModelProto:
    """y = x + w with a weight of float32 [4] of which some fields are other than they should be."""
    model = onnx.parser.parse_model(ADD)
    model.graph.initializer.append(TensorProto(**{"name": "w", "data_type": 1, "dims": [4], "raw_data": bytes(16), **fields}))  # type: ignore[arg-type]
    return model


def outside(place: str, **more: str) -> TensorProto:
    """A tensor of 16 bytes in another file."""
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": place, "length": "16", **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def external(place: str, **more: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(ADD)
    model.graph.initializer.append(outside(place, **more))
    return model


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["w"], value=tensor)


def in_attribute() -> onnx.ModelProto:
    model = onnx.parser.parse_model(ADD)
    model.graph.node.insert(0, constant(outside("../secret.bin")))
    return model


def in_subgraph() -> onnx.ModelProto:
    model = parsed("""agraph (float[4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] a) { a = Identity (x) }, else_branch = e () => (float[4] b) { b = Neg (x) }> }""")
    body = model.graph.node[0].attribute[0].g
    body.node.insert(0, constant(outside("../secret.bin")))
    return model


def in_function() -> onnx.ModelProto:
    model = parsed(
        '<domain: "f", opset_import: ["": 18]> g (a) => (b) { b = Relu (a) }',
        f"{ADD.replace('Add (x, w)', 'f.g (x)').replace('18]', '18, ' + chr(34) + 'f' + chr(34) + ': 1]')}",
    )
    model.functions[0].node.insert(0, constant(outside("../secret.bin")))
    return model


def sparse() -> onnx.ModelProto:
    model = onnx.parser.parse_model(ADD)
    places = numpy_helper.from_array(np.array([0, 1, 2, 3]), "places")
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=outside("../secret.bin"), indices=places, dims=[4]))
    return model


def recursive() -> onnx.ModelProto:
    return parsed(
        'agraph (float[n] x) => (float[n] y) { y = f.g (x) } <domain: "f", opset_import: ["": 18, "f": 1]> g (a) => (b) { b = f.g (a) }',
        '<ir_version: 8, opset_import: ["": 18, "f": 1]>',
    )


def nested(depth: int) -> onnx.ModelProto | bytes:
    """If in If in If ..."""

    def bytes_of(number: int, payload: bytes) -> bytes:
        size, out = len(payload), bytes([number << 3 | 2]) if number < 16 else bytes([(number << 3 | 2) & 127 | 128, number >> 4])
        while size > 127:
            out, size = out + bytes([size & 127 | 128]), size >> 7
        return out + bytes([size]) + payload

    leaf = helper.make_graph([helper.make_node("Relu", ["x"], ["z0"])], "leaf", [], [helper.make_tensor_value_info("z0", 1, ["n"])])
    body = leaf.SerializeToString()
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["q"])], "other", [], [helper.make_tensor_value_info("q", 1, ["n"])])
    for i in range(1, depth + 1):
        # a protobuf written by hand: the classes themselves refuse this depth
        value = helper.make_tensor_value_info(f"z{i}", 1, ["n"]).SerializeToString()
        then = helper.make_attribute("else_branch", other).SerializeToString()
        attribute = bytes_of(1, b"then_branch") + bytes_of(6, body) + bytes([20 << 3 & 127 | 128, 1, 5])
        node = bytes_of(1, b"c") + bytes_of(2, f"z{i}".encode()) + bytes_of(4, b"If") + bytes_of(5, attribute) + bytes_of(5, then)
        body = bytes_of(1, node) + bytes_of(2, f"g{i}".encode()) + bytes_of(12, value)
    inputs = [helper.make_tensor_value_info("x", 1, ["n"]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    body += b"".join(bytes_of(11, i.SerializeToString()) for i in inputs)
    return bytes([8, 8]) + bytes_of(7, body) + bytes_of(8, helper.make_opsetid("", 18).SerializeToString())


def without(model: onnx.ModelProto, field: str) -> onnx.ModelProto:
    (model if model.DESCRIPTOR.fields_by_name.get(field) else model.graph).ClearField(field)
    return model


def secret(folder: Path) -> None:
    (folder.parent / "secret.bin").write_bytes(bytes(16))


def linked(folder: Path) -> None:
    secret(folder)
    (folder / "w.bin").symlink_to(folder.parent / "secret.bin")


def parent_linked(folder: Path) -> None:
    (folder.parent / "far").mkdir()
    (folder.parent / "far" / "w.bin").write_bytes(bytes(16))
    (folder / "near").symlink_to(folder.parent / "far")


def hard_linked(folder: Path) -> None:
    secret(folder)
    os.link(folder.parent / "secret.bin", folder / "w.bin")


def whole(folder: Path) -> None:
    (folder / "w.bin").write_bytes(bytes(16))


def nothing(folder: Path) -> None:
    pass


Content = Callable[[], "onnx.ModelProto | bytes"]

INVALID: dict[str, tuple[Content | None, Callable[[Path], object], str]] = {
    "missing": (None, nothing, "no file"),
    "a folder": (None, lambda f: (f / "m.onnx").mkdir(), "is a folder; expected an ONNX model"),
    "a link to itself": (None, lambda f: (f / "m.onnx").symlink_to(f / "m.onnx"), "can't be read"),
    "empty": (lambda: b"", nothing, "has 0 bytes"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(500), nothing, "is not an ONNX model"),
    "text": (lambda: b"not a model at all\n" * 9, nothing, "looks like a text file"),
    "cut in half": (lambda: with_weight().SerializeToString()[:60], nothing, "is not an ONNX model"),
    "a zip archive": (lambda: b"PK\x03\x04" + bytes(100), nothing, "looks like a zip archive"),
    "a GGUF file": (lambda: b"GGUF" + bytes(100), nothing, "looks like a GGUF file"),
    "external data missing": (lambda: external("w.bin"), nothing, "which is missing"),
    "external data above": (lambda: external("../secret.bin"), secret, "leaves the model's folder"),
    "external data absolute": (lambda: external("/etc/hostname"), nothing, "leaves the model's folder"),
    "external data behind a link": (lambda: external("w.bin"), linked, "goes through a symbolic link"),
    "external data in a linked folder": (lambda: external("near/w.bin"), parent_linked, "goes through a symbolic link"),
    "external data hard linked": (lambda: external("w.bin"), hard_linked, "is a hard link to another file"),
    "external data too short": (lambda: external("w.bin"), lambda f: (f / "w.bin").write_bytes(bytes(8)), "that file has 8"),
    "external data behind its end": (lambda: external("w.bin", offset="8"), whole, "at bytes 8 to 24; that file has 16"),
    "a negative offset": (lambda: external("w.bin", offset="-4"), whole, "with the offset '-4'"),
    "an offset in words": (lambda: external("w.bin", offset="ten"), whole, "with the offset 'ten'"),
    "an unknown key": (lambda: external("w.bin", owner="me"), whole, "the unknown key 'owner'"),
    "a drive letter": (lambda: external("C:\\w.bin"), nothing, "leaves the model's folder"),
    "backslashes": (lambda: external("..\\secret.bin"), secret, "leaves the model's folder"),
    "a NUL in the path": (lambda: external("w.bin\0.txt"), whole, "leaves the model's folder"),
    "data above, in an attribute": (in_attribute, secret, "leaves the model's folder"),
    "data above, in a subgraph": (in_subgraph, secret, "leaves the model's folder"),
    "data above, in a function": (in_function, secret, "leaves the model's folder"),
    "data above, in a sparse tensor": (sparse, secret, "leaves the model's folder"),
    "no graph": (lambda: without(with_weight(), "graph"), nothing, "it has no graph with outputs"),
    "no outputs": (lambda: without(with_weight(), "output"), nothing, "it has no graph with outputs"),
    "no IR version": (lambda: without(with_weight(), "ir_version"), nothing, "has the IR version missing; rewright reads 1 to"),
    "an IR version of the future": (
        lambda: parsed("g (float[n] x) => (float[n] y) { y = Relu (x) }", '<ir_version: 99, opset_import: ["": 18]>'),
        nothing,
        "has the IR version 99",
    ),
    "an opset of the future": (
        lambda: parsed("g (float[n] x) => (float[n] y) { y = Relu (x) }", '<ir_version: 8, opset_import: ["": 999]>'),
        nothing,
        "is of opset 999",
    ),
    "a cycle": (lambda: parsed("g (float[n] x) => (float[n] y) { a = Add (x, b) b = Relu (a) y = Neg (b) }"), nothing, "needs its own output (a cycle)"),
    "one name twice": (lambda: parsed("g (float[n] x) => (float[n] y) { a = Relu (x) a = Neg (x) y = Exp (a) }"), nothing, "is not a sound ONNX model"),
    "an input nobody makes": (lambda: parsed("g (float[n] x) => (float[n] y) { y = Add (x, nobody) }"), nothing, "is not a sound ONNX model"),
    "an operator ONNX does not have": (
        lambda: parsed("g (float[n] x) => (float[n] y) { y = Frobnicate (x) }"),
        nothing,
        "is not a sound ONNX model: No Op registered for Frobnicate",
    ),
    "shapes that contradict": (
        lambda: parsed("g (float[2, 3] x, float[4, 5] z) => (float[2, 5] y) { y = MatMul (x, z) }"),
        nothing,
        "is not a sound ONNX model",
    ),
    "an attribute of another type": (
        lambda: parsed('g (float[2, 3] x) => (float[3, 2] y) { y = Transpose <perm = "ab"> (x) }'),
        nothing,
        "is not a sound ONNX model",
    ),
    "a negative dimension": (lambda: with_weight(dims=[-4]), nothing, "a negative dimension"),
    "a dimension of 2^60": (lambda: with_weight(dims=[2**60]), nothing, "bytes; rewright reads"),
    "an input of 2^60": (lambda: parsed(f"g (float[{2**60}] x) => (float[n] y) {{ y = Relu (x) }}"), nothing, "a dimension of"),
    "too little data": (lambda: with_weight(raw_data=bytes(12)), nothing, "16 bytes, and holds 12"),
    "an unknown type": (lambda: with_weight(data_type=77), nothing, "of the unknown type 77"),
    "a function that calls itself": (recursive, nothing, "the function 'g' contains itself"),
    "a nesting of 1000": (lambda: nested(1000), nothing, "is not an ONNX model"),
}


def put(folder: Path, content: Content | None, prepare: Callable[[Path], object]) -> Path:
    folder.mkdir()
    prepare(folder)
    if content is not None:
        made = content()
        (folder / "m.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return folder / "m.onnx"


def run(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    return int(done.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_file_is_refused_in_a_sentence(capsys, tmp_path: Path, what: str) -> None:
    content, prepare, sentence = INVALID[what]
    path = put(tmp_path / "model", content, prepare)
    (tmp_path / "out.onnx").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    code, err = run(capsys, "optimize", str(path), "-r", "clean-onnx", "-o", str(tmp_path / "out.onnx"))
    assert code == 3
    assert sentence in err and err.startswith("rewright: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "out.onnx").read_text() == "precious"


def test_there_are_at_least_the_28_that_peers_were_tried_on() -> None:
    assert len(INVALID) >= 28


@pytest.mark.parametrize("command", [("inspect",), ("cost",), ("export", "-"), ("plan", "-r", "clean-onnx"), ("optimize", "-r", "clean")])
def test_every_command_that_reads_a_file_refuses_it(capsys, tmp_path: Path, command: tuple[str, ...]) -> None:
    path = put(tmp_path / "model", *INVALID["one name twice"][:2])
    name, *rest = (str(tmp_path / "o.onnx") if part == "-" else part for part in command)
    code, err = run(capsys, name, str(path), *rest)
    assert (code, "is not a sound ONNX model" in err, err.count("\n")) == (3, True, 1)


# -- odd, and valid ---------------------------------------------------------------------------------------------------


def kept_bits() -> onnx.ModelProto:
    """Weights of types that numpy has not, as outputs."""
    names = ("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4")
    model = parsed("g (float[n] x) => (float[n] y) { y = Relu (x) }", '<ir_version: 10, opset_import: ["": 21]>')
    for name in names:
        kind = getattr(TensorProto, name)
        size = {"INT4": 2, "UINT4": 2, "FLOAT8E4M3FN": 4}.get(name, 8)
        model.graph.initializer.append(TensorProto(name=name, data_type=kind, dims=[4], raw_data=bytes(range(17, 17 + size))))
        model.graph.output.append(helper.make_tensor_value_info(name, kind, [4]))
    return model


def early() -> onnx.ModelProto:
    """Before IR 4 weights are inputs that a caller may give; this one is an output too."""
    model = with_weight()
    model.ir_version = 3
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [4]))
    model.graph.output.append(helper.make_tensor_value_info("w", 1, [4]))
    return model


def odd_names() -> onnx.ModelProto:
    names = {"x": "<script>\n\"'", "w": "../" + "w" * 10_000, "y": "y\u00fc y"}
    model = with_weight()
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = names[value.name]
    node = model.graph.node[0]
    node.input[:], node.output[:] = [names[n] for n in node.input], [names[n] for n in node.output]
    return model


VALID: dict[str, Content] = {
    "nodes out of order": lambda: parsed("g (float[n] x) => (float[n] y) { y = Exp (a) a = Neg (x) }"),
    "a size of zero": lambda: parsed("g (float[0, 4] x) => (float[0, 4] y) { y = Relu (x) }"),
    "a weight that is input and output": early,
    "an input that is an output": lambda: parsed("g (float[n] x) => (float[n] x, float[n] y) { y = Relu (x) }"),
    "an operator of someone's own": lambda: parsed(
        "g (float[n] x) => (float[n] y) { a = own.Thing <k = 2> (x) b = Identity (a) y = Relu (b) }", '<ir_version: 8, opset_import: ["": 18, "own": 1]>'
    ),
    "functions, one unused": lambda: parsed(
        'g (float[n] x) => (float[n] y) { y = f.a (x) } <domain: "f", opset_import: ["": 18]> a (p) => (q) { q = Relu (p) }'
        ' <domain: "f", opset_import: ["": 18]> b (p) => (q) { q = Neg (p) }',
        '<ir_version: 8, opset_import: ["": 18, "f": 1]>',
    ),
    "odd names": odd_names,
    "weights of NaN and infinity": lambda: with_weight(raw_data=np.array([np.nan, np.inf, -np.inf, 1], np.float32).tobytes()),
    "a terabyte to fold": lambda: parsed(
        "g (float[1] x) => (float[n] y) <int64[2] s = {1000000, 1000000}, int64[1] one = {1}, int64[1] zero = {0}> "
        "{ big = ConstantOfShape (s) row = Gather (big, zero) cut = Slice (row, zero, one, one) flat = Reshape (cut, one) y = Add (flat, x) }"
    ),
    "sequences and strings": lambda: parsed(
        "g (float[n] x, string[m] t) => (float[n] y, string[m] u) <int64 one = {1}> { s = SequenceConstruct (x, x) y = SequenceAt (s, one) u = Identity (t) }"
    ),
    "loops that read the outside": lambda: parsed(
        "g (float[n] x) => (float[n] y) <int64 count = {3}, bool on = {1}> { z = Exp (x) "
        "y = Loop (count, on, x) <body = b (int64 i, bool c, float[n] h) => (bool more, float[n] next) { more = Identity (c) next = Mul (h, z) }> }"
    ),
    "a nesting of 20": lambda: nested(20),
    "what onnx's own inference gets wrong": lambda: parsed(
        "g (float[3, 3, 3, 1] x) => (float[3, 3, 3, 1] y) { y = MeanVarianceNormalization (x) }", '<ir_version: 7, opset_import: ["": 13]>'
    ),
    "types numpy has not": kept_bits,
    "random numbers": lambda: parsed("g (float[n] x) => (float[n] y, float[n] z) { y = RandomNormalLike (x) z = RandomNormalLike (x) }"),
}


@pytest.mark.parametrize("what", VALID)
def test_an_odd_but_valid_file_is_taken_and_stays_what_it_was(capsys, tmp_path: Path, what: str) -> None:
    path, out = put(tmp_path / "model", VALID[what], nothing), tmp_path / "out.onnx"
    code, err = run(capsys, "optimize", str(path), "-r", "clean-onnx", "-o", str(out))
    assert (code, err) == (0, "")
    old, new = onnx.load(path), onnx.load(out)
    onnx.checker.check_model(new)
    assert [(v.name, v.type) for v in new.graph.input] == [(v.name, v.type) for v in old.graph.input]
    assert [v.name for v in new.graph.output] == [v.name for v in old.graph.output]
    if what in ("an operator of someone's own", "a terabyte to fold", "types numpy has not"):  # not to be run
        return
    found = agreement(None, None, path, out)
    assert found.ran and found.why_not is None and found.error == 0


def test_more_of_what_stays(tmp_path: Path) -> None:
    def cleaned(what: str) -> onnx.ModelProto:
        path = put(tmp_path / what, VALID[what], nothing)
        optimize(path, recipe="clean-onnx").export(tmp_path / "out.onnx")
        return onnx.load(tmp_path / "out.onnx")

    own = cleaned("an operator of someone's own").graph.node
    assert [n.op_type for n in own] == ["Thing", "Relu"] and own[0].attribute[0].i == 2
    assert [n.op_type for n in cleaned("random numbers").graph.node] == ["RandomNormalLike"] * 2
    assert "ConstantOfShape" in [n.op_type for n in cleaned("a terabyte to fold").graph.node]
    assert (tmp_path / "out.onnx").stat().st_size < 10_000
    bits = {t.name: t.raw_data for t in cleaned("types numpy has not").graph.initializer}
    assert bits == {t.name: t.raw_data for t in kept_bits().graph.initializer}


def test_a_remark_says_that_nodes_were_sorted(tmp_path: Path) -> None:
    path = put(tmp_path / "model", VALID["nodes out of order"], nothing)
    assert "the file's nodes stood out of order; they were sorted" in optimize(path, recipe="clean-onnx").notes  # type: ignore[attr-defined]


# -- what happens around a file -----------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_worked_on_is_not_written(tmp_path: Path) -> None:
    path = put(tmp_path / "model", lambda: external("w.bin"), whole)
    result = optimize(path, recipe="clean-onnx")
    (path.parent / "w.bin").write_bytes(bytes(15) + b"\1")
    with pytest.raises(InputFileError, match="w.bin was changed while rewright worked on it"):
        result.export(tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, beside: bool) -> None:
    """A limit on the size of files stands in for the disk; weights lie in the file or beside it."""
    model = onnx.parser.parse_model(f"{HEADER} g (float[n, 100] x) => (float[n, 100] y) {{ y = MatMul (x, w) }}")
    model.graph.initializer.append(numpy_helper.from_array(np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32), "w"))
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(model, path, save_as_external_data=beside, location="m.bin", size_threshold=0)
    out.write_text("precious")
    before = sorted(p.name for p in tmp_path.iterdir())
    code = f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'conftest.py')!r}); from rewright.tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "optimize", str(path), "-r", "clean-onnx", "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stderr and done.stderr.count("\n") == 1
    assert out.read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == before
