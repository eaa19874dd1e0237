"""The cost model against the clock: every distinct linear of the zoo models, predicted and measured on this CPU.

usage: python benchmarks/cost_model.py [--short]      some 6 minutes on a core alone; --short: the digits model, prints, writes nothing
Writes benchmarks/cost_model.json and .txt. A row is a linear of one size, as one backend runs it: torch eager and onnxruntime in float32, onnxruntime
in 8 bits with ranges as they come and with calibrated ones (files of rewright's own export). Measured: six calls with weights and inputs of their
own, as six layers have, divided by six; all rows in turn, so that none finds its weights in a cache where a model would not; medians of processor
time of one thread. Predicted: by the target `cpu` as it is shipped (by its ISA features) and by one that `rewright doctor --measure` made here.
Rank correlation: Spearman's, of predicted and measured times over all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHAPES = {"minilm": ("8x128", "1x128", "1x16"), "digits-vit": ("8", "1"), "stdlib-lm": ("4x256", "1x256", "1x32")}
CALLS = 6
ROUNDS = 25
KINDS = {
    "torch fp32": None,
    "onnxruntime fp32": None,
    "onnxruntime int8-dynamic": "int8-dynamic",
    "onnxruntime int8-static": "int8-static",
}
"""Row kinds, and what quantize-linear does to activations for it."""

Linear = tuple[int, int, int, bool]
"""Rows, inputs, outputs, whether it has a bias."""


def linears(model: str, shape: str) -> list[Linear]:
    """The distinct ones of a zoo model."""
    import torch

    from rewright.ir.cost import sizer
    from rewright.tools.models import load_model

    graph = load_model(f"zoo:{model}").graph
    size = sizer(graph, dict(zip(graph.dims, map(int, shape.split("x")))))
    found = []
    for node in graph.find(torch.ops.aten.linear.default):
        *rows, inputs = (size(s) for s in node.args[0].meta["val"].shape)
        count = 1
        for n in rows:
            count *= n
        found.append((count, inputs, node.args[1].meta["val"].shape[0], len(node.args) > 2 and node.args[2] is not None))
    return list(dict.fromkeys(found))


def program(linear: Linear, activations: str | None) -> tuple[Any, tuple[Any, ...]]:
    """A graph of `CALLS` calls and its inputs."""
    import torch
    from torch import Tensor, nn

    from rewright.ir.capture import capture
    from rewright.passes.pipeline import Pipeline
    from rewright.passes.quantization.quantize_linear import QuantizeLinear
    from rewright.passes.statistics import Calibration

    rows, inputs, outputs, bias = linear

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = nn.ModuleList(nn.Linear(inputs, outputs, bias) for _ in range(CALLS))

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [call(x) for call, x in zip(self.calls, xs)]

    torch.manual_seed(0)
    flat = tuple(torch.randn(CALLS, rows, inputs).unbind(0))
    graph = capture(Calls().eval(), (list(flat),), dynamic_shapes={})
    steps = [] if activations is None else [QuantizeLinear(weights="int8-channel", activations=activations)]  # type: ignore[arg-type]
    return Pipeline(steps, calibration=Calibration([flat]), verify=False).run(graph).graph, flat


def call_of(runtime: str, graph: Any, flat: tuple[Any, ...], folder: Path) -> Callable[[], Any]:
    """What runs a program once, into results that are there already where the runtime has a way."""
    import torch

    if runtime == "torch":
        layers = [(graph.weight(n.args[1]), graph.weight(n.args[2]) if len(n.args) > 2 else None) for n in graph.find(torch.ops.aten.linear.default)]

        def eager() -> None:
            for x, (w, b) in zip(flat, layers, strict=True):
                torch.nn.functional.linear(x, w, b)

        return eager
    import onnxruntime

    from rewright.backends.onnx.export import export

    export(graph, folder / "calls.onnx", [flat])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "calls.onnx"), options, providers=["CPUExecutionProvider"])
    binding, results = session.io_binding(), graph.run(flat)
    for value, x in zip(session.get_inputs(), flat, strict=True):
        binding.bind_cpu_input(value.name, x.numpy())
    for value, y in zip(session.get_outputs(), results, strict=True):
        binding.bind_ortvalue_output(value.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(y.shape), y.numpy().dtype))
    return lambda: session.run_with_iobinding(binding)


def rows_of(shapes: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str, str, Linear]]:
    """(kind, model, shape, linear)"""
    for model, its in shapes.items():
        for shape in its:
            for linear in linears(model, shape):
                yield from ((kind, model, shape, linear) for kind in KINDS)


def timed(calls: list[Callable[[], Any]]) -> list[float]:
    """Median seconds of processor time of each, all in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(ROUNDS + 2):
        for own, call in zip(times, calls):
            start = time.thread_time_ns()
            call()
            if i >= 2:
                own.append((time.thread_time_ns() - start) / 1e9)
    return [statistics.median(own) for own in times]


