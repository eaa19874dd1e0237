"""`python tools/bench_gpu.py`: every Triton kernel checked and timed on this GPU against its best baseline. Needs torch, triton and the checkout alone.

Checks are those of backends/check.py. Times are of CUDA graphs whose calls walk through copies of their arguments larger than the L2 cache, all candidates
in turn, medians of rounds with quartiles. `--tune` tries tiles and prints rows for the tables in backends/triton. Writes benchmarks/gpu.json and gpu.txt.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the package is the checkout this file lies in, whatever its folder is called
    sys.path.pop(0)
    spec = importlib.util.spec_from_file_location("rewright", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    sys.modules["rewright"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["rewright"])
    runpy.run_module("rewright.tools.bench_gpu", run_name="__main__", alter_sys=True)
    raise SystemExit  # main has exited with its own code before

from ..backends.check import calls, fault  # noqa: E402
from ..backends.table import BF16, F16, KERNELS, Kernel, absent  # noqa: E402
from ..backends.target import Target, known_targets  # noqa: E402

OUT = ROOT / "benchmarks" / "gpu.json"
ROUNDS = 30
ROUND_SECONDS = 1e-3
"""A candidate's share of a round is at least so long."""
CACHES = 2
"""The copies of the arguments are together so many times the L2 cache."""
MOST_COPIES = 64

Call = Callable[[], Any]
Baseline = Callable[..., Call]
"""The op's arguments -> a call that computes what it can stand for; what is prepared before the call is not timed."""


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    size: str
    make: Callable[[str], tuple]
    """device -> the op's arguments."""
    baselines: Mapping[str, Baseline]
    flops: float
    bytes: float
    """That must cross memory at least once."""
    peak: str
    """Of Target.peak."""


@dataclass(frozen=True)
class Measured:
    """Of one candidate, seconds a call."""

    median: float
    low: float
    """25th percentile of the rounds."""
    high: float


@dataclass
class Result:
    """Of one case."""

    op: str
    size: str
    times: dict[str, Measured]
    failed: dict[str, str] = field(default_factory=dict)
    """Candidates that can't run here, and why."""
    best: str | None = None
    """The fastest baseline."""
    ratio: float | None = None
    """Its time over ours: above 1 we are faster."""
    roofline: float | None = None
    """The roofline's time over ours: 1 is as fast as the data sheet allows."""
    bound: str | None = None


class Device(Protocol):
    """What timing needs of a device; the tests have one with a clock of their own."""

    def captured(self, calls: Sequence[Call]) -> Call:
        """Warm the calls up and make one of them all."""
        ...

    def seconds(self, run: Call, times: int) -> float:
        """How long so many runs take."""
        ...


class Gpu:
    """The present CUDA device."""

    def captured(self, calls: Sequence[Call]) -> Call:
        """As a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [calls[0], calls[0], *calls]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def seconds(self, run: Call, times: int) -> float:
        """By CUDA events."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def alternating(candidates: Mapping[str, Sequence[Call]], device: Device, rounds: int = ROUNDS) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every candidate once a round, in turn; then what each took a call, and why others could not run."""
    runs, failed, times = {}, {}, {}
    for name, own in candidates.items():
        try:
            runs[name] = device.captured(own)
        except Exception as error:  # whatever a baseline meets here is a fact about it, to be reported
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            continue
        repeats = max(1, math.ceil(ROUND_SECONDS / max(device.seconds(runs[name], 1), 1e-9)))
        times[name] = (repeats, [])
    for _ in range(rounds):
        for name, (repeats, own) in times.items():
            own.append(device.seconds(runs[name], repeats) / repeats / len(candidates[name]))
    return {name: measured(own) for name, (_, own) in times.items()}, failed


