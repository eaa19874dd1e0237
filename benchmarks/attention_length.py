"""Softmax, linear, hybrid and block-sparse attention by the number of tokens: time, peak memory, where they cross, beside the cost model's prediction.

usage: python benchmarks/attention_length.py [--short]      some 8 minutes on a core alone; --short: up to 1024 tokens, prints, writes nothing
Writes benchmarks/attention_length.json, .txt and .svg. One layer of 4 heads of 64 channels, batch 1, float32, one thread. torch: eager, its own
fused attention as the softmax; onnxruntime: as exported, with the Attention operator as the softmax. Feature maps are included. Time: median of
runs that alternate in one process, ratios to softmax run by run, in processor time (alone on a core it is the time that passes). Memory: growth
of the resident set at its highest over what was there before the call (VmHWM, reset each time; onnxruntime without its arena), one run in a
process of its own, in which every block is given back when freed. What would take more than 20 s a run is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HEADS, WIDTH = 4, 64
BLOCK, WINDOW, NEAR = 64, 256, 64
"""Tokens of a block and on each side of it that block-sparse attention sees; tokens of the hybrid's window."""
LENGTHS = {"torch": [2**i for i in range(6, 16)], "onnxruntime": [2**i for i in range(6, 14)]}
SHORT = 1024
LIMIT_S = 20.0
DIRECTIONS = ("bidirectional", "causal")
BOTH = ("softmax", "elu1", "hedgehog_softmax", "hybrid", "block")
"""Rows in both directions and both runtimes; the other maps are bidirectional, in torch."""

Cells = dict[str, dict[str, dict[str, Any]]]
"""direction -> tokens -> row -> what was found."""


def rows_of(runtime: str, direction: str) -> tuple[str, ...]:
    """softmax comes first: it is what ratios are to."""
    from rewright.ir.feature_maps import KINDS

    return BOTH if runtime != "torch" or direction == "causal" else (*BOTH, *(k for k in KINDS if k not in BOTH))


