"""Linear attention in onnxruntime: what its meaning decomposes into, for any batch and any number of tokens, without loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rewright.backends.onnx.export import Profile, export
from rewright.backends.onnx.session import Session
from rewright.ir.capture import capture
from rewright.ir.feature_maps import KINDS, initial
from rewright.ir.ops.linear_attention_step import empty

torch.set_num_threads(1)
OPS = torch.ops.rewright
BATCH, TOKENS = Dim("batch", min=1, max=64), Dim("tokens", min=2, max=4096)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # sums that are not divided by anything reach some tens


class Linear(nn.Module):
    """linear_attention, with a decay as a weight where there is one."""

    def __init__(self, causal: bool, decay: Tensor | None = None, normalize: str = "sum") -> None:
        super().__init__()
        self.causal, self.normalize = causal, normalize
        self.decay = None if decay is None else nn.Buffer(decay)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        return OPS.linear_attention(q, k, v, weights, self.causal, self.decay, self.normalize)


class Hybrid(nn.Module):
    """hybrid_attention over features of its q and k."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.gamma = causal, nn.Parameter(torch.rand(4) + 0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        fq, fk = OPS.feature_map(q, [], "elu1", True), OPS.feature_map(k, [], "elu1")
        return OPS.hybrid_attention(q, k, v, fq, fk, self.gamma, weights > 0, 16, self.causal)


def inputs(b: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of 4 query heads and 2 key heads, values and weights with zeros."""
    weights = torch.randint(0, 3, (b, n)).float()
    weights[:, 0] = 1
    return torch.rand(b, 4, n, 16), torch.rand(b, 2, n, 16), torch.randn(b, 2, n, 8), weights


def written(model: nn.Module, path: Path, profile: Profile = "ort", opset: int | None = None) -> tuple[Session, Counter]:
    """Of any batch and number of tokens."""
    dims = {name: {0: BATCH, 2: TOKENS} for name in ("q", "k", "v")} | {"weights": {0: BATCH, 1: TOKENS}}
    graph = capture(model, inputs(2, 130), dynamic_shapes=dims)
    export(graph, path, [inputs(2, 130)], profile, opset, max_error=1e-5)
    return Session(path), Counter(n.op_type for n in onnx.load(path).graph.node)


LINEAR = {
    "bidirectional": Linear(False),
    "bidirectional, rms": Linear(False, None, "rms"),
    "causal": Linear(True),
    "causal, none": Linear(True, None, "none"),
    "causal, decays": Linear(True, -torch.rand(2)),
    "hybrid": Hybrid(False),
    "causal hybrid": Hybrid(True),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "hybrid" else []) for name in LINEAR])
def test_one_file_serves_any_batch_and_number_of_tokens(name: str, tmp_path: Path) -> None:
    session, kinds = written(LINEAR[name], tmp_path / "m.onnx")
    assert not {"Loop", "Scan", "If"} & set(kinds)
    for b, n in [(1, 2), (3, 63), (2, 64), (1, 65), (2, 200)]:
        given = inputs(b, n)
        (found,) = session(given)
        torch.testing.assert_close(found, LINEAR[name](*given), **CLOSE)


def test_the_bidirectional_form_is_two_products_and_the_sums(tmp_path: Path) -> None:
    """One transpose; the third product is of the queries with one vector a head."""

    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return OPS.linear_attention(q, k, v)

    q, k, v, _ = inputs(2, 32)
    export(capture(Plain(), (q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))), tmp_path / "m.onnx")
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node)
    assert (kinds["MatMul"], kinds["Transpose"], kinds["Div"]) == (3, 1, 1)
    assert kinds["ReduceSum"] <= 3 and kinds["Where"] == 0


@pytest.mark.parametrize("causal", [False, True])
def test_every_node_is_of_the_standard_domain_since_opset_18(causal: bool, tmp_path: Path) -> None:
    written(Linear(causal), tmp_path / "m.onnx", "pure", 18)
    model = onnx.load(tmp_path / "m.onnx")
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions


class Maps(nn.Module):
    """Every map, of queries and of keys."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parameters_of = nn.ModuleDict({k: nn.ParameterList(p + 0.1 * torch.randn_like(p) for p in initial(k, 2, 8)) for k in KINDS})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(OPS.feature_map(x, list(self.parameters_of[k]), k, query) for k in KINDS for query in (False, True))


def test_every_feature_map_is_the_same_in_onnxruntime(tmp_path: Path) -> None:
    model = Maps()
    graph = capture(model, (torch.randn(2, 2, 9, 8),), dynamic_shapes={"x": {0: BATCH, 2: TOKENS}})
    export(graph, tmp_path / "m.onnx")
    x = torch.randn(3, 2, 17, 8)
    x[0, :, 1] = 0
    for found, expected in zip(Session(tmp_path / "m.onnx")((x,)), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Step(nn.Module):
    """One token more."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return OPS.linear_attention_step(q, k, v, state, sums, torch.tensor([-0.1, -0.2, -0.3, -0.4]))


def test_decoding_in_onnxruntime_continues_what_torch_began(tmp_path: Path) -> None:
    q, k, v, _ = inputs(2, 20)
    decay = torch.tensor([-0.1, -0.2, -0.3, -0.4])
    expected = OPS.linear_attention(q, k, v, None, True, decay)
    _, state, sums = OPS.linear_attention_step(q[:, :, :15], k[:, :, :15], v[:, :, :15], *empty(2, 4, 16, 8), decay)
    export(capture(Step(), (q[:, :, :1], k[:, :, :1], v[:, :, :1], state, sums)), tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for i in range(15, 20):
        o, state, sums = session((q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], state, sums))
        torch.testing.assert_close(o, expected[:, :, i : i + 1], **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_keeps_its_sums_in_float32(causal: bool, tmp_path: Path) -> None:
    """2048 features of up to 4 add up to more than float16 counts exactly, and products of them to more than it holds."""

    class Half(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return OPS.linear_attention(q, k, v, None, causal)

    q, k = 4 * torch.rand(2, 1, 1, 2048, 8, dtype=torch.float16)
    v = torch.rand(1, 1, 2048, 8, dtype=torch.float16) + 1
    export(capture(Half(), (q, k, v)), tmp_path / "m.onnx")
    (found,) = Session(tmp_path / "m.onnx")((q, k, v))
    torch.testing.assert_close(found, Half()(q, k, v), rtol=1e-3, atol=0)