def measured(seconds: Sequence[float]) -> Measured:
    """Quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return Measured(median, low, high)


def copies(args: tuple, l2: int) -> int:
    """How many copies of the arguments are CACHES times the L2 cache together."""
    one = sum(t.nbytes for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    return min(MOST_COPIES, max(1, math.ceil(CACHES * l2 / max(one, 1))))


def judged(case: Case, times: dict[str, Measured], failed: dict[str, str], target: Target | None) -> Result:
    """Ours against the fastest baseline and against the roofline."""
    result = Result(case.op, case.size, times, failed)
    theirs = {name: t.median for name, t in times.items() if name != "rewright"}
    if "rewright" not in times:
        return result
    ours = times["rewright"].median
    if theirs:
        result.best = min(theirs, key=theirs.__getitem__)
        result.ratio = theirs[result.best] / ours
    if target is not None and case.peak in target.peak:
        least, result.bound = target.seconds(case.flops, case.bytes, 0, case.peak)
        result.roofline = least / ours
    return result


def timed(case: Case, kernel: Kernel, device: Device, target: Target | None, l2: int, where: str = "cuda", rounds: int = ROUNDS) -> Result:
    """One case, measured."""
    launch = kernel.load().launch
    torch.manual_seed(0)
    torch._dynamo.reset()  # or sizes of earlier cases count against the limit on recompilations
    first = case.make(where)
    given = [first, *(case.make(where) for _ in range(copies(first, l2) - 1))]
    candidates: dict[str, Sequence[Call]] = {"rewright": [lambda a=args: launch(*a) for args in given]}
    failed = {}
    for name, baseline in case.baselines.items():
        try:
            candidates[name] = [baseline(*args) for args in given]
        except Exception as error:  # a baseline whose library is absent, or that this device lacks
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    times, more = alternating(candidates, device, rounds)
    return judged(case, times, failed | more, target)


# ---- baselines


def compiled(op: str) -> Baseline:
    """torch.compile of the op's meaning."""
    meaning = getattr(torch.ops.rewright, op).default
    whole = torch.compile(lambda *args: meaning(*args), dynamic=False)
    return lambda *args: lambda: whole(*args)


def eager(op: str) -> Baseline:
    """The meaning, step by step."""
    meaning = getattr(torch.ops.rewright, op).default
    return lambda *args: lambda: meaning(*args)


def dense(out: int, x_at: int = 0) -> Baseline:
    """cuBLAS on a dense weight of the same size, in x's dtype."""

    def prepared(*args: Any) -> Call:
        x = args[x_at]
        w, b = torch.randn(out, x.shape[-1], dtype=x.dtype, device=x.device), torch.randn(out, dtype=x.dtype, device=x.device)
        return lambda: F.linear(x, w, b)

    return prepared


def int_mm() -> Baseline:
    """cuBLAS's int8 product between compiled quantization and scaling, by token."""

    def product(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True) / 127
        q = (x / step).round().clamp(-127, 127).to(torch.int8)
        y = torch._int_mm(q, w.t()) * step * scale
        return (y if b is None else y + b).to(x.dtype)

    whole = torch.compile(product, dynamic=False)
    return lambda x, w, scale, b=None, bits=8: lambda: whole(x, w, scale, b)


def scaled_mm() -> Baseline:
    """cuBLAS's float8 product with a scale a row and a column, behind compiled quantization."""

    def product(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True) / 448
        q = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch._scaled_mm(q, w.t(), step, scale[None], bias=b, out_dtype=x.dtype, use_fast_accum=False)

    whole = torch.compile(product, dynamic=False)
    return lambda x, w, scale, b=None: lambda: whole(x, w, scale, b)


def torchao(config: str, **options: Any) -> Baseline:
    """torchao's quantized linear of the same size."""

    def prepared(x: Tensor, w: Tensor, *args: Any) -> Call:
        quantization = importlib.import_module("torchao.quantization")
        layer = torch.nn.Linear(x.shape[-1], w.shape[0], dtype=x.dtype, device=x.device)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        whole = torch.compile(layer, dynamic=False)
        return lambda: whole(x)

    return prepared


