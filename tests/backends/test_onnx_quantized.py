"""Quantized layers as onnxruntime really runs them: rules R1 to R14 of specs/quant_shiftadd.md 6 on its optimised graph, and the facts behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

from rewright.backends.onnx import export as module
from rewright.backends.onnx.export import FORMS, Profile, export
from rewright.backends.onnx.session import Session
from rewright.backends.target import cpu_features
from rewright.ir import ops
from rewright.ir.capture import capture
from rewright.ir.errors import PromiseBroken
from rewright.ir.formats import WEIGHTS, Format, codes, grid, grouped, pack
from rewright.ir.graph import Graph

from ..ir.block_models import usual

torch.set_num_threads(1)
OPS = torch.ops.rewright
aten = torch.ops.aten
PROFILES: tuple[Profile, ...] = ("ort", "pure")
INTEGER = ("dynamic", "static", "token")
KINDS = (*INTEGER, "nbits4", "nbits8")


# -- the graph onnxruntime runs -------------------------------------------------------------------------------------------


def optimized(model: Path, **config: str) -> onnx.GraphProto:
    """config: session options, with _ for the dot of their names."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(model.with_suffix(".optimized"))
    for key, value in config.items():
        options.add_session_config_entry(key.replace("_", ".", 1), value)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(n.op_type for n in graph.node)


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in graph.initializer}


def only(graph: onnx.GraphProto, *op_types: str) -> list[onnx.NodeProto]:
    return [n for n in graph.node if n.op_type in op_types]


def attribute(node: onnx.NodeProto, name: str) -> int:
    return next(a.i for a in node.attribute if a.name == name)


def slow(graph: onnx.GraphProto) -> list[str]:
    """What section 6 forbids: dequantized operands of float products, and int8 activations."""
    made_by = {out: n.op_type for n in graph.node for out in n.output}
    types = {name: t.data_type for name, t in constants(graph).items()}
    types.update({n.output[0]: types.get(n.input[2], onnx.TensorProto.UINT8) for n in only(graph, "QuantizeLinear")})
    bad = [
        f"{n.op_type} behind DequantizeLinear"
        for n in only(graph, "Gemm", "MatMul", "FusedMatMul", "FusedGemm")
        if any(made_by.get(i) == "DequantizeLinear" for i in n.input)
    ]
    integer = only(graph, "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul")
    return bad + [f"{n.op_type} of int8 activations" for n in integer if types.get(n.input[0]) == onnx.TensorProto.INT8]


