"""What the present machine does, by the clock: a target file of measured numbers, for `--target FILE.toml`.

CPU: one thread, in processor time. GPU: the first CUDA device, in its own events. The fastest of many calls: what else runs there only slows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.onnx.export import export
from ..backends.onnx.session import Session
from ..backends.target import NAMES, Target, known_targets
from ..ir.capture import capture
from ..ir.cost import node_costs
from ..ir.errors import UsageError
from ..ir.files import check_writable, replacing
from ..ir.graph import Graph
from ..passes.pipeline import Pipeline
from ..passes.quantization.quantize_linear import QuantizeLinear
from ..passes.statistics import Calibration
from .demo import conditions
from .optimize import Progress, silent

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD = 64
"""Channels of an attention head."""


@dataclass(frozen=True)
class Size:
    """What is large enough on a device to be limited by one thing."""

    product: int
    """Rows, inputs and outputs of the products that give peaks."""
    stream: int
    """Bytes of the array that is copied: more than caches hold."""
    tokens: int
    channels: int
    """Of the ops whose share of the roofline is measured; 8 texts."""


SIZES = {"cpu": Size(1024, 1 << 28, 1024, 384), "cuda": Size(8192, 1 << 30, 8192, 1024)}


def _parts(size: Size) -> dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]]:
    """Ops whose share of the roofline is measured, and the shapes they are given."""
    n, d, texts = size.tokens, size.channels, 8
    heads = (texts, d // HEAD, n // texts, HEAD)
    return {
        "linear": (F.linear, ((n, d), (4 * d, d), (4 * d,))),
        "layer_norm": (lambda x, w, b: F.layer_norm(x, w.shape, w, b), ((n, d), (d,), (d,))),
        "gelu": (F.gelu, ((n, 4 * d),)),
        "softmax": (lambda x: x.softmax(-1), ((*heads[:3], n // texts),)),
        "attention": (F.scaled_dot_product_attention, (heads, heads, heads)),
    }


@dataclass(frozen=True)
class Measured:
    """Numbers of one machine under the keys of `Target.sources`."""

    device: str
    conditions: str
    base: str
    """The target that has the numbers which are not measured."""
    numbers: Mapping[str, float]
    known: Mapping[str, float]
    """What that target has in their place; 1 for an efficiency it lacks."""
    seconds: float
    """How long it took."""

    def toml(self) -> str:
        """A target file."""
        tables: dict[str, list[str]] = {"": [], "peak": [], "efficiency": []}
        for key, value in self.numbers.items():
            table, _, name = key.rpartition(".")
            tables[table].append(f'{name} = {{ value = {value:.4g}, source = "measured" }}')
        head = [f"# {self.device}, measured by `rewright doctor --measure`: {self.conditions}.", f'base = "{self.base}"']
        return "\n".join([*head, *tables[""], "", "[peak]", *tables["peak"], "", "[efficiency]", *tables["efficiency"]]) + "\n"


def measure(kind: str | None = None, out: str | Path | None = None, *, size: Size | None = None, seconds: float = 1.0, progress: Progress = silent) -> Measured:
    """Rates of products, of streaming and of calls on this machine, and the share of that roofline which a few ops reach.

    kind: 'cpu', or 'cuda' for the first CUDA device, of an architecture that has a target; default: that where there is one.
    out: a .toml file to write. seconds: how long each of a dozen numbers is measured.
    Raises UsageError where there is no such device, or no target to add to.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in SIZES:
        raise UsageError(f"no device {kind!r} to measure; there are {' and '.join(SIZES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here; --device cpu measures the processor")
    if out is not None:
        if Path(out).suffix != ".toml":
            raise UsageError(f"{out} is no .toml file, and targets are read from those")
        check_writable(Path(out))
    base = Target.load("cpu" if kind == "cpu" else cuda_target(torch.cuda.get_device_name(), torch.cuda.get_device_capability()))
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            numbers = _measured(kind, size or SIZES[kind], seconds, progress)
    finally:
        torch.set_num_threads(threads)
    known = {key: _number(base, key) for key in numbers}
    versions = conditions()
    device = versions["cpu"] if kind == "cpu" else torch.cuda.get_device_name()
    about = f"{'one thread, ' if kind == 'cpu' else ''}torch {versions['torch']}, onnxruntime {versions['onnxruntime']}"
    found = Measured(device, about, base.name, numbers, known, time.perf_counter() - begin)
    if out is not None:
        with replacing(Path(out)) as path:
            path.write_text(found.toml(), encoding="utf-8")
    return found


def cuda_target(device: str, capability: tuple[int, int]) -> str:
    """The target that stands for a CUDA device: by its name ('NVIDIA GeForce RTX 4090'), else by its architecture."""
    words = device.lower().replace("-", " ").split()
    names = {*words, *map("".join, itertools.pairwise(words))}
    return next((name for name in known_targets() if name in names), f"cuda:sm_{capability[0]}{capability[1]}")


