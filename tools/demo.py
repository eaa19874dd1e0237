"""The main job on a real model: MiniLM to 8 bits for onnxruntime, and one honest table about it."""

from __future__ import annotations

import copy
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.onnx.export import Exported, export
from ..backends.onnx.session import Session
from ..backends.onnx.silence import silent
from ..backends.table import absent
from ..backends.target import cpu_features
from ..ir.graph import Graph, quiet
from .bench import Timing, alternate
from .models import as_flat, load_model
from .optimize import Result, optimize
from .score import Score
from .zoo import ZooModel
from .zoo.minilm import encode, judged_texts

SHAPES = ((1, 32), (8, 128), (32, 64))
BASELINE = "onnxruntime quantize_dynamic"
OURS = "rewright encoder-int8"
OURS_TVM = "rewright encoder-int8 in TVM"
EAGER, COMPILED, FP32 = "torch eager fp32", "torch.compile fp32", "onnxruntime fp32"
EAGER_BF16, COMPILED_BF16 = "torch eager bf16", "torch.compile bf16"


@dataclass
class Demo:
    """Everything the demo found."""

    result: Result
    captured_ms: float
    """onnxruntime at 8x128 on the program as captured, before any pass."""
    exported: Exported
    sizes: dict[str, tuple[int, int]]
    """ONNX candidate -> (nodes, bytes on disk)."""
    timings: dict[str, dict[str, Timing]]
    """'8x128' -> candidate -> timing; ratios are to `BASELINE`."""
    quality: dict[str, list[Score]]
    conditions: dict[str, Any]

    @property
    def payload(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": "zoo:minilm",
            "target": self.result.recipe.target,
            "output": str(self.exported.path),
            "conditions": self.conditions,
            "sizes": {k: {"nodes": n, "bytes": b} for k, (n, b) in self.sizes.items()},
            "timings": {shape: {k: t.as_dict() for k, t in row.items()} for shape, row in self.timings.items()},
            "quality": {k: [score.as_dict() for score in q] for k, q in self.quality.items()},
            "captured_latency_ms": self.captured_ms,
            "passes": [r.as_dict() for r in self.result.records],
            "verification": self.result.verification,
        }


def demo(out: Path, quick: bool = False, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Demo:
    """Optimize zoo:minilm with the recipe encoder-int8, write `out`, measure it against the original and onnxruntime's own quantizer.

    One thread everywhere; `quick`: a third of the rounds, a quarter of the texts, no torch.compile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _demo(out, quick, progress)
    finally:
        torch.set_num_threads(threads)


def _tvm(graph: Graph) -> Callable[[dict[str, Tensor]], Any]:
    """The program compiled by TVM, on batches by name."""
    from ..backends.tvm.build import compile_graph

    compiled, names = compile_graph(graph), graph.call.names
    return lambda batch: compiled([batch[name] for name in names])[0]


def _demo(out: Path, quick: bool, progress: Callable[[str, int, int], None]) -> Demo:
    steps = iter(range(100))
    say = lambda what: progress(what, next(steps), 10)  # noqa: E731
    say("loading and capturing MiniLM")
    loaded = load_model("zoo:minilm")
    zoo = loaded.zoo
    assert zoo is not None
    with tempfile.TemporaryDirectory() as scratch:
        say("baseline: torch.onnx.export, onnxruntime quantize_dynamic")
        fp32, dynamic = baselines(zoo, Path(scratch))
        sessions: dict[str, Session] = {FP32: Session(fp32), BASELINE: Session(dynamic)}
        sizes = {FP32: _size(fp32), BASELINE: _size(dynamic)}

        def latency(graph: Graph) -> float:
            """Median ms at 8x128 in onnxruntime, single thread."""
            path = Path(scratch) / "step.onnx"
            export(graph, path)
            call, flat = Session(path), as_flat(graph, encode(judged_texts("held_out")[:8], 128))
            return alternate({"step": lambda: call(flat)}, "step", rounds=5 if quick else 9)["step"].median_ms

        say("optimizing: every pass verified, then timed at 8x128")
        result = optimize(loaded, recipe="encoder-int8", latency=latency)
        captured_ms = latency(result.outcome.original)
        say(f"writing {out}")
        exported = result.export(out)
        sessions[OURS] = Session(out)
        sizes[OURS] = (exported.nodes, exported.bytes)
        runs: dict[str, Callable[[dict[str, Tensor]], Any]] = {name: (lambda batch, s=s: s([batch[i] for i in s.inputs])[0]) for name, s in sessions.items()}
        if absent("tvm") is None:
            say("compiling the same program with TVM")
            runs[OURS_TVM] = _tvm(result.graph)
        module = zoo.module
        runs[EAGER] = lambda batch: module(**batch).last_hidden_state
        if not quick:
            say("compiling the original with torch.compile, in fp32 and bf16")
            half = copy.deepcopy(module).to(torch.bfloat16)
            runs[EAGER_BF16] = lambda batch: half(**batch).last_hidden_state
            for name, compiled in ((COMPILED, _compiled(module, zoo)), (COMPILED_BF16, _compiled(half, zoo))):
                if compiled is not None:
                    runs[name] = lambda batch, compiled=compiled: compiled(**batch).last_hidden_state
        timings = {}
        for batch, length in SHAPES:
            say(f"timing {batch}x{length}")
            inputs = encode(judged_texts("held_out")[:batch], length)
            with torch.inference_mode():
                timings[f"{batch}x{length}"] = alternate(
                    {n: (lambda run=run, inputs=inputs: run(inputs)) for n, run in runs.items()}, BASELINE, rounds=7 if quick else 21
                )
        say("embedding real text")
        quality = {name: zoo.judge(runs[name], 128 if quick else None) for name in (FP32, BASELINE, OURS, OURS_TVM) if name in runs}
    say("done")
    return Demo(result, captured_ms, exported, sizes, timings, quality, conditions())


def baselines(zoo: ZooModel, folder: Path) -> tuple[Path, Path]:
    """What a careful user has without us: the model as torch exports it (opset 20), and onnxruntime's own dynamic quantizer on it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    fp32, dynamic = folder / "fp32.onnx", folder / "dynamic.onnx"
    auto = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in zoo.example}
    with quiet(), silent():
        program = torch.onnx.export(zoo.module, (), kwargs=zoo.example, dynamo=True, opset_version=20, dynamic_shapes=auto, verbose=False)
        assert program is not None
        program.save(str(fp32))
        quantize_dynamic(fp32, dynamic, per_channel=True, weight_type=QuantType.QInt8)
    return fp32, dynamic


def _compiled(original: nn.Module, zoo: ZooModel) -> Any:
    """torch.compile of a module, warmed up; None where there is no C++ compiler."""
    module = torch.compile(original, dynamic=True)
    try:
        with quiet(), torch.inference_mode():
            module(**zoo.example)
    except Exception:  # inductor raises its own classes when no compiler is found
        return None
    return module


def _size(path: Path) -> tuple[int, int]:
    import onnx_ir

    return sum(1 for _ in onnx_ir.load(path).graph), path.stat().st_size


def conditions() -> dict[str, Any]:
    """What the numbers were measured with."""
    import onnxruntime

    cpu = (
        next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
        if os.path.exists("/proc/cpuinfo")
        else platform.processor()
    )
    isa = [f for f in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if f in cpu_features()]
    return {
        "cpu": cpu,
        "isa": isa[:2],
        "threads": 1,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