def module_of(row: str, causal: bool) -> Any:
    """A layer that takes queries, keys and values by head."""
    import torch
    from torch import Tensor, nn

    from rewright.ir.block_patterns import window
    from rewright.ir.feature_maps import initial

    ours = torch.ops.rewright
    kind = "hedgehog_softmax" if row == "hybrid" else row

    class Softmax(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ours.attention(q, k, v, None, causal)

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = window(max(LENGTHS["torch"]) // BLOCK, WINDOW // BLOCK, causal)
            self.blocks = nn.Buffer(torch.nn.functional.pad(blocks, (0, 0, 0, 1), value=-1))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ours.block_attention(q, k, v, self.blocks, BLOCK, None, causal)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (nn.ParameterList(initial(kind, HEADS, WIDTH)) for _ in "qk")
            self.gamma = nn.Parameter(torch.ones(HEADS))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fq, fk = ours.feature_map(q, list(self.q), kind, True), ours.feature_map(k, list(self.k), kind)
            if row == "hybrid":
                return ours.hybrid_attention(q, k, v, fq, fk, self.gamma, None, NEAR, causal)
            return ours.linear_attention(fq, fk, v, None, causal)

    return {"softmax": Softmax, "block": Sparse}.get(row, Linear)().eval()


def given(tokens: int) -> tuple[Any, ...]:
    import torch

    return tuple(torch.randn(1, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(3))


def exported(folder: Path) -> None:
    """A file a row and direction, for any number of tokens."""
    from rewright.backends.onnx.export import export
    from rewright.ir.capture import capture

    for direction in DIRECTIONS:
        for row in rows_of("onnxruntime", direction):
            graph = capture(module_of(row, direction == "causal"), given(200), dynamic_shapes={name: {2: "tokens"} for name in "qkv"})
            export(graph, folder / f"{direction}-{row}.onnx", [given(200)])


def call_of(runtime: str, folder: Path, direction: str, row: str, arena: bool = True) -> Callable[..., Any]:
    """What runs one layer."""
    if runtime == "torch":
        return module_of(row, direction == "causal")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level, options.enable_cpu_mem_arena, options.enable_mem_pattern = 3, arena, arena
    session = onnxruntime.InferenceSession(str(folder / f"{direction}-{row}.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda *tensors: session.run(None, {name: t.numpy() for name, t in zip("qkv", tensors)})


def too_long(row: str, tokens: int, before: Mapping[str, Any]) -> str | None:
    """Why a cell is left out, by the time of the length before."""
    last = before.get(row)
    if last is None:
        return None
    if "left_out" in last:
        return last["left_out"]
    expected = last["median_ms"] / 1e3 * (4 if row == "softmax" else 2)
    return f"{tokens} tokens would take about {expected:.0f} s a run" if expected > LIMIT_S else None


def timed(runtime: str, folder: Path, lengths: list[int]) -> Cells:
    """Times of runs in turn, fewer where they are long."""
    import torch

    found: Cells = {}
    for direction in DIRECTIONS:
        calls = {row: call_of(runtime, folder, direction, row) for row in rows_of(runtime, direction)}
        before: dict[str, Any] = {}
        for tokens in lengths:
            inputs = given(tokens)
            cells: dict[str, Any] = {row: {"left_out": why} for row in calls if (why := too_long(row, tokens, before))}
            with torch.no_grad():
                cells |= alternate({row: (lambda call=call, inputs=inputs: call(*inputs)) for row, call in calls.items() if row not in cells})
            found.setdefault(direction, {})[str(tokens)] = before = cells
            print(runtime, direction, tokens, {row: round(c["median_ms"], 2) for row, c in cells.items() if "median_ms" in c}, file=sys.stderr, flush=True)
    return found


def alternate(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """As tools.bench.alternate, in processor time: on a machine shared with others wall time counts their turns too. 2 to 15 rounds, about 4 seconds."""
    clock, repeats, times = time.process_time, {}, {row: [] for row in calls}
    spent = 0.0
    for row, call in calls.items():
        for _ in range(2):  # the second of a short call is warm
            start = clock()
            call()
            once = clock() - start
            if once > 0.1:
                break
        repeats[row] = max(1, int(1e-3 / max(once, 1e-6)))
        spent += once
    rounds = max(2, min(15, int(4 / spent)))
    for _ in range(rounds):
        for row, call in calls.items():
            start = clock()
            for _ in range(repeats[row]):
                call()
            times[row].append((clock() - start) / repeats[row] * 1e3)
    return {row: _summary(own, times.get("softmax")) for row, own in times.items()}


def _summary(own: list[float], softmax: list[float] | None) -> dict[str, Any]:
    """Median and quartiles, also of the ratios round by round."""
    low, median, high = statistics.quantiles(own, n=4, method="inclusive")
    found: dict[str, Any] = {"median_ms": median, "low_ms": low, "high_ms": high, "runs": len(own)}
    if softmax is not None:
        ratios = statistics.quantiles([a / b for a, b in zip(own, softmax)], n=4, method="inclusive")
        found |= dict(zip(("ratio_low", "ratio", "ratio_high"), ratios))
    return found


def status(key: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def peak(call: Callable[[], Any]) -> int:
    """How far the resident set grows during a call, its result included."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = call()
    found = status("VmHWM") - before
    del kept
    return max(0, found)


def peaks(runtime: str, folder: Path, lengths: list[int]) -> Cells:
    """In a process of its own: blocks above 64 KiB come from and go back to the system, so that each call starts without any."""
    import torch

    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    found: Cells = {}
    known = 1 << 26
    found["check"] = {"known": {"bytes": known, "measured": peak(lambda: torch.ones(known // 4))}}
    with torch.no_grad():
        for direction in DIRECTIONS:
            for row in rows_of(runtime, direction):
                call, before = call_of(runtime, folder, direction, row, arena=False), {}
                call(*given(lengths[0]))
                for tokens in lengths:
                    if why := too_long(row, tokens, before):
                        cell: dict[str, Any] = {"left_out": why}
                    else:
                        inputs, begin = given(tokens), time.process_time()
                        grown = peak(lambda call=call, inputs=inputs: call(*inputs))
                        cell = {"bytes": grown, "median_ms": (time.process_time() - begin) * 1e3}
                    before = {row: cell}
                    found.setdefault(direction, {}).setdefault(str(tokens), {})[row] = cell
    return found


def in_a_process(runtime: str, folder: Path, lengths: list[int]) -> Cells:
    given = [runtime, str(folder), ",".join(map(str, lengths))]
    done = subprocess.run([sys.executable, __file__, "--memory-of", *given], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def crossing(cells: Mapping[str, Mapping[str, Any]], row: str) -> str:
    """Tokens at which a row becomes faster than softmax for good, interpolated between the lengths on both sides."""
    ratios = [(int(n), c[row]["ratio"]) for n, c in cells.items() if "ratio" in c[row]]
    behind = [i for i, (_, ratio) in enumerate(ratios) if ratio >= 1]
    if not behind:
        return f"below {ratios[0][0]}"
    if behind[-1] == len(ratios) - 1:
        return f"above {ratios[-1][0]}"
    (n, above), (m, below) = ratios[behind[-1] : behind[-1] + 2]
    return str(round(n * (m / n) ** (math.log(above) / math.log(above / below))))


def crossings(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Measured in both runtimes and predicted by the cost model of the target cpu."""
    from rewright.backends.target import Target
    from rewright.ir.crossover import crossover
    from rewright.tools.optimize import predicted_seconds

    target, found = Target.load("cpu"), []

    def predict(graph: Any, sizes: Any) -> float:
        return predicted_seconds(graph, target, sizes)

    for direction in DIRECTIONS:
        for row in rows_of("torch", direction)[1:]:
            line = {"row": row, "direction": direction, "torch": crossing(results["time"]["torch"][direction], row)}
            if row in BOTH:
                line["onnxruntime"] = crossing(results["time"]["onnxruntime"][direction], row)
            if row != "block":
                kind, near = ("hedgehog_softmax", NEAR) if row == "hybrid" else (row, 0)
                at = crossover(predict, heads=HEADS, head_dim=WIDTH, feature_map=kind, window=near, causal=direction == "causal")
                line["predicted"] = str(at)
            found.append(line)
    return found


def measured(lengths: Mapping[str, list[int]]) -> dict[str, Any]:
    """All of it, with what it was measured with."""
    from rewright.tools.demo import conditions

    begin, load = time.perf_counter(), [os.getloadavg()[0]]
    results: dict[str, Any] = {"time": {}, "memory": {}}
    with TemporaryDirectory() as folder:
        exported(Path(folder))
        for runtime, of in lengths.items():
            results["time"][runtime] = timed(runtime, Path(folder), of)
        load.append(os.getloadavg()[0])
        for runtime, of in lengths.items():
            results["memory"][runtime] = in_a_process(runtime, Path(folder), of)
    results["crossings"] = crossings(results)
    layer = f"{HEADS} heads of {WIDTH} channels, batch 1, float32"
    sparse = f"block-sparse: {WINDOW} tokens to each side in blocks of {BLOCK}; hybrid: window {NEAR}, hedgehog_softmax"
    shared = f"load average {load[0]:.1f} at the start and {load[1]:.1f} behind the timings, on {os.cpu_count()} cores (1 would be this program alone)"
    return {"conditions": conditions() | {"layer": layer, "rows": sparse, "machine": shared, "seconds": round(time.perf_counter() - begin)}} | results


def text(results: Mapping[str, Any]) -> str:
    """The tables for people."""
    lines = ["Attention by length. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for runtime, of in results["time"].items():
        for direction in DIRECTIONS:
            rows, memory = rows_of(runtime, direction), results["memory"][runtime][direction]
            lines.append(f"{runtime}, {direction}: ms of processor time [quartiles], ratio to softmax [quartiles], MB beyond what was there before")
            for tokens, cells in of[direction].items():
                for row in rows:
                    lines.append(f"  {tokens:>6s} {row:17s} {_said(cells[row])}   {_held(memory[tokens][row])}".rstrip())
            lines.append("")
    for runtime, of in results["memory"].items():
        known = of["check"]["known"]
        lines.append(f"memory of a known {known['bytes'] / 1e6:.1f} MB measured in the {runtime} process: {known['measured'] / 1e6:.1f} MB")
    lines += ["", "tokens from which a row is faster than softmax attention: measured (interpolated) in torch and onnxruntime; predicted by the target cpu"]
    for line in results["crossings"]:
        found = "   ".join(f"{name} {line[name]:>12s}" for name in ("torch", "onnxruntime", "predicted") if name in line)
        lines.append(f"  {line['direction']:13s} {line['row']:17s} {found}")
    return "\n".join(lines) + "\n"


def _said(cell: Mapping[str, Any]) -> str:
    if "left_out" in cell:
        return f"left out: {cell['left_out']}"
    ratio = "" if "ratio" not in cell else f"   {cell['ratio']:6.3f} [{cell['ratio_low']:.3f}-{cell['ratio_high']:.3f}]"
    return f"{cell['median_ms']:10.3f} [{cell['low_ms']:.3f}-{cell['high_ms']:.3f}]{ratio}"


def _held(cell: Mapping[str, Any]) -> str:
    return f"{cell['bytes'] / 1e6:9.1f} MB" if "bytes" in cell else ""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Left: time in torch, a circle where a row crosses softmax. Right: memory, dotted in onnxruntime. Dashed: causal; grey: the other maps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "attention_length"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12.5, 5.2), layout="constrained")
    colors: dict[str, str] = dict(zip(BOTH, ("black", "C0", "C1", "C3", "C2")))
    for axes, table, key, unit in ((panels[0], "time", "median_ms", 1.0), (panels[1], "memory", "bytes", 1e6)):
        for direction, style in zip(DIRECTIONS, ("-", "--")):
            cells = results[table]["torch"][direction]
            for row in rows_of("torch", direction):
                points = [(int(n), c[row][key] / unit) for n, c in cells.items() if c[row].get(key)]
                label = f"{row}, {direction}" if row in BOTH else ("other maps" if row == "relu" else None)
                look = {"color": colors.get(row, "0.75"), "linewidth": 1.8 if row in BOTH else 0.9, "zorder": 3 if row in BOTH else 1}
                axes.plot(*zip(*points), style, label=label, **look)
                if row not in BOTH and row in ("taylor2", "performer"):
                    axes.annotate(row, points[-1], xytext=(3, -3), textcoords="offset points", fontsize=7, color="0.45")
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS["torch"], [str(n) for n in LENGTHS["torch"]], fontsize=7)
        axes.set_xlim(50, 75_000)
        axes.grid(alpha=0.3)
    for row in BOTH[:3]:
        points = [(int(n), c[row]["bytes"] / 1e6) for n, c in results["memory"]["onnxruntime"]["bidirectional"].items() if "bytes" in c[row]]
        panels[1].plot(*zip(*points), ":", color=colors[row], linewidth=1.8, label=f"{row}, onnxruntime")
    for line in results["crossings"]:
        if line["row"] in colors and line["torch"].isdigit():
            at = int(line["torch"])
            panels[0].plot([at], [_between(results["time"]["torch"][line["direction"]], "softmax", at)], "o", color=colors[line["row"]], markersize=6, zorder=4)
    panels[0].set(title="time, torch, one thread (circles: faster than softmax from here on)", ylabel="ms")
    panels[1].set(title="peak memory beyond the inputs, torch (dotted: onnxruntime)", ylabel="MB", ylim=(0.5, None))
    panels[0].legend(fontsize=7)
    panels[1].legend(handles=panels[1].lines[-3:], fontsize=7)
    figure.suptitle(f"one attention layer, {results['conditions']['layer']}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def _between(cells: Mapping[str, Any], row: str, tokens: int) -> float:
    """Milliseconds at a number of tokens between two measured ones."""
    points = [(math.log(int(n)), math.log(c[row]["median_ms"])) for n, c in cells.items() if "median_ms" in c[row]]
    for (x, y), (right, above) in itertools.pairwise(points):
        if x <= math.log(tokens) <= right:
            return math.exp(y + (above - y) * (math.log(tokens) - x) / (right - x))
    return math.exp(points[-1][1])


def written(results: Mapping[str, Any]) -> None:
    """The three files, each whole or not at all."""
    from rewright.ir.files import replacing

    here = Path(__file__)
    with replacing(here.with_suffix(".json")) as path:
        path.write_text(json.dumps(results, indent=1))
    with replacing(here.with_suffix(".txt")) as path:
        path.write_text(text(results))
    with replacing(here.with_suffix(".svg")) as path:
        draw(results, path)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="up to 1024 tokens; prints and writes nothing")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import rewright.ir.ops  # noqa: F401

    if args.memory_of:
        runtime, folder, lengths = args.memory_of
        print(json.dumps(peaks(runtime, Path(folder), [int(n) for n in lengths.split(",")])))
        return
    results = measured({r: [n for n in all_ if n <= SHORT] for r, all_ in LENGTHS.items()} if args.short else LENGTHS)
    if args.short:
        print(text(results))
    else:
        written(results)


if __name__ == "__main__":
    main()
