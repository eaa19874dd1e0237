"""ONNX out: names and dims kept, equal in onnxruntime at several shapes, in the forms that run fast, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx import export as module
from rewright.backends.onnx.export import default_opset, export
from rewright.backends.onnx.session import Session
from rewright.ir.errors import InputFileError, PromiseBroken, UsageError
from rewright.passes.pipeline import Pipeline
from rewright.passes.recipe import Recipe, make_pass
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..passes.encoder import encoder, example


@pytest.fixture(scope="module")
def graph():
    return capture(encoder(), (), example())


@pytest.fixture(scope="module")
def flat(graph):
    return as_flat(graph, example())


def optimized(graph, flat, *names: str):
    outcome = Pipeline([make_pass(n, {}) for n in names]).run(graph, [flat])
    assert not outcome.undone
    return outcome.graph


def ops(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def ran(path: Path, flat, tmp_path: Path) -> dict[str, int]:
    """The kernels onnxruntime really ran, from its profile."""
    session = Session(path, profile=tmp_path / "profile")
    session(flat)
    found: dict[str, int] = {}
    for event in json.loads(Path(session.session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] = found.get(event["args"]["op_name"], 0) + 1
    return found


@pytest.mark.parametrize("profile", ["ort", "pure"])
def test_an_encoder_agrees_at_several_shapes_and_keeps_its_names(graph, flat, tmp_path: Path, profile) -> None:
    done = export(optimized(graph, flat, "fuse-add-layer-norm", "pack-heads"), tmp_path / "m.onnx", [flat], profile)
    assert done.parity is not None
    assert done.parity.inputs == 4
    assert done.parity.relative_error < 1e-5
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=False)
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask"]
    dims = [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    assert dims == [["batch", "sequence"]] * 2
    assert {node.domain for node in model.graph.node} == {""}
    assert b"site-packages" not in (tmp_path / "m.onnx").read_bytes(), "no stack traces, no paths of this machine"


def test_the_fast_forms_reach_onnxruntime(graph, flat, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export(optimized(graph, flat, "fuse-add-layer-norm", "pack-heads", "quantize-linear"), path, [flat])
    kernels = ran(path, flat, tmp_path)
    assert kernels["Attention"] == 2
    assert kernels["DynamicQuantizeMatMul"] + kernels["MatMulIntegerToFloat"] == 12
    assert kernels["DynamicQuantizeLinear"] == 2, "q, k and v share one quantization"
    assert not {"SkipLayerNormalization", "DequantizeLinear", "MatMulInteger", "Transpose", "IsNaN"} & set(kernels)


def test_quantized_outputs_agree_within_the_graphs_own_sensitivity(graph, flat, tmp_path: Path) -> None:
    quantized = optimized(graph, flat, "quantize-linear")
    done = export(quantized, tmp_path / "m.onnx", [flat])
    assert done.parity is not None
    assert done.parity.cosine > 0.9999
    assert done.bytes < 0.5 * sum(t.nbytes for t in graph.weights().values())


@pytest.mark.parametrize(("causal", "window", "padded"), [(True, None, False), (True, None, True), (True, 3, False), (False, 3, True)])
def test_attention_masks_survive(tmp_path: Path, causal: bool, window: int | None, padded: bool) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return torch.ops.rewright.attention(q, q, q, mask.bool() if padded else None, causal, window, 0.3, None, None)

    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    graph = capture(Masked(), (torch.randn(2, 7, 16), mask), dynamic_shapes={"x": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}})
    flat = as_flat(graph, (torch.randn(2, 7, 16), mask))
    done = export(graph, tmp_path / "m.onnx", [flat])
    assert done.opset == 23
    assert done.parity is not None
    assert done.parity.relative_error < 1e-5
    assert ops(tmp_path / "m.onnx")["Attention"] == 1


def test_rope_keeps_the_older_opset(graph) -> None:
    class Rotates(nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q = torch.ops.rewright.rope(x, cos, sin)
            return torch.ops.rewright.attention(q, q, x)

    x = torch.randn(2, 2, 5, 8)
    rotating = capture(Rotates(), (x, torch.randn(5, 8), torch.randn(5, 8)), dynamic_shapes={"x": {0: "batch"}})
    assert default_opset(rotating, "ort") == 20
    assert default_opset(graph, "ort") == 23
    assert default_opset(graph, "pure") == 20


def test_a_wrong_form_is_caught_and_the_old_file_stays(graph, flat, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("precious")
    real = module.load_forms

    def wrong(profile, opset):
        forms = real(profile, opset)
        forms[torch.ops.rewright.add_layer_norm.default] = lambda x, r, w, b, eps: (torch.nn.functional.layer_norm(x - r, [x.shape[-1]], w, b, eps), x + r)
        return forms

    monkeypatch.setattr(module, "load_forms", wrong)
    with pytest.raises(PromiseBroken, match="does not agree"):
        export(optimized(graph, flat, "fuse-add-layer-norm"), path, [flat])
    assert path.read_text() == "precious"
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_a_wrong_quantized_form_is_caught_too(graph, flat, tmp_path: Path, monkeypatch) -> None:
    real = module.load_forms

    def wrong(profile, opset):
        forms = real(profile, opset)
        right = forms[torch.ops.rewright.linear_int8_dynamic.default]
        forms[torch.ops.rewright.linear_int8_dynamic.default] = lambda x, w, scale, b=None: right(x, w, scale * 1.02, b)
        return forms

    monkeypatch.setattr(module, "load_forms", wrong)
    with pytest.raises(PromiseBroken, match="rounding alone"):
        export(optimized(graph, flat, "quantize-linear"), tmp_path / "m.onnx", [flat])


def test_large_weights_go_to_a_file_beside(graph, flat, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXTERNAL_BYTES", 1000)
    export(graph, tmp_path / "m.onnx", [flat])
    assert {f.name for f in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert np.allclose(Session(tmp_path / "m.onnx")(flat)[0], graph.run(flat)[0], atol=1e-5)


def test_a_graph_without_weights_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    graph = capture(model, (torch.ones(2, 4, device="meta"),))
    with pytest.raises(UsageError, match="without weights"):
        export(graph, tmp_path / "m.onnx")


def test_garbage_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(InputFileError, match="can't load"):
        Session(tmp_path / "x.onnx")


def test_the_shipped_recipes_parse() -> None:
    assert Recipe.load("encoder-int8").passes[-1].name == "quantize-linear"
    assert all(p.exact for p in Recipe.load("clean").passes)


# -- ops that never dissolve ------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.rewright.grouped_linear(x, self.weight, ends)


def test_grouped_linear_runs_in_onnxruntime_with_any_sizes_of_groups_and_none(tmp_path: Path) -> None:
    graph = capture(Experts(), (torch.randn(7, 8), torch.tensor([2, 3, 7])), dynamic_shapes={"x": {0: "rows"}})
    assert not export(graph, tmp_path / "m.onnx").parity
    session = Session(tmp_path / "m.onnx")
    for sizes in ((2, 1, 4), (0, 6, 0), (1, 0, 0), (0, 0, 9)):
        flat = torch.randn(sum(sizes), 8), torch.tensor(sizes).cumsum(0)
        torch.testing.assert_close(session(flat)[0], graph.run(flat)[0])


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(-torch.rand(4, 3))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.ops.rewright.selective_scan(x, dt, self.a, b, c)


def scan_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 4, length), torch.rand(batch, 4, length), torch.randn(batch, 3, length), torch.randn(batch, 3, length)


def test_selective_scan_is_one_scan_in_onnxruntime_at_any_length(tmp_path: Path) -> None:
    axes = {0: "batch", 2: "length"}
    graph = capture(Scan(), scan_inputs(2, 6), dynamic_shapes=dict.fromkeys(("x", "dt", "b", "c"), axes))
    export(graph, tmp_path / "m.onnx")
    assert ops(tmp_path / "m.onnx")["Scan"] == 1
    session = Session(tmp_path / "m.onnx")
    for batch, length in ((2, 6), (1, 1), (3, 40)):
        flat = scan_inputs(batch, length)
        torch.testing.assert_close(session(flat)[0], graph.run(flat)[0])


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.isfinite().all().item())
        return x * 2


def test_assertions_are_left_out_of_the_file(tmp_path: Path) -> None:
    graph = capture(Checked(), torch.randn(2, 3))
    export(graph, tmp_path / "m.onnx", [(torch.randn(2, 3),)])
    assert ops(tmp_path / "m.onnx") == {"Mul": 1}


class Special(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


def test_an_op_onnx_lacks_is_named_in_one_sentence(tmp_path: Path) -> None:
    graph = capture(Special(), torch.randn(2, 3))
    with pytest.raises(UsageError, match="can't express the graph: .*special_airy_ai") as error:
        export(graph, tmp_path / "m.onnx")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m.onnx").exists()


def test_an_output_may_be_called_like_a_value_inside(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"linear": self.b(self.a(x).relu())}

    x = torch.randn(3, 4)
    graph = capture(Named().eval(), (x,))
    export(graph, tmp_path / "m.onnx", [(x,)])
    assert Session(tmp_path / "m.onnx").session.get_outputs()[0].name == "linear"
