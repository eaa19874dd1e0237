"""Whole graphs through TVM: every op against torch, fusion, any sizes, what runs in torch, what is saved and loaded elsewhere."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rewright as rw
from rewright.backends.lower import lower
from rewright.backends.table import absent
from rewright.backends.target import Target
from rewright.ir.capture import capture
from rewright.ir.errors import UsageError
from rewright.ir.graph import Graph
from rewright.tools.lowering import lower_for

if reason := absent("tvm"):
    pytest.skip(reason, allow_module_level=True)

from rewright.backends.tvm.build import Compiled, compile_graph
from rewright.backends.tvm.convert import convert

ours = torch.ops.rewright
CPU = Target.load("cpu")
AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}


class Call(nn.Module):
    """A function of up to three tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Any:
        return self.function(*(t for t in (x, y, z) if t is not None))


def graph_of(function: Callable[..., Any] | nn.Module, *given: Tensor, dynamic: Any = None) -> Graph:
    model = function if isinstance(function, nn.Module) else Call(function)
    return capture(model.eval(), given, dynamic_shapes=dynamic or dict.fromkeys(list("xyz")[: len(given)]))


def worst(compiled: Compiled, graph: Graph, *given: Any) -> float:
    """The largest difference from the graph's own run, over its largest value."""
    flat, found = graph.flat_inputs(given), 0.0
    for wanted, got in zip(graph.run(flat), compiled(flat), strict=True):
        assert wanted.shape == got.shape and wanted.dtype is got.dtype
        if wanted.numel():
            found = max(found, float((wanted.double() - got.double()).abs().max() / (wanted.double().abs().max() + 1e-9)))
    return found


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


BATCH_NORM = nn.BatchNorm2d(6).eval()
BATCH_NORM.running_mean, BATCH_NORM.running_var = r(6), r(6).abs() + 0.5

