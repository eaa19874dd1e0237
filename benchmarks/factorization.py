"""Smaller feed-forward layers of real models: width, low rank and blocks at equal parameters; quality, latency, activation memory.

usage: python benchmarks/factorization.py [minilm] [digits-vit] [stdlib-lm] [--table quality|latency|compiled|memory] [--only METHOD] [--keep SHARE]
Writes benchmarks/factorization.json row by row (a row that is there is not made again), factorization.txt and factorization.svg.
One thread. `keep` is the share of the feed-forward parameters that stays. Quality is that of the models' own judges on held-out
data; latencies are ratios to the original, all rows of a shape in one process, alternating; memory is the peak of live activations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import Rows, judged, latencies, latency_lines, made

MODELS = ("minilm", "digits-vit", "stdlib-lm")
TABLES = ("quality", "latency", "compiled", "memory")
KEEPS = (0.9, 0.8, 0.7, 0.5)
SHAPES = {"minilm": ("1x32", "8x128", "32x64"), "digits-vit": ("1", "32"), "stdlib-lm": ("1x1", "1x128", "8x256")}
METRIC = {"minilm": "cosine", "digits-vit": "accuracy", "stdlib-lm": "perplexity ratio"}
FUSED: dict[str, list[Any]] = {
    "minilm": ["fuse-add-layer-norm", "pack-heads"],
    "digits-vit": ["fuse-add-layer-norm", "pack-heads"],
    "stdlib-lm": ["fuse-add-rms-norm"],
}


def methods(keep: float) -> dict[str, dict[str, Any]]:
    """Row name -> pass. What the cost model would refuse is built all the same: this table is about quality."""
    ratio = round(1 - keep, 6)
    width = {"name": "ffn-width", "ratio": ratio, "round_to": 16, "allocation": "uniform"}
    rank = {"name": "low-rank", "ratio": ratio, "round_to": 8, "require_faster": False}
    block = {"name": "block-structured", "ratio": ratio, "premerge": "never"}
    return {
        "width obs": width,
        "width obs, asymmetric": {**width, "calibration": "asymmetric"},
        "width obs, waterfill": {**width, "allocation": "waterfill"},
        "width energy": {**width, "selection": "energy"},
        "width leverage": {**width, "selection": "leverage"},
        "width random": {**width, "selection": "random"},
        "low-rank plain": {**rank, "score": "plain", "affine": False},
        "low-rank asvd": {**rank, "score": "asvd", "affine": False},
        "low-rank whitened": rank,
        "low-rank whitened, asymmetric": {**rank, "calibration": "asymmetric"},
        "low-rank whitened, waterfill": {**rank, "allocation": "waterfill"},
        "low-rank two-sided": {**rank, "score": "two-sided"},
        "block-dense": block,
        "block-shuffle": {**block, "kind": "block-shuffle"},
        "allocate": {"name": "allocate", "ratio": ratio, "choices": ["ffn-width:round_to=16", "low-rank:round_to=8,allocation=waterfill"]},
    }


TIMED = ("width obs", "low-rank whitened", "block-dense", "block-shuffle")
TIMED_AT = (0.5,)


def build(model: str, passes: Any) -> Any:
    from rewright.tools.models import load_model

    return made(load_model(f"zoo:{model}"), passes)


def quality(model: str, step: dict[str, Any]) -> dict[str, Any]:
    """A row: the judge's scores in torch, the parameters, how long the rewrite took."""
    from rewright.tools.models import runner_of

    result = build(model, [step])
    record = result.records[-1]
    assert record.applied, record.declined[:1]
    parameters = sum({id(t): t.numel() for t in result.graph.weights().values()}.values())
    return {
        "quality": judged(model, runner_of(result.module)),
        "parameters": parameters,
        "applied": record.applied,
        "declined": [d.why for d in record.declined],
        "seconds": round(record.seconds, 2),
        "note": result.graph.notes[-1] if result.graph.notes else "",
    }


def programs(model: str) -> dict[str, Any]:
    """What is timed: the original and the methods, fused for onnxruntime, in order."""
    rows = {"original": build(model, FUSED[model])}
    for keep in TIMED_AT:
        for name, step in methods(keep).items():
            if name in TIMED:
                rows[f"{name} {keep}"] = build(model, [step, *FUSED[model]])
    return rows


def latency(model: str) -> dict[str, Any]:
    """In onnxruntime, all rows alternating at each shape."""
    return latencies(model, programs(model), SHAPES[model], "original", 21, 12)