# -- models ---------------------------------------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A linear in one of the quantized ops, from random float weights."""

    def __init__(self, kind: str, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        w = torch.randn(outer, inner) / inner**0.5
        self.register_buffer("b", torch.randn(outer) if bias else None)
        if kind.startswith("nbits"):
            self.form = Format("int", int(kind.removeprefix("nbits")), "group", symmetric=False)
            parts = grouped(w, self.form, 16)
            on = grid(parts, self.form)
            self.register_buffer("w", pack(codes(parts, on, self.form), self.form.bits))
            self.register_buffer("scale", on.scale[..., 0].contiguous())
            self.register_buffer("zero_point", pack(on.zero_point[..., 0], self.form.bits))
            return
        on = grid(w, WEIGHTS["int8-channel"])
        self.register_buffer("w", codes(w, on, WEIGHTS["int8-channel"]).to(torch.int8))
        self.register_buffer("scale", on.scale[:, 0].contiguous())
        self.register_buffer("x_scale", torch.tensor(0.03))
        self.register_buffer("x_zero_point", torch.tensor(117, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "static":
            return OPS.linear_int8_static(x, self.x_scale, self.x_zero_point, self.w, self.scale, self.b)
        if self.kind.startswith("nbits"):
            return OPS.linear_nbits(x, self.w, self.scale, self.zero_point, self.b, self.form.bits, 16)
        return (OPS.linear_int8_dynamic if self.kind == "dynamic" else OPS.linear_token)(x, self.w, self.scale, self.b)


class Block(nn.Module):
    """Three projections of one norm's output, a residual, and a two-layer FFN: 5 products, 3 distinct inputs."""

    def __init__(self, kind: str, smoothing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v = (Quantized(kind, 64, 64) for _ in range(3))
        self.up, self.down = Quantized(kind, 64, 96), Quantized(kind, 96, 64, bias=False)
        self.smoothing = nn.Parameter(torch.rand(96) + 0.5) if smoothing else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.q(y) * self.k(y) + self.v(y)
        hidden = F.gelu(self.up(x))
        return x + self.down(hidden if self.smoothing is None else hidden * self.smoothing)


def captured(model: nn.Module, *shape: int, dynamic: bool = True) -> tuple[Graph, Tensor]:
    x = torch.randn(*shape)
    axes = {"x": {0: "batch", 1: "sequence"} if dynamic else {}}
    return capture(model.eval(), (x,), dynamic_shapes=axes), x


@pytest.fixture(scope="module")
def block(tmp_path_factory) -> Callable[..., onnx.GraphProto]:
    """The block as onnxruntime runs it, in parity; each made once."""
    folder = tmp_path_factory.mktemp("blocks")

    @cache
    def exported(kind: str, profile: Profile, dynamic: bool = True, smoothing: bool = False) -> onnx.GraphProto:
        graph, x = captured(Block(kind, smoothing), 2, 5, 64, dynamic=dynamic)
        done = export(graph, folder / "m.onnx", [(x,)], profile)
        assert done.parity is not None
        assert done.parity.cosine > 0.9999  # a value at a tie may fall to the other side (R13)
        return optimized(folder / "m.onnx")

    return exported


@pytest.mark.parametrize(
    ("kind", "profile", "dynamic"),
    [*((k, p, True) for k in KINDS for p in PROFILES), *((k, p, False) for k in ("static", "token", "nbits4") for p in PROFILES), ("dynamic", "ort", False)],
)
def test_no_form_leaves_a_float_product_of_dequantized_weights(block, kind: str, profile: Profile, dynamic: bool) -> None:  # R1, R2, R10
    graph = block(kind, profile, dynamic)
    assert not slow(graph)
    found = kinds(graph)
    if kind.startswith("nbits"):
        assert found["MatMulNBits"] == 5
    elif (kind, profile) == ("static", "pure"):
        assert found["QGemm"] == 5
    else:
        assert found["MatMulIntegerToFloat"] + found["DynamicQuantizeMatMul"] == 5
    assert not {"Gemm", "MatMul", "FusedMatMul", "DequantizeLinear", "MatMulInteger", "Transpose", "BitShift"} & set(found)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_constants_as_the_products_want_them(block, kind: str, profile: Profile) -> None:  # R3, R6
    graph = block(kind, profile)
    held = constants(graph)
    found = Counter()
    for node in only(graph, "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        found[tuple(held[node.input[1]].dims)] += 1
        assert held[node.input[1]].data_type == onnx.TensorProto.INT8
    for node in only(graph, "QGemm"):
        assert attribute(node, "transB") == 1
        found[tuple(held[node.input[3]].dims)[::-1]] += 1
        assert held[node.input[3]].data_type == onnx.TensorProto.INT8
    for node in only(graph, "MatMulNBits"):
        inner, outer = attribute(node, "K"), attribute(node, "N")
        assert attribute(node, "accuracy_level") == 4
        assert list(held[node.input[1]].dims) == [outer, inner // 16, 16 * attribute(node, "bits") // 8]
        found[inner, outer] += 1
    assert found == {(64, 64): 3, (64, 96): 1, (96, 64): 1}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", INTEGER)
def test_projections_of_one_input_share_its_quantization(block, kind: str, profile: Profile) -> None:  # R12
    found = kinds(block(kind, profile))
    inputs = found["QuantizeLinear"] + found["DynamicQuantizeLinear"] + found["DynamicQuantizeMatMul"]  # the last has one of its own inside
    assert inputs == 3, "of the norm, of the residual stream, of the activation: q, k and v each have a copy of the grid"
    assert found["ReduceMax"] == (3 if kind == "token" else 0)


@pytest.mark.parametrize("profile", PROFILES)
def test_outputs_stay_float_and_the_rest_of_the_block_too(block, profile: Profile) -> None:  # R4
    graph = block("static", profile)
    assert not {"QLinearMatMul", "DequantizeLinear", "QLinearAdd", "QLinearMul"} & set(kinds(graph))
    assert all(len(n.input) < 8 or not n.input[7] for n in only(graph, "QGemm")), "no output scale"
    assert {"LayerNormalization"} & set(kinds(graph))
    assert {"Gelu", "BiasGelu"} & set(kinds(graph))


@pytest.mark.parametrize("profile", PROFILES)
def test_explicit_smoothing_is_one_product_before_one_grid_for_the_tensor(block, profile: Profile) -> None:  # R5
    graph = block("static", profile, smoothing=True)
    assert kinds(graph) - kinds(block("static", profile)) == Counter(Mul=1)
    held = constants(graph)
    assert all(not held[n.input[1]].dims for n in only(graph, "QuantizeLinear")), "a vector of scales along the last axis takes a scalar path"


@pytest.mark.parametrize("kind", ["dynamic", "static", "nbits4", "nbits8"])
def test_the_bias_is_inside_the_product(block, kind: str) -> None:  # R1
    assert kinds(block(kind, "ort"))["Add"] == 3, "the residuals alone"


# -- weight-only ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_nbits_is_exact_without_rounded_activations_and_within_a_percent_with_them(profile: Profile, tmp_path: Path, monkeypatch) -> None:  # R6, R7
    torch.manual_seed(0)
    cases = list(ops.linear_nbits.cases(torch.float32, "cpu"))
    operands = tuple(case[0] for case in cases)
    graph = capture(Calls("linear_nbits", cases), (list(operands),))
    exact = []
    check = module._parity
    monkeypatch.setattr(module, "_parity", lambda graph, session, flats, *_: exact.append(check(graph, session, flats, 1e-5, tmp_path)))
    done = export(graph, tmp_path / "m.onnx", [operands], profile)
    assert len(exact) == 1
    assert exact[0].relative_error < 1e-6
    assert done.parity is not None
    assert 1e-4 < done.parity.relative_error < 0.01


def test_levels_of_accuracy_are_what_the_parity_check_takes_them_for(tmp_path: Path) -> None:  # R6, R7
    graph, _ = captured(Quantized("nbits4", 64, 32), 2, 5, 64)
    export(graph, tmp_path / "ort.onnx", (), "ort")
    export(graph, tmp_path / "pure.onnx", (), "pure")
    levels = [attribute(n, "accuracy_level") for n in optimized(tmp_path / "ort.onnx").node]
    default = [attribute(n, "accuracy_level") for n in optimized(tmp_path / "pure.onnx").node]
    exact = [attribute(n, "accuracy_level") for n in optimized(tmp_path / "pure.onnx", session_qdq_matmulnbits_accuracy_level="0").node]
    assert (levels, default, exact) == ([4], [4], [0])


class Twice(nn.Module):
    """One layer called twice (ALBERT), and another with the same scales."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = Quantized("nbits4", 64, 64), Quantized("nbits4", 64, 64)
        self.other.scale, self.other.zero_point = self.layer.scale, self.layer.zero_point

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.gelu(self.layer(F.gelu(self.layer(x)))))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_read_twice_are_still_fused(shared: bool, tmp_path: Path, monkeypatch) -> None:  # R7
    if shared:
        monkeypatch.setattr(module.constants, "separate", lambda model: None)
    graph, x = captured(Twice(), 2, 5, 64)
    export(graph, tmp_path / "m.onnx", [(x,)], "pure")
    found = kinds(optimized(tmp_path / "m.onnx"))
    if shared:
        assert found["DequantizeLinear"], "onnxruntime fuses shared constants now: constants.separate can go"
    else:
        assert (found["MatMulNBits"], found["DequantizeLinear"]) == (3, 0)


def test_real_zero_points_cost_a_small_product_not_the_fast_path(tmp_path: Path) -> None:  # R6
    torch.manual_seed(0)
    x, w, scale, zero_point, _, bits, group = list(ops.linear_nbits.cases(torch.float32, "cpu"))[1]
    assert zero_point is not None
    assert zero_point.is_floating_point()
    for profile in PROFILES:
        graph = capture(Call("linear_nbits", (x, w, scale, zero_point, None, bits, group)), (x,))
        export(graph, tmp_path / "m.onnx", [(x,)], profile)
        found = optimized(tmp_path / "m.onnx")
        (product,) = only(found, "MatMulNBits")
        zeros = [constants(found)[i].data_type for i in product.input[3:4] if i]
        assert zeros in ([], [onnx.TensorProto.UINT8]), "real ones take MatMulNBits to a path 10 to 30 times slower"


def test_codes_of_4_bits_may_stand_in_a_file_beside_or_be_expanded_for_an_old_opset(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "EXTERNAL_BYTES", 1000)
    graph, x = captured(Quantized("nbits4", 64, 128), 2, 5, 64)
    for profile, opset, error in (("ort", None, 0.01), ("pure", None, 0.01), ("pure", 20, 1e-5)):
        done = export(graph, tmp_path / "m.onnx", [(x,)], profile, opset)
        assert {f.name for f in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
        assert done.opset == (opset or {"ort": 20, "pure": 21}[profile])
        found, expected = Session(tmp_path / "m.onnx")((x,))[0], graph.run((x,))[0].detach()
        assert (found - expected).abs().max() < error * expected.abs().max()


def test_a_model_too_sensitive_for_rounded_activations_is_refused_in_words(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROUNDED_COSINE", 1.0)
    graph, x = captured(Quantized("nbits4", 64, 32), 2, 5, 64)
    with pytest.raises(PromiseBroken, match="rounds the activations of weight-only layers"):
        export(graph, tmp_path / "m.onnx", [(x,)])
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("profile", PROFILES)
def test_a_wrong_weight_only_form_is_caught_however_small_its_error(profile: Profile, tmp_path: Path, monkeypatch) -> None:
    right = module.load_forms

    def wrong(profile: Profile, opset: int) -> dict:
        forms = right(profile, opset)
        good = forms[OPS.linear_nbits.default]
        forms[OPS.linear_nbits.default] = lambda x, w, scale, *rest: good(x, w, scale * 1.004, *rest)  # less than what rounding does
        return forms

    monkeypatch.setattr(module, "load_forms", wrong)
    graph, x = captured(Quantized("nbits4", 64, 32), 2, 5, 64)
    with pytest.raises(PromiseBroken, match="does not agree"):
        export(graph, tmp_path / "m.onnx", [(x,)], profile)


@pytest.mark.parametrize(("bits", "profile"), [(4, "ort"), (8, "pure")])
def test_a_language_model_of_weight_only_linears_decodes_one_token_at_any_size(bits: int, profile: Profile, tmp_path: Path) -> None:
    graph = usual(kv=2, ffn="gated").clone()
    for node in graph.find(aten.linear.default):
        x, w, b = (*node.args, None)[:3]
        weight = graph.weight(w).detach()
        form = Format("int", bits, "group", symmetric=False)
        parts = grouped(weight, form, 16)
        on = grid(parts, form)
        packed = graph.add_constant(f"{w.target}_codes", pack(codes(parts, on, form), bits))
        scale = graph.add_constant(f"{w.target}_scale", on.scale[..., 0].contiguous())
        zero = graph.add_constant(f"{w.target}_zero", pack(on.zero_point[..., 0], bits))
        node.replace_all_uses_with(graph.insert(OPS.linear_nbits.default, x, packed, scale, zero, b, bits, 16, before=node))
    graph.clean()
    prompt = torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    done = export(graph, tmp_path / "m.onnx", [prompt], profile)
    assert done.parity is not None
    assert done.parity.cosine > 0.999
    session = Session(tmp_path / "m.onnx")
    for batch, length in ((1, 1), (1, 7), (3, 2)):
        flat = torch.randint(0, 50, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        found, expected = session(flat)[0], graph.run(flat)[0].detach()
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    ran = optimized(tmp_path / "m.onnx")
    assert kinds(ran)["MatMulNBits"] == 8, "q, k, v, o, up, gate, down and the head"
    assert not slow(ran)


# -- embeddings, fp8 ----------------------------------------------------------------------------------------------------------


class Call(nn.Module):
    """One op of ours on constants but for its first operand."""

    def __init__(self, op: str, case: tuple) -> None:
        super().__init__()
        self.op, self.case = op, case
        for i, value in enumerate(case):
            if i and isinstance(value, Tensor):
                self.register_buffer(f"_{i}", value)

    def forward(self, x: Tensor) -> Tensor:
        others = (getattr(self, f"_{i}") if isinstance(v, Tensor) else v for i, v in enumerate(self.case) if i)
        return getattr(OPS, self.op)(x, *others)


class Calls(nn.Module):
    """One op of ours on all its cases at once."""

    def __init__(self, op: str, cases: list[tuple]) -> None:
        super().__init__()
        self.calls = nn.ModuleList(Call(op, case) for case in cases)

    def forward(self, operands: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(call(x) for call, x in zip(self.calls, operands, strict=True))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("op", [op for op in FORMS if "linear" in op or "embedding" in op] + ["embedding_int8"])
def test_every_case_of_every_quantized_op_is_the_op(op: str, profile: Profile, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = list(getattr(ops, op).cases(torch.float32, "cpu"))
    operands = tuple(case[0] for case in cases)
    done = export(capture(Calls(op, cases), (list(operands),)), tmp_path / "m.onnx", [operands], profile)
    assert done.parity is not None
    assert done.parity.bit_equal if op.startswith("embedding") else done.parity.relative_error < {"linear_nbits": 0.01, "ternary_linear": 0.02}.get(op, 2e-6)


def test_an_embedding_of_4_or_8_bits_is_one_node_that_gathers_and_dequantizes(tmp_path: Path) -> None:  # R8
    torch.manual_seed(0)
    cases = list(ops.embedding_nbits.cases(torch.float32, "cpu"))[:3]
    ids = [case[0] for case in cases]
    export(capture(Calls("embedding_nbits", cases), (ids,)), tmp_path / "m.onnx", [tuple(ids)])
    assert kinds(optimized(tmp_path / "m.onnx")) == Counter(GatherBlockQuantized=3)


def test_fp8_is_a_byte_in_the_file_and_float_when_it_runs(tmp_path: Path) -> None:  # R9
    torch.manual_seed(0)
    case = torch.randn(4, 128), torch.randn(256, 128).to(torch.float8_e4m3fn), torch.rand(256), torch.randn(256)
    for profile in PROFILES:
        done = export(capture(Call("linear_fp8", case), (case[0],)), tmp_path / "m.onnx", [(case[0],)], profile)
        assert done.bytes < 1.2 * 256 * 128
        graph = optimized(tmp_path / "m.onnx")
        assert onnx.TensorProto.FLOAT8E4M3FN not in {t.data_type for t in graph.initializer}, "made float once, at load"
        assert not slow(graph)


# -- arithmetic -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", INTEGER)
def test_ties_round_to_even_on_both_sides_or_differ_by_one_step(kind: str, profile: Profile, tmp_path: Path) -> None:  # R13
    layer = Quantized(kind, 64, 32)
    layer.x_scale, layer.x_zero_point = torch.tensor(0.25), torch.tensor(128, dtype=torch.uint8)
    x = torch.randint(-60, 60, (3, 5, 64)) / 8  # half of all values lie between two steps
    x[..., 0], x[..., 1] = 31.75, -32.0  # dynamic: 255 steps of 0.25; token: near enough
    graph = capture(layer, (x,))
    export(graph, tmp_path / "m.onnx", [(x,)], profile)
    found, expected = Session(tmp_path / "m.onnx")((x,))[0], graph.run((x,))[0]
    step = 0.25 * (layer.w.float() * layer.scale[:, None]).abs().amax(1)  # what one activation off by one step changes at most
    assert ((found - expected).abs() <= step + 1e-5).all()
    assert (found - expected).abs().max() < 1e-4 or kind == "token"


@pytest.mark.parametrize("profile", PROFILES)
def test_the_largest_codes_neither_saturate_nor_overflow(profile: Profile, tmp_path: Path) -> None:  # R14; section 1
    if not {"avx512_vnni", "avx_vnni"} & cpu_features():
        pytest.skip("without VNNI u8 x s8 products saturate int16 pairs: weights need 7 bits (reduce_range)")
    inner = 66311  # 255 * 127 * 66311 < 2^31
    w = torch.full((8, inner), 127, dtype=torch.int8)
    w[1::2] = -127
    case = torch.full((2, inner), 300.0), torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8), w, torch.ones(8), None
    graph = capture(Call("linear_int8_static", case), (case[0],))
    export(graph, tmp_path / "m.onnx", (), profile)
    found = Session(tmp_path / "m.onnx")((case[0],))[0]
    expected = 255 * 127 * inner * torch.tensor([1.0, -1.0]).repeat(4)
    torch.testing.assert_close(found, expected.expand(2, 8), rtol=1e-6, atol=0)


# -- facts of the pinned onnxruntime that the forms rest on; a failure says which form to think about again --------------------------


def qdq(folder: Path, product: Callable[[], list[onnx.NodeProto]], shape: list, zero_point: np.ndarray, **more: np.ndarray) -> onnx.GraphProto:
    """QuantizeLinear and DequantizeLinear of x [.., 64] and of w [64, 32] by column, then a product of `dx` and `dw`."""
    rng = np.random.default_rng(0)
    held = {"s": np.float32(0.03), "z": zero_point, "w": rng.integers(-127, 128, (64, 32)).astype(np.int8), "ws": rng.random(32, dtype=np.float32)}
    held.update({"b": rng.random(32, dtype=np.float32), "wz": np.zeros(32, np.int8)}, **more)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dx"]),
        *product(),
    ]
    used = {i for n in nodes for i in n.input}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items() if k in used]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, shape)], [value("y", 1, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "fact.onnx")
    return optimized(folder / "fact.onnx")


def weight(zero: str = "wz") -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", ["w", "ws", zero] if zero else ["w", "ws"], ["dw"], axis=1)


U8, S8 = np.uint8(128), np.int8(0)


def biased() -> list[onnx.NodeProto]:
    return [weight(), helper.make_node("MatMul", ["dx", "dw"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]


def test_fact_a_static_qdq_matmul_with_a_bias_becomes_a_slow_float_gemm(tmp_path: Path) -> None:  # R1
    assert "Gemm behind DequantizeLinear" in slow(qdq(tmp_path, biased, [8, 64], U8))
    assert not slow(qdq(tmp_path, biased, ["rows", "more", 64], U8)), "but not where its shape is unknown"


def test_fact_gemm_needs_zero_points_of_the_weight_to_become_qgemm(tmp_path: Path) -> None:  # R1
    def gemm(zero: str) -> Callable[[], list[onnx.NodeProto]]:
        return lambda: [weight(zero), helper.make_node("Gemm", ["dx", "dw"], ["y"])]

    assert kinds(qdq(tmp_path, gemm("wz"), [8, 64], U8)) == Counter(QuantizeLinear=1, QGemm=1)
    assert slow(qdq(tmp_path, gemm(""), [8, 64], U8))


def test_fact_a_float_bias_of_gemm_keeps_it_float(tmp_path: Path) -> None:  # R1
    assert slow(qdq(tmp_path, lambda: [weight(), helper.make_node("Gemm", ["dx", "dw", "b"], ["y"])], [8, 64], U8))


def test_fact_int8_activations_of_qdq_graphs_are_made_uint8(tmp_path: Path) -> None:  # R2
    graph = qdq(tmp_path, lambda: [weight(), helper.make_node("MatMul", ["dx", "dw"], ["y"])], ["rows", "more", 64], S8)
    (quantizer,) = only(graph, "QuantizeLinear")
    assert constants(graph)[quantizer.input[2]].data_type == onnx.TensorProto.UINT8
    assert kinds(graph)["MatMulIntegerToFloat"] == 1


def test_fact_no_constant_factor_is_fused_into_quantizelinear(tmp_path: Path) -> None:  # R5: why folding smoothing into a producer pays
    nodes = [helper.make_node("Mul", ["x", "f"], ["m"]), helper.make_node("QuantizeLinear", ["m", "s", "z"], ["y"])]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in {"f": np.ones(64, np.float32) * 3, "s": np.float32(0.1), "z": U8}.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["rows", 64])], [value("y", 2, None)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "fact.onnx")
    assert kinds(optimized(tmp_path / "fact.onnx")) == Counter(Mul=1, QuantizeLinear=1)


@pytest.mark.parametrize("peeks", [False, True])
def test_what_is_joined_is_quantized_before_unless_it_is_read_whole(tmp_path: Path, peeks: bool) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = Quantized("static", 32, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            whole = torch.cat([torch.tanh(x), torch.sin(x)], -1)
            return (self.linear(whole), whole) if peeks else (self.linear(whole),)

    x = torch.randn(3, 5, 16)
    graph = capture(Joined(), (x,))
    path = tmp_path / "joined.onnx"
    export(graph, path, [(x,)])
    assert kinds(onnx.load(path).graph)["QuantizeLinear"] == (1 if peeks else 2)
    torch.testing.assert_close(Session(path)((x,))[0], graph.run((x,))[0], rtol=1e-5, atol=1e-5)