# what shares a line is one program: compilation is what takes time
ATEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "softmax": (lambda x: (x.softmax(-1), x.softmax(1)), (r(2, 3, 7),)),
    "sums": (lambda x: (x.sum((0, 2)), x.sum(), x.mean(1, keepdim=True), x.amax(-1), x.amin(0, keepdim=True), (x > 0).sum(1)), (r(2, 3, 7),)),
    "any": (lambda x: ((x > 1).any(-1), (x > -9).all(), x.any(0)), (r(2, 3),)),
    "matmul": (lambda x, y, z: (x @ y, z @ y, torch.bmm(x[:, 0], y[:, 0]), x @ z[0], x @ z.t()), (r(2, 4, 3, 5), r(2, 1, 5, 6), r(3, 5))),
    "added products": (lambda x, y, z: (torch.addmm(z, x, y, beta=2, alpha=3), torch.baddbmm(z, x[None], y[None])), (r(9, 5), r(5, 20), r(20))),
    "conv": (nn.Conv2d(3, 10, 3, 2, 1), (r(2, 3, 9, 11),)),
    "patches": (nn.Conv2d(3, 20, 4, 4, bias=False), (r(2, 3, 8, 12),)),
    "groups that panels would cut": (nn.Conv2d(6, 12, 3, 1, 1, groups=6), (r(2, 6, 5, 4),)),
    "conv1d": (nn.Sequential(nn.Conv1d(5, 7, 3, 2, 1, dilation=2), nn.Conv1d(7, 7, 3, padding=1, groups=7), nn.Conv1d(7, 3, 1)), (r(2, 5, 16),)),
    "batch_norm": (BATCH_NORM, (r(2, 6, 5, 4),)),
    "pools": (lambda x: (F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, (2, 3)), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, 3)), (r(1, 2, 6, 6),)),
    "whole windows": (lambda x: (F.avg_pool2d(x, 2, ceil_mode=True), F.max_pool2d(x, 3, 1, ceil_mode=True)), (r(1, 2, 6, 6),)),
    "cumsum": (lambda x: (x.cumsum(1), (x > 0).long().cumsum(0)), (r(3, 5),)),
    "triangles": (lambda x: (x.tril(-1), x.triu(1), x.tril(1)), (r(2, 5, 4),)),
    "repeats": (lambda x: (x.repeat_interleave(3, 1), x.repeat_interleave(2), x.repeat(2, 1, 1, 3), x.roll((1, -2), (0, 1)), x.flip(1)), (r(2, 4, 5),)),
    "joins": (lambda x, y: (torch.stack([x, y, x + y], 1), torch.cat([x, y[:, :1], x], -1), F.pad(x, (1, 2, 0, 3), value=2.0)), (r(2, 3), r(2, 3))),
    "parts": (lambda x: (x[:, 1:-1:2], x[1:] * x[-2], x.unbind(1)[2] + 1, x.split([1, 3], 1)[1] * 2, x.chunk(2, -1)[1]), (r(3, 4),)),
    "layouts": (lambda x: (x.permute(2, 0, 1) * 2, x.transpose(0, 1) + 1, x.reshape(6, 4).t(), x[:, :, None].expand(2, 3, 5, 4) + 1), (r(2, 3, 4),)),
    "tables": (lambda x, y: (y.gather(0, x), F.embedding(x, y), y[x[0]], y[:, x[0] - 2], x[0, 1] + x), (i(5, 2, 3), r(5, 6))),
    "powers": (lambda x: (x.abs() ** 2 + x.abs() ** 0.5 + x**-1 + x**3 + x.abs() ** 1.7), (r(2, 9),)),
    "pointwise": (lambda x: (x.exp() - x.sin() * x.cos(), x.abs().log() + x.abs().rsqrt() + x.abs().log1p()), (r(2, 9),)),
    "activations": (lambda x: (F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.relu(x), x.tanh(), x.sigmoid(), x.erf()), (r(2, 9) * 3,)),
    "hard activations": (lambda x: (F.hardswish(x), F.hardsigmoid(x), F.relu6(x)), (r(2, 9) * 3,)),
    "two operands": (lambda x, y: (torch.min(x, y), torch.maximum(x, y), x.sub(y, alpha=3), 1 - x, x // y, x % y, x / 3 - y), (r(3, 4), r(4))),
    "integers": (lambda x: (x // 3, x % 5, x / 2, x == 3, (x > 0) & ~(x > 4) | (x != 2), x.float().sign().long(), -x), (torch.arange(-9, 9),)),
    "limits": (lambda x: (x.clamp(-0.5, 0.7), x.clamp(min=0), x.masked_fill(x > 0, float("-inf")).exp(), x.floor() + x.ceil() + x.trunc()), (r(3, 4) * 2,)),
    "choices": (lambda x, y: (torch.where(x > y, x, 0.5), torch.where(x > y, x, y), x.bool() | (y > 0)), (r(3, 4), r(4))),
    "made": (lambda x: (torch.arange(7) + x.long(), torch.arange(3, 17, 2) * x, torch.full((7,), 2.5) + x, torch.ones(7) - torch.zeros_like(x)), (r(7),)),
}  # fmt: skip


@pytest.mark.parametrize("name", ATEN)
def test_aten(name: str) -> None:
    function, given = ATEN[name]
    graph = graph_of(function, *given) if not isinstance(function, nn.Module) else capture(function.eval(), given, dynamic_shapes={"input": None})
    compiled = compile_graph(graph)
    assert worst(compiled, graph, *given) < 2e-6
    assert not compiled.in_torch


COMPILED = (
    "add_layer_norm",
    "add_rms_norm",
    "rms_norm",
    "multi_head_attention",
    "linear_token",
    "linear_int8_static",
    "linear_nbits",
    "quick_gelu",
    "embedding_int8",
    "rope",
)


class Op(nn.Module):
    """An op of ours on one of its cases; of a linear or an embedding only the first tensor is an input."""

    def __init__(self, op: str, case: tuple) -> None:
        super().__init__()
        self.op, (leaves, self.spec) = op, pytree.tree_flatten(list(case))
        at = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.given = at[:1] if op.startswith(("linear_", "embedding")) else at
        self.leaves = leaves
        for n in set(at) - set(self.given):
            self.register_buffer(f"b{n}", leaves[n])

    def forward(self, a: Tensor, b: Any = None, c: Any = None, d: Any = None, e: Any = None, f: Any = None) -> Any:
        leaves, given = list(self.leaves), dict(zip(self.given, (a, b, c, d, e, f)))
        leaves = [given[n] if n in given else getattr(self, f"b{n}", leaf) for n, leaf in enumerate(leaves)]
        return getattr(ours, self.op)(*pytree.tree_unflatten(leaves, self.spec))


class Cases(nn.Module):
    """An op on several cases: one program."""

    def __init__(self, op: str, cases: Sequence[tuple]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(Op(op, case) for case in cases)

    def forward(self, given: list[list[Tensor]]) -> list[Any]:
        return [op(*own) for op, own in zip(self.ops, given, strict=True)]


@pytest.mark.parametrize("op", COMPILED)
def test_ops_of_ours(op: str) -> None:
    torch.manual_seed(0)
    cases = list(importlib.import_module(f"rewright.ir.ops.{op}").cases(torch.float32, "cpu"))
    cases = cases if op != "multi_head_attention" else [cases[3], cases[7]]  # the kernel has tests of its own
    module = Cases(op, cases)
    given = [[one.leaves[n] for n in one.given] for one in module.ops]
    graph = capture(module, (given,), dynamic_shapes={"given": None})
    compiled = compile_graph(graph)
    assert worst(compiled, graph, given) < 2e-6
    assert not compiled.in_torch


def test_ops_without_a_converter_run_in_torch_and_are_named_together() -> None:
    graph = graph_of(lambda x: (torch.sort(x, -1).values.relu(), F.elu(x) + 1, x.topk(2).indices), r(3, 5))
    compiled = compile_graph(graph)
    assert worst(compiled, graph, r(3, 5)) < 1e-6
    assert sorted(compiled.in_torch.values()) == ["aten.elu", "aten.sort", "aten.topk"]
    with pytest.raises(UsageError, match=r"aten.elu, aten.sort, aten.topk run in torch"):
        compiled.save("nowhere")
    assert not Path("nowhere").exists()
    lowered = lower(graph, CPU, backend="tvm")
    assert {c.why for c in lowered.choices if c.kernel == "torch"} == {f"TVM has no converter for aten.{op}" for op in ("elu", "sort", "topk")}


def test_sizes_that_occur_only_inside_others() -> None:
    """A pooled and a normalised convolution of images of any size."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = F.conv2d(x, torch.ones(4, 3, 2, 2), stride=2)
        return y.mean((2, 3)), y.softmax(-1), y.cumsum(2), y @ y.transpose(2, 3), F.adaptive_avg_pool2d(y, 1)

    graph = graph_of(function, r(2, 3, 8, 6), dynamic={"x": {0: "batch", 2: "height", 3: "width"}})
    compiled = compile_graph(graph)
    assert worst(compiled, graph, r(2, 3, 8, 6)) < 2e-6
    assert worst(compiled, graph, r(1, 3, 14, 10)) < 2e-6
    assert not compiled.in_torch


class Images(nn.Module):
    """What nets of images are made of: a stem, an inverted residual with squeeze and excitation, groups, an aggregated residual, a block of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.stem_norm = nn.Conv2d(3, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20)
        self.depthwise, self.depthwise_norm = nn.Conv2d(20, 20, 5, padding=2, groups=20), nn.BatchNorm2d(20)
        self.squeeze, self.excite = nn.Conv2d(20, 4, 1), nn.Conv2d(4, 20, 1)
        self.project, self.project_norm = nn.Conv2d(20, 20, 1, bias=False), nn.BatchNorm2d(20)
        self.grouped = nn.Conv2d(40, 40, 3, padding=1, groups=10)
        self.mix, self.norm = nn.Conv2d(40, 40, 7, padding=3, groups=40), nn.LayerNorm(40)
        self.up, self.down, self.gamma = nn.Linear(40, 80), nn.Linear(80, 40), nn.Parameter(torch.rand(40))
        self.head = nn.Linear(40, 5)
        for norm in (self.stem_norm, self.depthwise_norm, self.project_norm):
            norm.running_mean, norm.running_var = r(20) / 10, r(20).abs() + 0.5
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.hardswish(self.stem_norm(self.stem(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(x)))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = F.relu(x + self.project_norm(self.project(y)))
        x = F.max_pool2d(torch.cat([x, y], 1), 3, 2, 1)
        x = F.relu(self.grouped(x) + x)
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.gamma
        x = x + y.permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), x, x.flatten(2).transpose(1, 2)


def images(*shape: int) -> Graph:
    sizes = {"x": {0: "batch", 2: 2 * torch.export.Dim("height", min=2), 3: 2 * torch.export.Dim("width", min=2)}}
    return capture(Images().eval(), (r(*shape),), dynamic_shapes=sizes)


def test_images_of_all_sizes() -> None:
    graph = images(2, 3, 20, 16)
    compiled = compile_graph(graph)
    assert not compiled.in_torch
    for shape in ((2, 3, 20, 16), (1, 3, 4, 6), (3, 3, 38, 66)):
        assert worst(compiled, graph, r(*shape)) < 2e-6, shape


def test_channels_stay_last_between_the_first_and_the_last_value() -> None:
    """And norms, activations and additions are part of the convolutions before them: what is left is the scale of the excitation and the join."""
    program = convert(images(2, 3, 20, 16), AVX2, lambda node: "")
    calls = str(program.module["main"])
    assert calls.count('"turned_') == 1
    assert calls.count('"padded_') == 2  # stem and groups
    assert calls.count("call_tir") == 4


def test_bfloat16_weights_run_in_torch() -> None:
    graph = capture(nn.Linear(5, 7).bfloat16().eval(), (r(3, 5).bfloat16(),), dynamic_shapes={"input": None})
    compiled = compile_graph(graph)
    assert worst(compiled, graph, r(3, 5).bfloat16()) == 0 and set(compiled.in_torch.values()) == {"aten.linear of bfloat16"}


def test_half_precision_runs_in_torch() -> None:
    graph = graph_of(lambda x: F.gelu(x.half()).float() + 1, r(3, 5))
    compiled = compile_graph(graph)
    assert set(compiled.in_torch.values()) == {"aten.to.dtype of float16", "aten.gelu of float16"} or "aten._to_copy of float16" in compiled.in_torch.values()
    assert worst(compiled, graph, r(3, 5)) < 1e-6


def test_double_precision_is_kept() -> None:
    """Kernels of ours are for float32; those layers run in torch, the rest is compiled in float64."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7)).double()
    graph = capture(model.eval(), (r(3, 5).double(),), dynamic_shapes={"input": None})
    compiled = compile_graph(graph)
    assert set(compiled.in_torch.values()) == {"aten.linear of float64", "aten.layer_norm of float64"}
    assert worst(compiled, graph, r(3, 5).double()) < 1e-14


class Sums(nn.Module):
    """Additions that several products could take in: each is taken by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.a(x), self.b(x)
        gate = F.silu(self.c(x))
        y = self.d(x)
        return a + b, gate + y, y.relu() + self.a(y), torch.add(self.b(y), x, alpha=2), self.c(y) + self.c(y)


def test_an_addition_is_taken_in_by_one_product() -> None:
    graph = capture(Sums().eval(), (r(5, 16),), dynamic_shapes={"x": {0: "rows"}})
    compiled = compile_graph(graph)
    assert worst(compiled, graph, r(5, 16)) < 2e-6
    assert worst(compiled, graph, r(40, 16)) < 2e-6


# -- fusion --------------------------------------------------------------------------------------------------------------


GRIDS = {"qkv": (0.03, 128), "out": (0.02, 120), "up": (0.03, 128), "down": (0.02, 20)}


class Block(nn.Module):
    """A packed attention and a feed-forward layer with their residuals, post-norm."""

    def __init__(self, width: int = 32, quantized: str = "") -> None:
        super().__init__()
        self.quantized = quantized
        for name, (out, inner) in {"qkv": (3 * width, width), "out": (width, width), "up": (2 * width, width), "down": (width, 2 * width)}.items():
            self.register_buffer(f"{name}_w", torch.randint(-127, 128, (out, inner), dtype=torch.int8) if quantized else torch.randn(out, inner) / inner**0.5)
            self.register_buffer(f"{name}_s", torch.rand(out) / 100 / inner**0.5 + 1e-3)
            self.register_buffer(f"{name}_b", torch.randn(out) / 10)
        for name, (step, zero) in GRIDS.items():
            self.register_buffer(f"{name}_step", torch.tensor(step))
            self.register_buffer(f"{name}_zero", torch.tensor(zero, dtype=torch.uint8))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def linear(self, x: Tensor, name: str) -> Tensor:
        w, s, b = (getattr(self, f"{name}_{part}") for part in "wsb")
        if self.quantized == "token":
            return ours.linear_token(x, w, s, b)
        if self.quantized == "static":
            return ours.linear_int8_static(x, getattr(self, f"{name}_step"), getattr(self, f"{name}_zero"), w, s, b)
        return F.linear(x, w, b)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.linear(x, "qkv").chunk(3, -1)
        mixed = self.linear(ours.multi_head_attention(q, k, v, 4, 4, mask != 0), "out")
        x, _ = ours.add_layer_norm(mixed, x, self.norms[0].weight, self.norms[0].bias, 1e-5)
        hidden = F.silu(self.linear(x, "up"))
        x, _ = ours.add_layer_norm(self.linear(hidden, "down"), x, self.norms[1].weight, self.norms[1].bias, 1e-5)
        return x


class Net(nn.Module):
    def __init__(self, quantized: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Block(32, quantized) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x) + x[..., :5]


DYNAMIC = {name: {0: "batch", 1: "sequence"} for name in ("ids", "mask")}


def texts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, 1 + length // 2 :] = 0
    return i(50, batch, length), mask


@pytest.mark.parametrize("quantized", ["", "token", "static"])
def test_one_program_serves_all_sizes(quantized: str) -> None:
    graph = capture(Net(quantized).eval(), texts(2, 9), dynamic_shapes=DYNAMIC)
    compiled = compile_graph(graph)
    assert not compiled.in_torch
    for batch, length in ((1, 1), (1, 17), (3, 40), (2, 9)):
        flat = graph.flat_inputs(texts(batch, length))
        wanted, found = graph.run(flat)[0], compiled(flat)[0]
        if quantized:  # a value half way between two codes may fall on the other
            assert torch.cosine_similarity(wanted.flatten(), found.flatten(), 0) > 0.9995
            assert ((wanted - found).abs() < 1e-4 * wanted.abs().max()).float().mean() > 0.5
        else:
            assert (wanted - found).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize(("quantized", "wanted"), [("", 0), ("token", 1), ("static", 0)])
def test_quantization_is_part_of_what_makes_the_value(quantized: str, wanted: int) -> None:
    """But for the embedding, and for the attention where each row has a step of its own."""
    graph = capture(Net(quantized).eval(), texts(2, 9), dynamic_shapes=DYNAMIC)
    program = convert(graph, AVX2, lambda node: "")
    calls = str(program.module["main"]).count('"quantize_')
    assert calls == (2 * wanted + 1 if quantized else 0)
    assert len(program.kernels) <= 9  # equal layers share their kernels


def test_program_is_called_like_the_original() -> None:
    graph = rw.capture(Net().eval(), texts(2, 9), dynamic_shapes=DYNAMIC)
    module = lower(graph, CPU, backend="tvm").module
    ids, mask = texts(3, 5)
    assert torch.allclose(module(mask=mask, ids=ids), graph(ids, mask), atol=1e-5)
    assert torch.allclose(module(ids[:, 1:], mask[:, 1:]), graph(ids[:, 1:], mask[:, 1:]), atol=1e-5)  # views that begin anywhere


# -- outside this process ------------------------------------------------------------------------------------------------

LOAD = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "rewright", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import numpy as np
from run import load
program = load(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], program(inputs)[0].numpy())
assert "tvm.relax" not in sys.modules
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to link with")
def test_saved_program_runs_with_the_runtime_alone(tmp_path: Path) -> None:
    graph = capture(Net("static").eval(), texts(2, 9), dynamic_shapes=DYNAMIC)
    compiled = compile_graph(graph)
    folder = compiled.save(tmp_path / "program")
    ids, mask = texts(3, 11)
    np.savez(tmp_path / "inputs.npz", ids=ids.numpy(), mask=mask.numpy())
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "inputs.npz"), str(tmp_path / "found.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "found.npy")), compiled(graph.flat_inputs((ids, mask)))[0])

    from rewright.backends.tvm import runtime

    program = runtime.load(folder)
    assert program.manifest["inputs"][0] == {"name": "ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    with pytest.raises(ValueError, match="the program reads ids, mask: mask is missing"):
        program({"ids": ids})
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"cpu": [', '"cpu": ["amx_fp64",'))
    with pytest.raises(ValueError, match="compiled for a CPU with amx_fp64, which this one lacks"):
        runtime.load(folder)
    (folder / "manifest.json").write_text(manifest)
    with open(folder / "program.so", "ab") as library:
        library.write(b"x")
    with pytest.raises(ValueError, match="was changed after it was compiled"):
        runtime.load(folder)


# -- choosing ------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_fastest_here_and_says_what_it_measured() -> None:
    graph = rw.capture(Net().eval(), texts(2, 9), dynamic_shapes=DYNAMIC)
    found = lower_for(graph, CPU, "auto", graph.flat_inputs(texts(4, 32)), rounds=5)
    assert set(found.timings) == {"torch", "onnx", "tvm"}
    assert found.lowered.backend == min(found.timings, key=lambda n: found.timings[n].median_ms)
    assert found.shape == "4x32, 4x32"
    ids, mask = texts(2, 7)
    assert torch.allclose(found.lowered.module(ids, mask), graph(ids, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "target", "said"),
    [
        ("tvm", "h200", "tvm compiles for a CPU here, and h200 is none"),
        ("onnx", "h200", "onnx compiles for a CPU here"),
        ("relay", "cpu", "no backend 'relay'; there are auto, torch, kernels, triton, tvm, onnx"),
    ],
)
def test_backends_that_can_not_run_there_are_refused(backend: str, target: str, said: str) -> None:
    graph = graph_of(F.relu, r(3))
    with pytest.raises(UsageError, match=said):
        lower_for(graph, Target.load(target), backend)


def test_auto_for_a_gpu_takes_kernels_and_says_that_nothing_was_timed() -> None:
    found = lower_for(graph_of(lambda x, y: ours.rms_norm(x, y, 1e-5), r(3, 8), r(8)), Target.load("h200"), "auto")
    assert [c.kernel for c in found.lowered.choices] == ["triton"]
    assert found.declined["tvm"] == "it was not timed: h200 is not this machine"