def measured(shapes: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """All rows, with what they were measured with."""
    import torch

    from rewright.backends.target import Target, cpu_class, cpu_features
    from rewright.tools.demo import conditions
    from rewright.tools.measure import measure
    from rewright.tools.optimize import predicted_seconds

    torch.set_num_threads(1)
    begin, load = time.perf_counter(), os.getloadavg()[0]
    with TemporaryDirectory() as folder, torch.no_grad():
        own = Path(folder) / "measured.toml"
        own.write_text(measure("cpu").toml())
        targets = {f"cpu (as {cpu_class(cpu_features())})": Target.load("cpu"), "measured here": Target.load(own)}
        seen: dict[tuple[str, Linear], int] = {}
        rows, calls = [], []
        for kind, model, shape, linear in rows_of(shapes):
            if (kind, linear) in seen:
                rows[seen[kind, linear]]["models"].append(f"{model} {shape}")
                continue
            seen[kind, linear] = len(rows)
            graph, flat = program(linear, KINDS[kind])
            calls.append(call_of(kind.split()[0], graph, flat, Path(folder)))
            predicted = {name: predicted_seconds(graph, target) / CALLS * 1e6 for name, target in targets.items()}
            rows.append({"kind": kind, "linear": linear, "models": [f"{model} {shape}"], "predicted_us": predicted})
        for row, seconds in zip(rows, timed(calls)):
            row["measured_us"] = seconds / CALLS * 1e6
    machine = f"load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end, on {os.cpu_count()} cores"
    found = {"conditions": conditions() | {"machine": machine, "rounds": ROUNDS, "seconds": round(time.perf_counter() - begin)}}
    numbers = {name: {"peak": dict(t.peak), "bandwidth": t.bandwidth, "launch": t.launch, "efficiency": dict(t.efficiency)} for name, t in targets.items()}
    return found | {"targets": numbers, "summary": {name: summary(rows, name) for name in targets}, "rows": rows}


def summary(rows: list[dict[str, Any]], target: str) -> dict[str, dict[str, float]]:
    """Of all rows and of each kind: how many, rank correlation, median relative error, median of predicted / measured."""
    from scipy.stats import spearmanr

    found = {}
    for name in ("all", *KINDS):
        pairs = [(r["predicted_us"][target], r["measured_us"]) for r in rows if name in ("all", r["kind"])]
        predicted, clock = zip(*pairs)
        found[name] = {
            "rows": len(pairs),
            "rank_correlation": float(spearmanr(predicted, clock)[0]),  # type: ignore[arg-type]
            "median_error": statistics.median(abs(p - m) / m for p, m in pairs),
            "median_ratio": statistics.median(p / m for p, m in pairs),
        }
    return found


def text(results: Mapping[str, Any]) -> str:
    """The tables for people."""
    lines = ["Cost model: predicted against measured time of linears. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for name, t in results["targets"].items():
        peaks = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in t["peak"].items())
        shares = ", ".join(f"{kind} {share:.2f}" for kind, share in t["efficiency"].items())
        lines.append(f"{name}: GFLOP/s {peaks}; {t['bandwidth'] / 1e9:.1f} GB/s; {t['launch'] * 1e6:.2f} us a call; share of the roofline: {shares}")
    for name, kinds in results["summary"].items():
        lines += ["", f"target {name}:   rows   rank correlation   median relative error   median predicted / measured"]
        for kind, s in kinds.items():
            lines.append(f"  {kind:26s} {s['rows']:4d}   {s['rank_correlation']:16.3f}   {100 * s['median_error']:19.0f} %   {s['median_ratio']:27.2f}")
    names = list(results["targets"])
    lines += ["", f"us a call: measured, then predicted by {', '.join(names)}"]
    for r in sorted(results["rows"], key=lambda r: (list(KINDS).index(r["kind"]), r["measured_us"])):
        rows, inputs, outputs, bias = r["linear"]
        size = f"{rows} x {inputs} -> {outputs}{'' if bias else ', no bias'}"
        predicted = "".join(f"{r['predicted_us'][n]:10.1f}" for n in names)
        lines.append(f"  {r['kind']:26s} {size:30s} {r['measured_us']:10.1f} {predicted}   {', '.join(r['models'])}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    results = measured({"digits-vit": SHAPES["digits-vit"]} if short else SHAPES)
    if not short:
        here = Path(__file__).parent
        (here / "cost_model.json").write_text(json.dumps(results, indent=1) + "\n")
        (here / "cost_model.txt").write_text(text(results))
    sys.stdout.write(text(results))


if __name__ == "__main__":
    main()