def _measured(kind: str, size: Size, seconds: float, progress: Progress) -> dict[str, float]:
    jobs, parts = _products(kind, size.product), _parts(size)
    layers = _quantized_layers(size) if kind == "cpu" else {}
    total = 2 + len(jobs) + len(parts) + len(layers)
    steps = iter(range(total))

    def timed(what: str, call: Callable[[], Any]) -> float:
        progress(f"measuring {what}", next(steps), total)
        return (_cpu_seconds if kind == "cpu" else _cuda_seconds)(call, seconds)

    source = torch.ones(size.stream // 4, device=kind)
    copy = torch.empty_like(source)
    x, w = torch.ones(1, 8, device=kind), torch.ones(8, 8, device=kind)
    numbers = {"bandwidth": 2 * source.nbytes / timed("streaming", lambda: copy.copy_(source)), "launch": timed("calls", lambda: F.linear(x, w))}
    for name, call in jobs.items():
        numbers[f"peak.{name}"] = 2 * size.product**3 / timed(f"products in {name}", call)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    for name, (function, shapes) in parts.items():
        tensors = tuple(torch.randn(shape, device=kind, dtype=dtype) for shape in shapes)
        spent = timed(name, lambda function=function, tensors=tensors: function(*tensors)) - numbers["launch"]
        numbers[f"efficiency.{name}"] = _roofline(_program(function, tensors), numbers) / spent
    for name, (graph, call) in layers.items():
        numbers[f"efficiency.{name}"] = _roofline(graph, numbers) / (timed(name, call) - numbers["launch"])
    return numbers


def _products(kind: str, n: int) -> dict[str, Callable[[], Any]]:
    """dtype -> a product of n x n matrices, as fast as the machine's libraries make it."""
    found: dict[str, Callable[[], Any]] = {}
    for dtype in FLOATS:
        x, w = torch.randn(2, n, n, device=kind).to(dtype)
        found[NAMES[dtype]] = lambda x=x, w=w: F.linear(x, w)
    if kind == "cpu":
        return found | {"int8": _integer_product(n)}
    x, w = torch.randint(-127, 128, (2, n, n), dtype=torch.int8, device=kind)
    found["int8"] = lambda: torch._int_mm(x, w.T)
    return found


def _integer_product(n: int) -> Callable[[], Any]:
    """Of bytes, in onnxruntime, which runs our 8-bit layers on CPUs."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = [("w", random.integers(-127, 128, (n, n), dtype=np.int8)), ("x_zero", np.uint8(128)), ("w_zero", np.int8(0))]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "x_zero", "w_zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [n, n])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [n, n])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session, x = Session(model.SerializeToString()), torch.randint(256, (n, n), dtype=torch.uint8)
    return lambda: session((x,))


def _quantized_layers(size: Size) -> dict[str, tuple[Graph, Callable[[], Any]]]:
    """Layers of 8 bits: their program, and a call of its file in onnxruntime."""
    x, layer = torch.randn(size.tokens, size.channels), nn.Linear(size.channels, 4 * size.channels)
    found: dict[str, tuple[Graph, Callable[[], Any]]] = {}
    for activations in ("int8-dynamic", "int8-static"):
        pipeline = Pipeline([QuantizeLinear(activations=activations)], calibration=Calibration([(x,)]), verify=False)
        graph = pipeline.run(capture(layer, (x,), dynamic_shapes={})).graph
        with TemporaryDirectory() as folder:
            session = Session(export(graph, Path(folder) / "layer.onnx").path)
        found[f"linear_{activations.replace('-', '_')}"] = graph, lambda session=session: session((x,))
    return found


def _program(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Graph:
    """A call as a graph, for its cost."""

    class Part(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Tensor:
            return function(*tensors)

    return capture(Part(), ([torch.empty_like(t, device="meta") for t in tensors],), dynamic_shapes={})


def _roofline(graph: Graph, numbers: Mapping[str, float]) -> float:
    """Seconds of a program of one call as the cost model counts it, with the rates found and without the cost of calling."""
    return sum(max(c.cost.flops / numbers[f"peak.{NAMES[c.dtype]}"], c.cost.bytes / numbers["bandwidth"]) for c in node_costs(graph))


def _cpu_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Least processor time of a call; short ones are repeated until they take a millisecond."""
    call()
    times: list[float] = []
    repeats, until = 1, time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start = time.thread_time_ns()
        for _ in range(repeats):
            call()
        spent = (time.thread_time_ns() - start) / 1e9
        if spent < 1e-3 and not times:
            repeats *= 2
        else:
            times.append(spent / repeats)
    return min(times)


def _cuda_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Least time of a call between two events around so many that they take a millisecond."""
    times: list[float] = []
    repeats, until = 1, time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            call()
        last.record()
        torch.cuda.synchronize()
        spent = first.elapsed_time(last) / 1e3
        if spent < 1e-3 and not times:
            repeats *= 2
        else:
            times.append(spent / repeats)
    return min(times)


def _number(target: Target, key: str) -> float:
    table, _, name = key.rpartition(".")
    return getattr(target, table).get(name, 1.0) if table else getattr(target, key)