def sdpa(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Call:
    """Softmax attention of the same shapes, for which linear attention stands in."""
    causal = bool(args[1]) if len(args) > 1 else False
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


# ---- cases

LINEARS = (
    (1, 4096, 4096), (1, 4096, 14336), (16, 4096, 4096), (64, 4096, 4096),  # decoding
    (2048, 4096, 4096), (2048, 4096, 14336),  # a prompt
    (4616, 1024, 4096), (12288, 1024, 4096),  # ViT-L/16-384 at batch 8, BERT-large at 32 x 384
)  # fmt: skip
"""rows, inputs, outputs."""


def linears() -> Iterator[Case]:
    """Every linear at every size."""
    for m, k, n in LINEARS:
        size, flops, io = f"[{m}, {k}] x [{n}, {k}]", 2.0 * m * n * k, 2 * (m * k + m * n)

        def x(device: str, m: int = m, k: int = k) -> Tensor:
            return torch.randn(m, k, dtype=BF16, device=device)

        def w8(device: str, n: int = n, k: int = k) -> tuple[Tensor, Tensor, Tensor]:
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            return w, torch.rand(n, device=device) * 1e-3, torch.randn(n, dtype=BF16, device=device)

        plain = {"cuBLAS bf16": dense(n)}
        w8a8 = plain | {"torch._int_mm": int_mm(), "torchao int8": torchao("Int8DynamicActivationInt8WeightConfig")}
        yield Case("linear_token", size, lambda d, x=x, w8=w8: (x(d), *w8(d), 8), w8a8, flops, io + n * k, "int8")
        yield Case("linear_int8_dynamic", size, lambda d, x=x, w8=w8: (x(d), *w8(d)), w8a8, flops, io + n * k, "int8")
        grid = lambda d: (torch.tensor(0.03, device=d), torch.tensor(128, dtype=torch.uint8, device=d))  # noqa: E731
        yield Case("linear_int8_static", size, lambda d, x=x, w8=w8, g=grid: (x(d), *g(d), *w8(d)), plain, flops, io + n * k, "int8")

        def fp8(device: str, x: Any = x, n: int = n, k: int = k) -> tuple:
            w = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
            return x(device), w, torch.rand(n, device=device), torch.randn(n, dtype=BF16, device=device)

        yield Case("linear_fp8", size, fp8, plain | {"torch._scaled_mm": scaled_mm()}, flops, io + n * k, "fp8")

        def nbits(device: str, x: Any = x, n: int = n, k: int = k) -> tuple:
            w = torch.randint(0, 256, (n, k // 128, 64), dtype=torch.uint8, device=device)
            zero = torch.randint(0, 256, (n, k // 256), dtype=torch.uint8, device=device)
            return x(device), w, torch.rand(n, k // 128, dtype=BF16, device=device), zero, None, 4, 128

        int4 = plain | {"torchao int4": torchao("Int4WeightOnlyConfig", group_size=128)}
        yield Case("linear_nbits", f"{size} 4 bits", nbits, int4, flops, io + n * k / 2, "bf16")
        for activations, peak in (("none", "bf16"), ("int8-token", "int8")):

            def shift(device: str, x: Any = x, n: int = n, k: int = k, a: str = activations) -> tuple:
                w = torch.randint(0, 256, (1, n, k // 2), dtype=torch.uint8, device=device)
                return x(device), w, torch.rand(1, n, dtype=BF16, device=device), None, a

            def ternary(device: str, x: Any = x, n: int = n, k: int = k, a: str = activations) -> tuple:
                w = torch.randint(0, 256, (n, k // 4), dtype=torch.uint8, device=device) & 0b10101010
                return x(device), w, torch.rand(n, device=device), None, a

            yield Case("shift_linear", f"{size} {activations}", shift, plain, flops, io + n * k / 2, peak)
            yield Case("ternary_linear", f"{size} {activations}", ternary, plain, flops, io + n * k / 4, peak)


def blocks() -> Iterator[Case]:
    """Block matrices of half and of a quarter of a dense one's parameters."""
    for m, n, out, k in ((2048, 4096, 4096, 4), (12288, 1024, 4096, 4), (16, 4096, 4096, 4)):
        rank = n // 2

        def block_dense(device: str, m: int = m, n: int = n, out: int = out, k: int = k, r: int = rank) -> tuple:
            x, v, u = torch.randn(m, n), torch.randn(k, r // k, n // k), torch.randn(out, r)
            return *(t.to(device, BF16) for t in (x, v, u)), torch.randn(out, dtype=BF16, device=device)

        def shuffle(device: str, m: int = m, n: int = n, out: int = out, k: int = k) -> tuple:
            x, w1, w2 = torch.randn(m, n), torch.randn(k, n // k, n // k), torch.randn(k, out // k, n // k)
            return *(t.to(device, BF16) for t in (x, w1, w2)), torch.randn(out, dtype=BF16, device=device)

        first, second = rank * n // k, out * rank
        yield Case("block_dense_linear", f"[{m}, {n}] -> {out}, {k} blocks", block_dense,
                   {"cuBLAS bf16": dense(out), "torch.compile": compiled("block_dense_linear")},
                   2.0 * m * (first + second), 2.0 * (m * (n + out) + first + second), "bf16")  # fmt: skip
        first, second = n * n // k, out * n // k
        yield Case("block_shuffle_linear", f"[{m}, {n}] -> {out}, {k} blocks", shuffle,
                   {"cuBLAS bf16": dense(out), "torch.compile": compiled("block_shuffle_linear")},
                   2.0 * m * (first + second), 2.0 * (m * (n + out) + first + second), "bf16")  # fmt: skip


def attentions() -> Iterator[Case]:
    """Linear attention beside softmax attention."""
    for b, h, n, d, causal in (
        (8, 16, 1024, 64, False),
        (2, 16, 4096, 64, False),
        (1, 16, 16384, 64, False),
        (2, 32, 4096, 64, True),
        (1, 32, 16384, 128, True),
    ):

        def make(device: str, b: int = b, h: int = h, n: int = n, d: int = d, causal: bool = causal) -> tuple:
            q, k, v = torch.rand(3, b, h, n, d, dtype=BF16, device=device)
            return q, k, v, None, causal

        products = 2 * n * d * d * 2 + (2 * n * 64 * d * 2 if causal else 0)
        yield Case("linear_attention", f"[{b}, {h}, {n}, {d}]{' causal' if causal else ''}", make,
                   {"SDPA": sdpa, "torch.compile": compiled("linear_attention")}, float(b * h * products), 2.0 * 4 * b * h * n * d, "tf32")  # fmt: skip


def norms() -> Iterator[Case]:
    """Norms of hidden states."""
    for m, d in ((16, 4096), (2048, 4096), (12288, 1024)):

        def one(device: str, m: int = m, d: int = d) -> tuple:
            return torch.randn(m, d, dtype=BF16, device=device), torch.randn(d, dtype=BF16, device=device), 1e-5

        def two(device: str, m: int = m, d: int = d) -> tuple:
            return *torch.randn(2, m, d, dtype=BF16, device=device), torch.randn(d, dtype=BF16, device=device), 1e-5

        def layer(device: str, m: int = m, d: int = d) -> tuple:
            return *torch.randn(2, m, d, dtype=BF16, device=device), *torch.randn(2, d, dtype=BF16, device=device), 1e-5

        fused: Baseline = lambda x, w, eps: lambda: F.rms_norm(x, (x.shape[-1],), w, eps)  # noqa: E731
        yield Case("rms_norm", f"[{m}, {d}]", one, {"torch.compile": compiled("rms_norm"), "F.rms_norm": fused}, 4.0 * m * d, 4.0 * m * d, "fp32")
        yield Case("add_rms_norm", f"[{m}, {d}]", two, {"torch.compile": compiled("add_rms_norm")}, 5.0 * m * d, 8.0 * m * d, "fp32")
        yield Case("add_layer_norm", f"[{m}, {d}]", layer, {"torch.compile": compiled("add_layer_norm")}, 8.0 * m * d, 8.0 * m * d, "fp32")


def tokens() -> Iterator[Case]:
    """Token merging: ViT-L/16-384 and a diffusion model's latents."""
    for b, n, d, c, r in ((64, 577, 64, 1024, 23), (8, 577, 64, 1024, 23), (2, 4096, 64, 640, 1024)):

        def match(device: str, b: int = b, n: int = n, d: int = d, r: int = r) -> tuple:
            return torch.randn(b, n, d, dtype=BF16, device=device), r, 1, torch.ones(b, n, device=device)

        def merge(device: str, b: int = b, n: int = n, c: int = c, r: int = r) -> tuple:
            keep, source = (t.expand(b, -1).contiguous() for t in torch.arange(n, device=device).split((n - r, r)))
            return torch.randn(b, n, c, dtype=BF16, device=device), keep, source, torch.randint(n - r, (b, r), device=device), torch.ones(b, n, device=device)

        both = lambda op: {"torch": eager(op), "torch.compile": compiled(op)}  # noqa: E731
        yield Case("token_match", f"[{b}, {n}, {d}] r={r}", match, both("token_match"), b * (n / 2) ** 2 * 2.0 * d, 2.0 * b * n * d, "fp32")
        yield Case("token_merge", f"[{b}, {n}, {c}] r={r}", merge, both("token_merge"), 2.0 * b * n * c, 4.0 * b * n * c, "fp32")


def all_cases() -> list[Case]:
    """Every kernel over realistic sizes."""
    return [*linears(), *blocks(), *attentions(), *norms(), *tokens()]


# ---- tiles

TUNABLE = {
    "linear_token": ("_gemm", "TILES"), "linear_fp8": ("_gemm", "TILES"), "linear_nbits": ("_packed", "TILES"),
    "shift_linear": ("_packed", "TILES"), "ternary_linear": ("_packed", "TILES"), "block_shuffle_linear": ("_blocks", "TILES"),
}  # fmt: skip
"""op -> the file under backends/triton and its table."""
SEARCH = {"bm": (16, 32, 64, 128), "bn": (32, 64, 128, 256), "bk": (32, 64, 128, 256), "warps": (4, 8), "stages": (3, 4, 5)}


def search(rows: int) -> Iterator[dict[str, int]]:
    """Tiles worth trying for so many rows: none much taller than they are, none too large for registers."""
    for values in itertools.product(*SEARCH.values()):
        tile = dict(zip(SEARCH, values))
        if tile["bm"] <= max(16, 2 * rows) and 32 <= tile["bm"] * tile["bn"] // (tile["warps"] * 32) <= 128 and tile["bk"] * (tile["bm"] + tile["bn"]) <= 2**16:
            yield tile


def tuned(case: Case, kernel: Kernel, device: Device, l2: int, where: str = "cuda") -> dict[str, Any] | None:
    """The fastest tile of the search for a case, beside the table's own time."""
    if kernel.op not in TUNABLE:
        return None
    file, name = TUNABLE[kernel.op]
    module, tiles = (importlib.import_module(f"..backends.triton.{f}", __package__) for f in (file, "_tiles"))
    launch, first = kernel.load().launch, case.make(where)
    given = [first, *(case.make(where) for _ in range(copies(first, l2) - 1))]
    run = [lambda a=args: launch(*a) for args in given]
    before, _ = alternating({"table": run}, device, rounds=5)
    best: dict[str, Any] | None = None
    for tile in search(first[0].shape[0]):
        row = tiles.Tile(rows=tiles.ANY, **tile)
        with mock.patch.object(module, name, (row,)):
            found, _ = alternating({"tile": run}, device, rounds=5)
        if "tile" in found and (best is None or found["tile"].median < best["seconds"]):
            best = {"op": case.op, "size": case.size, "tile": tile, "seconds": found["tile"].median, "table_seconds": before["table"].median}
    return best


# ---- the command


def present() -> tuple[str, Target | None, int]:
    """The device's name, its target if we have one, its L2 cache in bytes."""
    properties = torch.cuda.get_device_properties(0)
    return properties.name, target_of(properties.name), properties.L2_cache_size


def target_of(name: str) -> Target | None:
    """The target a device's name speaks of: 'NVIDIA H200' is h200, 'NVIDIA L40S' is not l4."""
    squeezed = name.lower().replace(" ", "")
    found = next((t for t in known_targets() if re.search(rf"{t}(?![0-9])", squeezed)), None)
    return Target.load(found) if found else None


def checked(kernel: Kernel, dtypes: Iterable[torch.dtype]) -> tuple[int, list[str]]:
    """Calls that are right on this GPU, and what is wrong with the others."""
    right, faults = 0, []
    launch = kernel.load().launch
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives with NaN
    try:
        for dtype in dtypes:
            for args in calls(kernel, dtype, "cuda"):
                before = pytree.tree_map_only(Tensor, Tensor.clone, args)
                found = fault(kernel, dtype, before, launch(*args), args)
                right += found is None
                faults += [found] if found else []
    finally:
        torch.use_deterministic_algorithms(False)
    return right, faults


def table(report: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['date']}. Times of CUDA graphs, arguments out of the cache.", ""]
    for kernel in report["checks"]:
        lines.append(
            f"{kernel['op']:<24} {kernel['right']} calls right" + (f", {len(kernel['faults'])} WRONG: {kernel['faults'][0]}" if kernel["faults"] else "")
        )
    lines += ["", f"{'kernel':<22} {'size':<40} {'us':>9} {'quartiles':>17}  {'best baseline':<18} {'us':>9} {'ratio':>6} {'roofline':>9}"]
    for result in report["times"]:
        ours = result["times"].get("rewright")
        if ours is None:
            lines.append(f"{result['op']:<22} {result['size']:<40} {result['failed'].get('rewright', 'was not measured')}")
            continue
        best = result["best"]
        theirs = f"{best:<18} {result['times'][best]['median'] * 1e6:>9.1f} {result['ratio']:>6.2f}" if best else f"{'none ran':<35}"
        share = f"{result['roofline']:>8.0%} {result['bound']}" if result["roofline"] is not None else ""
        lines.append(
            f"{result['op']:<22} {result['size']:<40} {ours['median'] * 1e6:>9.1f} {ours['low'] * 1e6:>8.1f}-{ours['high'] * 1e6:<8.1f}  {theirs} {share}"
        )
    for best in report["tiles"]:
        lines.append(f"tile for {best['op']} {best['size']}: {best['tile']} {best['seconds'] * 1e6:.1f} us, the table's {best['table_seconds'] * 1e6:.1f} us")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if every kernel is right, 1 if one is not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", help="only these kernels")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    parser.add_argument("--tune", action="store_true", help="also search for faster tiles: many minutes")
    given = parser.parse_args(arguments)
    if reason := absent("triton") or (None if torch.cuda.is_available() else "torch sees no CUDA device on this machine"):
        print(f"Nothing was measured: {reason}.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    kernels = {k.op: k for k in KERNELS if k.backend == "triton" and (not given.ops or k.op in given.ops)}
    if unknown := set(given.ops) - set(kernels):
        print(f"no Triton kernel for {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    name, target, l2 = present()
    unable = {op: reason for op, k in kernels.items() if (reason := k.why_not("cuda", F16))}
    report: dict[str, Any] = {
        "device": name,
        "target": target.name if target else None,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "date": time.strftime("%Y-%m-%d"),
        "unable": unable,
        "checks": [],
        "times": [],
        "tiles": [],
    }
    for op, kernel in kernels.items():
        if op not in unable:
            right, faults = checked(kernel, kernel.dtypes)
            report["checks"].append({"op": op, "right": right, "faults": faults})
            print(op, right, "right", *faults[:3], file=sys.stderr, flush=True)
    for case in all_cases():
        if case.op in kernels and case.op not in unable:
            kernel = kernels[case.op]
            report["times"].append(asdict(timed(case, kernel, Gpu(), target, l2)))
            if given.tune and (best := tuned(case, kernel, Gpu(), l2)):
                report["tiles"].append(best)
            print(case.op, case.size, report["times"][-1]["ratio"], file=sys.stderr, flush=True)
            given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")  # after every case: a session on a lent GPU may end
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    given.out.with_suffix(".txt").write_text(table(report), encoding="utf8")
    print(table(report))
    return int(any(c["faults"] for c in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
