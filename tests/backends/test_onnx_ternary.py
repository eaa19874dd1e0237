"""Ternary linears in onnxruntime: the same integers, constants unpacked once when the file is loaded, two bits a weight in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx import export as module
from rewright.backends.onnx.export import Profile, export
from rewright.backends.onnx.session import Session
from rewright.ir import ops
from rewright.ir.capture import capture
from rewright.ir.errors import PromiseBroken
from rewright.ir.formats import pack

from .test_onnx_quantized import Calls, attribute, constants, kinds, only, optimized, slow

torch.set_num_threads(1)
OPS = torch.ops.rewright
PROFILES: tuple[Profile, ...] = ("ort", "pure")


class Ternary(nn.Module):
    """Random codes with a scale a row."""

    def __init__(self, inputs: int, outputs: int, activations: str = "int8-token", bias: bool = True) -> None:
        super().__init__()
        self.activations = activations
        self.register_buffer("w", pack(torch.randint(0, 3, (outputs, inputs)), 2))
        self.scale = nn.Parameter(torch.rand(outputs) + 0.1)
        self.b = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return OPS.ternary_linear(x, self.w, self.scale, self.b, self.activations)


class Block(nn.Module):
    """Three projections of one norm's output, a gated FFN: 6 products, 4 distinct inputs."""

    def __init__(self, activations: str = "int8-token") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.rand(64) + 0.5)
        self.q, self.k, self.v, self.out = (Ternary(64, 64, activations) for _ in range(4))
        self.up, self.down = Ternary(64, 96, activations), Ternary(96, 64, activations, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = OPS.rms_norm(x, self.norm, 1e-6)
        x = x + self.out(self.q(y) * self.k(y) + self.v(y))
        return x + self.down(torch.relu(self.up(x)).square())


@pytest.mark.parametrize("profile", PROFILES)
def test_codes_of_every_case_are_the_same_integers(profile: Profile, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = [case for case in ops.ternary_linear.cases(torch.float32, "cpu") if case[4] == "int8-token"]
    operands = tuple(case[0] for case in cases)
    done = export(capture(Calls("ternary_linear", cases), (list(operands),)), tmp_path / "m.onnx", [operands], profile)
    assert done.parity is not None
    assert done.parity.relative_error < 5e-7


@pytest.mark.parametrize("profile", PROFILES)
def test_ties_fall_as_in_torch(profile: Profile, tmp_path: Path) -> None:
    torch.manual_seed(0)
    largest = torch.rand(200, 1) + 0.5
    x = (torch.randint(-127, 127, (200, 64)) + 0.5) * (largest / 127)
    x[:, :1], x[0], x[1] = largest, 0, 1e-7
    layer = Ternary(64, 64, bias=False)
    layer.w, layer.scale.data = pack(torch.eye(64) + 1, 2), torch.ones(64)  # each code by itself
    graph = capture(layer, (x,))
    export(graph, tmp_path / "m.onnx", (), profile)
    found, inverse = Session(tmp_path / "m.onnx")((x,))[0], 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    assert torch.equal((found * inverse).round(), (graph.run((x,))[0] * inverse).round())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_block_is_integer_products_of_constant_int8_weights(profile: Profile, dynamic: bool, tmp_path: Path) -> None:  # R1, R2, R3, R12
    x = torch.randn(2, 5, 64)
    graph = capture(Block(), (x,), dynamic_shapes={"x": {0: "batch", 1: "sequence"} if dynamic else {}})
    done = export(graph, tmp_path / "m.onnx", [(x,)], profile)
    assert done.parity is not None
    assert done.parity.cosine > 0.9999
    ran = optimized(tmp_path / "m.onnx")
    assert not slow(ran)
    found = kinds(ran)
    assert found["MatMulIntegerToFloat"] == 6
    assert found["QuantizeLinear"] == found["ReduceMax"] == 4, "q, k and v share one"
    assert not {"Gemm", "MatMul", "FusedMatMul", "DequantizeLinear", "MatMulInteger", "Transpose", "Gather", "BitShift", "MatMulNBits"} & set(found)
    held = constants(ran)
    weights = [held[n.input[1]] for n in only(ran, "MatMulIntegerToFloat")]
    assert Counter((tuple(w.dims), w.data_type) for w in weights) == {((64, 64), onnx.TensorProto.INT8): 4, ((64, 96), 3): 1, ((96, 64), 3): 1}
    assert {v for w in weights for v in onnx.numpy_helper.to_array(w).flatten().tolist()} == {-1, 0, 1}


@pytest.mark.parametrize("activations", ["int8-token", "none"])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_file_holds_two_bits_a_weight(profile: Profile, activations: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 403)
    graph = capture(Ternary(403, 1001, activations), (x,))
    done = export(graph, tmp_path / "m.onnx", [(x,)], profile)
    assert done.bytes < 1001 * 101 + 25_000, "codes, scale, bias; MatMulNBits wants the scale once a block"
    assert "BitShift" not in kinds(onnx.load(tmp_path / "m.onnx").graph), "ten times as long to load"
    assert done.parity is not None
    assert done.parity.relative_error < (0.01 if (profile, activations) == ("ort", "none") else 1e-6)


@pytest.mark.parametrize("inputs", [8, 40, 64, 129, 400])
def test_float_activations_take_4_bits_that_are_exact_without_the_rounding_onnxruntime_adds(inputs: int, tmp_path: Path, monkeypatch) -> None:  # R6, R7
    torch.manual_seed(0)
    x, exact = torch.randn(7, inputs), []
    check = module._parity
    monkeypatch.setattr(module, "_parity", lambda graph, session, flats, *_: exact.append(check(graph, session, flats, 1e-5, tmp_path)))
    done = export(capture(Ternary(inputs, 33, "none"), (x,)), tmp_path / "m.onnx", [(x,)])
    assert len(exact) == 1
    assert exact[0].relative_error < 1e-6
    assert done.parity is not None
    assert 1e-4 < done.parity.relative_error < 0.03
    ran = optimized(tmp_path / "m.onnx")
    assert kinds(ran) == {"MatMulNBits": 1}, "with the bias inside"
    (product,) = only(ran, "MatMulNBits")
    assert [attribute(product, name) for name in ("K", "N", "bits", "accuracy_level")] == [inputs, 33, 4, 4]
    assert attribute(product, "block_size") == {8: 16, 40: 32, 64: 64, 129: 128, 400: 128}[inputs]
    assert constants(ran)[product.input[1]].data_type == onnx.TensorProto.UINT8


def test_float_activations_of_the_pure_profile_stay_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = [case for case in ops.ternary_linear.cases(torch.float32, "cpu") if case[4] == "none"]
    operands = tuple(case[0] for case in cases)
    done = export(capture(Calls("ternary_linear", cases), (list(operands),)), tmp_path / "m.onnx", [operands], "pure")
    assert done.parity is not None
    assert done.parity.relative_error < 1e-6
    assert not only(optimized(tmp_path / "m.onnx"), "MatMulNBits", "DequantizeLinear", "Gather")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("activations", ["int8-token", "none"])
def test_wrong_scales_are_refused(activations: str, profile: Profile, tmp_path: Path, monkeypatch) -> None:
    right = module.load_forms

    def wrong(profile: Profile, opset: int) -> dict:
        forms = right(profile, opset)
        good = forms[OPS.ternary_linear.default]
        forms[OPS.ternary_linear.default] = lambda x, w, scale, *rest: good(x, w, scale * torch.linspace(0.99, 1.01, 32), *rest)
        return forms

    monkeypatch.setattr(module, "load_forms", wrong)
    x = torch.randn(4, 5, 64)
    with pytest.raises(PromiseBroken, match="does not agree"):
        export(capture(Ternary(64, 32, activations), (x,)), tmp_path / "m.onnx", [(x,)], profile)