def compiled(model: str) -> dict[str, Any]:
    """torch.compile of the unfused programs at the largest shape, alternating."""
    import torch

    from rewright.tools.bench import alternate
    from rewright.tools.compare import sized_inputs

    shape = SHAPES[model][-1]
    rows = {"original": build(model, [])} | {f"{name} 0.5": build(model, [methods(0.5)[name]]) for name in TIMED}
    flat = sized_inputs(rows["original"].graph, model, shape)
    calls = {}
    for row, result in rows.items():
        module, kwargs = torch.compile(result.module, dynamic=False), dict(zip(result.graph.call.names, flat))
        calls[row] = lambda module=module, kwargs=kwargs: module(**kwargs)
        torch._dynamo.reset()
        with torch.no_grad():
            calls[row]()
    with torch.no_grad():
        return {shape: {row: t.as_dict() for row, t in alternate(calls, "original", 15, budget_s=12).items()}}


def memory(model: str) -> dict[str, Any]:
    """Peak bytes of live activations of one call, eager torch."""
    import torch

    from rewright.tools.bench import peak_activation_bytes
    from rewright.tools.compare import sized_inputs

    rows = programs(model)
    found: dict[str, Any] = {}
    for shape in SHAPES[model]:
        flat = sized_inputs(rows["original"].graph, model, shape)
        with torch.no_grad():
            found[shape] = {row: peak_activation_bytes(lambda r=r, flat=flat: r.graph.run(flat)) for row, r in rows.items()}
    return found


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = ["Smaller feed-forward layers of real models. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for model, tables in results["models"].items():
        for table, rows in tables.items():
            lines += [f"{model}, {table}" + (f" (keep: {', '.join(map(str, KEEPS))} of the feed-forward parameters)" if table == "quality" else "")]
            if table == "quality":
                lines += _quality_lines(model, rows)
            elif table == "memory":
                lines += [
                    f"  {shape:8s} {row:44s} {n / 2**20:9.2f} MiB   {n / found['original']:.3f}" for shape, found in rows.items() for row, n in found.items()
                ]
            else:
                lines += latency_lines(rows, "original")
            lines += [""]
    return "\n".join(lines)


def _quality_lines(model: str, rows: dict[str, Any]) -> list[str]:
    """One line a method, one column a keep ratio: every metric of the judge with its interval, parameters, seconds."""
    lines = []
    for method in dict.fromkeys(row.rpartition(" ")[0] for row in rows):
        at = {keep: rows[f"{method} {keep}"] for keep in KEEPS if f"{method} {keep}" in rows}
        for metric in next(iter(at.values()))["quality"]:
            cells = [f"{q['value']:.4f} ({q['low']:.4f} to {q['high']:.4f})" for q in (r["quality"][metric] for r in at.values())]
            lines.append(f"  {method:30s} {metric:36s} " + "   ".join(f"{c:28s}" for c in cells))
        sizes = [f"{r['parameters'] / 1e6:.3f} M, {r['seconds']:.0f} s" for r in at.values()]
        lines.append(f"  {'':30s} {'parameters, seconds to rewrite':36s} " + "   ".join(f"{s:28s}" for s in sizes))
    return lines


RESULTS = Rows("factorization", text)


def draw() -> None:
    """Quality against the share of feed-forward parameters kept: one panel a model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "factorization"  # the same numbers give the same file
    from matplotlib import pyplot

    results = RESULTS.load()["models"]
    models = [m for m in MODELS if "quality" in results.get(m, {})]
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4.2), layout="constrained", squeeze=False)
    for panel, model in zip(axes[0], models):
        rows = results[model]["quality"]
        for i, method in enumerate(methods(0.5)):
            points = [(keep, rows[f"{method} {keep}"]["quality"][METRIC[model]]["value"]) for keep in KEEPS if f"{method} {keep}" in rows]
            if points:
                style = {"w": "-o", "l": "--s", "b": ":^", "a": "-D"}[method[0]]
                panel.plot(*zip(*points), style, color="black" if method == "allocate" else f"C{i % 10}", label=method, markersize=4, linewidth=1.2)
        panel.set_title(f"{model}: {METRIC[model]}")
        panel.set_xlabel("feed-forward parameters kept")
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
        if model == "stdlib-lm":
            panel.set_yscale("log")
    axes[0][0].legend(fontsize=7)
    figure.savefig(Path(__file__).with_name("factorization.svg"), metadata={"Date": None})


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--table", choices=TABLES, action="append")
    parser.add_argument("--only", help="methods that start like this")
    parser.add_argument("--keep", type=float, help="this share alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"latency": latency, "compiled": compiled, "memory": memory}
    for model in args.models or MODELS:
        for table in args.table or TABLES:
            if table != "quality":
                RESULTS.store(model, table, None, tables[table](model))
                continue
            for method in methods(0.5):
                for keep in KEEPS if args.keep is None else (args.keep,):
                    row = f"{method} {keep}"
                    if not RESULTS.has(model, table, row) and method.startswith(args.only or ""):
                        print(model, row, flush=True)
                        RESULTS.store(model, table, row, quality(model, methods(keep)[method]))
    draw()


if __name__ == "__main__":
    main()
