"""Statistics for the inputs of all linears: time against a plain forward pass of the same graph, peak memory against the limit.

usage: python benchmarks/calibration.py [minilm] [stdlib-lm]      writes benchmarks/calibration.json
One thread. Seconds are CPU seconds, ratios medians of alternating rounds; memory is measured in a process of its own a limit.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLAIN = ("min", "max", "absmax", "mean", "mean_abs", "mean_square", "token_absmax")
KINDS = {"channels and token quantiles": PLAIN, "... histogram and rows": (*PLAIN, "histogram", "rows"), "... and Gram": (*PLAIN, "histogram", "rows", "gram")}
ROUNDS = 5
LIMITS = {"minilm": (None, 96, 48), "stdlib-lm": (None, 32, 16)}  # MiB


def prepare(name: str):
    """The canonical graph of a zoo model and a third of its calibration batches."""
    import torch

    from rewright.ir.capture import capture
    from rewright.passes.pipeline import Pipeline
    from rewright.tools.zoo import load_zoo

    torch.set_num_threads(1)
    model = load_zoo(name)
    batches = model.calibration[:6]
    graph = Pipeline([], verify=False).run(capture(model.module, (), batches[0])).graph
    return graph, [graph.flat_inputs((), b) for b in batches]


def times(name: str) -> dict:
    """Seconds a round of the forward pass and of each set of statistics, and their ratios."""
    import torch

    from rewright.passes.statistics import Calibration, linear_inputs

    graph, batches = prepare(name)

    def forward() -> None:
        for flat in batches:
            graph.run(flat)

    def gather(kinds: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            Calibration(batches).gather(graph, linear_inputs(graph, kinds))

        return run

    tasks = {"forward": forward, **{what: gather(kinds) for what, kinds in KINDS.items()}}
    seconds: dict[str, list[float]] = {what: [] for what in tasks}
    for i in range(ROUNDS + 1):
        for what, task in tasks.items():
            begin = time.process_time()
            task()
            if i:  # the first round warms up
                seconds[what].append(time.process_time() - begin)
    ratios = {what: statistics.median(s / f for s, f in zip(seconds[what], seconds["forward"])) for what in KINDS}
    tokens = sum(int(flat[1].sum()) if len(flat) > 1 else flat[0].numel() for flat in batches)
    values = len(linear_inputs(graph, ["mean"]))
    return {
        "model": name,
        "batches": len(batches),
        "tokens": tokens,
        "values": values,
        "linears": len(graph.find(torch.ops.aten.linear.default)),
        "forward_s": round(statistics.median(seconds["forward"]), 3),
        "ratio_to_forward": {k: round(v, 2) for k, v in ratios.items()},
        "largest_relative_error_to_float64": errors(graph, batches[:2]),
    }


def errors(graph, batches) -> dict[str, float]:
    """Against sums of the same float32 values in float64, relative to the largest entry of each statistic; the worst value."""
    import torch

    from rewright.ir.verify import padding_mask
    from rewright.ir.walk import Visit, Walk
    from rewright.passes.statistics import Calibration, linear_inputs

    requests = linear_inputs(graph, ["mean", "mean_abs", "mean_square", "gram"])
    found = Calibration(batches).gather(graph, requests)
    nodes = {n.name: n for n in graph.fx.nodes}
    valid = padding_mask(graph)
    worst = dict.fromkeys(("mean", "mean_abs", "mean_square", "gram"), 0.0)
    for r in requests:
        rows: list[torch.Tensor] = []

        def keep(batch: int, values: tuple, rows: list = rows) -> None:
            mask, value = valid(batches[batch]), values[0]
            rows.append((value if mask is None or value.dim() < 3 else value[mask]).reshape(-1, value.shape[-1]).double())

        Walk(graph, batches, [Visit((nodes[r.value],), keep)]).run()
        x = torch.cat(rows)
        direct = {"mean": x.mean(0), "mean_abs": x.abs().mean(0), "mean_square": x.square().mean(0), "gram": x.T @ x / len(x)}
        for kind, wanted in direct.items():
            error = ((getattr(found[r.value], kind) - wanted).abs().max() / wanted.abs().max()).item()
            worst[kind] = max(worst[kind], float(f"{error:.1e}"))
    return worst


def memory(name: str, limit: int | None) -> dict:
    """Peak resident memory above that of the forward pass, in MiB, with Grams of everything."""
    from rewright.passes.statistics import Calibration, linear_inputs

    graph, batches = prepare(name)
    for flat in batches:
        graph.run(flat)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts = [0]
    calibration = Calibration(batches, memory_limit=None if limit is None else limit << 20, progress=lambda what, done, total: parts.__setitem__(0, total))
    begin = time.process_time()
    calibration.gather(graph, linear_inputs(graph, [*PLAIN, "gram"]))
    seconds = time.process_time() - begin
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"model": name, "limit_mib": limit, "peak_above_forward_mib": round(more), "parts": parts[0], "runs": calibration.runs, "seconds": round(seconds, 2)}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        what, name, limit = sys.argv[2:5]
        print(json.dumps(times(name) if what == "times" else memory(name, None if limit == "None" else int(limit))))
        return
    rows: dict[str, list] = {"times": [], "memory": []}
    for name in sys.argv[1:] or list(LIMITS):
        for what, limit in [("times", None), *(("memory", limit) for limit in LIMITS[name])]:
            done = subprocess.run([sys.executable, __file__, "--one", what, name, str(limit)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            rows[what].append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[what][-1])
    import torch

    conditions = {"machine": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__, "python": platform.python_version()}
    Path(__file__).with_suffix(".json").write_text(json.dumps({"conditions": conditions, **rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
