"""Power-of-two weights on real models, after training: quality, bytes and measured time beside int8 and fp32, and modelled energy apart.

usage: python benchmarks/shiftadd.py [minilm] [digits-vit] [stdlib-lm] [--table quality|latency|stages]
Writes benchmarks/shiftadd.json row by row (a row that is there is not made again), benchmarks/shiftadd.txt and benchmarks/shiftadd.svg.
One thread. Quality is that of the models' own judges in onnxruntime on held-out data; latency is the ratio to onnxruntime fp32 of
the same graph, all rows in one process, alternating. Energy is modelled by `rewright.energy` from a published table, not measured.
All linears are rewritten, the tied output layer of stdlib-lm too. "migrated": outlier-migration before; "mixed": each layer's choice
of 4-bit powers of two and int8, 30 % of the weights in int8 at most.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rows import Rows, judged, latencies, latency_lines, made

MODELS = ("minilm", "digits-vit", "stdlib-lm")
TABLES = ("quality", "latency", "stages")
SHAPES = {"minilm": ("1x32", "8x128"), "digits-vit": ("1", "32"), "stdlib-lm": ("1x1", "1x128")}
SIZES = {"minilm": {"batch": 8, "sequence": 128}, "digits-vit": {"batch": 32}, "stdlib-lm": {"batch": 1, "sequence": 128}}
FUSED: dict[str, list[Any]] = {
    "minilm": ["fuse-add-layer-norm", "pack-heads"],
    "digits-vit": ["fuse-add-layer-norm", "pack-heads"],
    "stdlib-lm": ["fuse-add-rms-norm"],
}
MIXED = {"choices": ["pot4-channel/int8-dynamic", "int8-channel/int8-dynamic"], "budget_bits": 5.2}


def rows_of(model: str) -> dict[str, Any]:
    """Row name -> passes, or the name of a recipe."""
    fused, tied = FUSED[model], {"tied": "copy"}
    rows: dict[str, Any] = {"fp32": fused}
    linears = {
        "int8": ("int8-channel", {"name": "quantize-linear", **tied}),
        "shift 4 bit, nearest": ("pot4-channel", {"name": "shift-linear", **tied}),
        "shift 4 bit": ("pot4-channel", {"name": "shift-linear", "algorithm": "gptq", **tied}),
        "shift two terms": ("pot8-channel", {"name": "shift-linear", "algorithm": "gptq", "terms": 2, **tied}),
        "mixed shift and int8": ("pot4-channel", {"name": "mixed-precision", "algorithm": "gptq", **MIXED, **tied}),
    }
    sites = ["norm-linear", "value-output", "up-down"]
    for row, (weights, step) in linears.items():
        rows[row] = [*fused, step]
        rows[f"{row}, migrated"] = [{"name": "outlier-migration", "explicit": "restore", "sites": sites, "weights": weights}, *fused, step]
    return rows | {"recipe shiftadd-mlp": "shiftadd-mlp"}


LATENCY = ("fp32", "int8", "shift 4 bit", "shift two terms", "mixed shift and int8", "recipe shiftadd-mlp")


def quality(model: str, passes: Any, path: Path) -> dict[str, Any]:
    """Judged in onnxruntime; the graph's modelled energy, and the sentences it says of itself."""
    from rewright.backends.onnx.session import Session
    from rewright.ir.energy import energy, total

    result = made_of(model, passes)
    exported = result.export(path)
    session = Session(path)
    found = judged(model, lambda batch: session([batch[i] for i in session.inputs])[0])
    modelled = total(energy(result.graph, SIZES[model]))
    parts = {"arithmetic_uj": (modelled.total - modelled.memory) / 1e6, "memory_uj": modelled.memory / 1e6}
    return {"quality": found, "bytes": exported.bytes, "modelled_energy": parts, "notes": result.graph.notes}


def made_of(model: str, passes: Any) -> Any:
    from rewright.tools.models import load_model

    return made(load_model(f"zoo:{model}"), passes)


PAPER = "ShiftAddViT's abstract claims up to 42.9 % less energy (modelled too) and 5.18 times less latency (tuned kernels against fp32 without tensor cores)"


def stages() -> dict[str, Any]:
    """digits-vit through the staged recipe: accuracy after every pass, the curves of the training, the end against the original."""
    import rewright as rw
    from rewright.ir.energy import energy, total
    from rewright.tools.models import load_model, runner_of

    def accuracy(module: Any) -> float:
        return judged("digits-vit", runner_of(module))["accuracy"]["value"]

    loaded = load_model("zoo:digits-vit")
    result = rw.optimize(loaded, recipe="shiftadd-vit", metric=accuracy)
    steps = [
        {"pass": r.name, "applied": r.applied, "undone": r.undone, "accuracy": r.measured.get("metric"), "cosine": r.measured.get("cosine"), **_curve(r)}
        for r in result.records
        if not r.canonical
    ]
    original = made(loaded, FUSED["digits-vit"])
    both = {"original": original.graph, "shift and add": result.graph}
    modelled = {name: total(energy(g, SIZES["digits-vit"])) for name, g in both.items()}
    with TemporaryDirectory() as folder:
        sizes = {name: r.export(Path(folder) / "model.onnx").bytes for name, r in (("original", original), ("shift and add", result))}
    return {
        "steps": steps,
        "accuracy": {"original": accuracy(original.module), "shift and add": accuracy(result.module)},
        "bytes": sizes,
        "modelled_energy": {n: {"arithmetic_uj": (e.total - e.memory) / 1e6, "memory_uj": e.memory / 1e6} for n, e in modelled.items()},
        "latency": latencies("digits-vit", {"original": original, "shift and add": result}, SHAPES["digits-vit"], "original", 41, 60),
        "notes": result.graph.notes,
    }


def _curve(record: Any) -> dict[str, Any]:
    return {"curve": record.details["curve"], "sentence": record.details["sentence"]} if "curve" in record.details else {}


def staged_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for step in found["steps"]:
        got = "" if step["accuracy"] is None else f"accuracy {step['accuracy']:.4f}   cosine {step['cosine']:.4f}"
        lines.append(f"  {step['pass']:24s} applied {step['applied']:3d}   {got}   {step.get('sentence', '')}{step['undone'] or ''}".rstrip())
    for name in found["bytes"]:
        e = found["modelled_energy"][name]
        energy = f"modelled energy {e['arithmetic_uj'] / 1e3:8.2f} mJ arithmetic {e['memory_uj'] / 1e3:8.2f} mJ memory"
        lines.append(f"  {name:24s} accuracy {found['accuracy'][name]:.4f}   {found['bytes'][name] / 1e6:5.2f} MB   {energy}")
    return [*lines, *latency_lines(found["latency"], "original"), *(f"  note: {n}" for n in found["notes"]), f"  {PAPER}"]


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    from rewright.ir.energy import CAPTION

    lines = ["Power-of-two weights. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), f"Energy is {CAPTION}.", ""]
    for model, tables in results["models"].items():
        for table, rows in tables.items():
            lines.append(f"{model}, {table}" + (f", energy at {SIZES[model]}" if table == "quality" else ""))
            if table == "quality":
                for row, r in rows.items():
                    scores = "   ".join(f"{name} {q['value']:.4f} ({q['low']:.4f} to {q['high']:.4f})" for name, q in r["quality"].items())
                    e = r["modelled_energy"]
                    energy = f"modelled energy {e['arithmetic_uj'] / 1e3:8.2f} mJ arithmetic {e['memory_uj'] / 1e3:8.2f} mJ memory"
                    lines.append(f"  {row:32s} {r['bytes'] / 1e6:7.2f} MB   {energy}   {scores}")
            else:
                lines += staged_lines(rows) if table == "stages" else latency_lines(rows, "fp32")
            lines.append("")
    return "\n".join(lines)


RESULTS = Rows("shiftadd", text)


QUALITY = {"minilm": "cosine", "digits-vit": "agreement", "stdlib-lm": "perplexity ratio"}


def draw() -> None:
    """Left: what is lost against modelled energy. Middle: what is lost against measured time. Right: the curves of the staged training."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shiftadd"
    from matplotlib import pyplot

    results = RESULTS.load()["models"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for i, (model, tables) in enumerate(results.items()):
        rows = tables.get("quality", {})
        if "fp32" not in rows:
            continue
        whole = sum(rows["fp32"]["modelled_energy"].values())
        loss = {row: abs(1 - r["quality"][QUALITY[model]]["value"]) for row, r in rows.items()}
        label = f"{model}: |1 - {QUALITY[model]}|"
        for row, r in rows.items():
            x = sum(r["modelled_energy"].values()) / whole
            left.scatter(x, loss[row], color=f"C{i}", marker="^" if "migrated" in row else "o", s=22, label=label if row == "fp32" else None)
            if model == "stdlib-lm" and "migrated" not in row:
                left.annotate(row, (x, loss[row]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        for shape, times in tables.get("latency", {}).items():
            points = sorted((t["ratio"], loss[row], row) for row, t in times.items())
            middle.scatter([p[0] for p in points], [p[1] for p in points], color=f"C{i}", marker="os"[shape != SHAPES[model][0]], label=f"{model} {shape}")
    left.set(title="after training (triangles: migrated)", xlabel="modelled energy, of fp32", ylabel="loss")
    middle.set(title="after training, onnxruntime", xlabel="measured time, of fp32")
    for axes in (left, middle):
        axes.set_yscale("symlog", linthresh=1e-3)
    done = 0.0
    for step in results.get("digits-vit", {}).get("stages", {}).get("steps", []):
        if "curve" in step:
            points = [(done + row["seconds"] / 60, row["drift"]) for row in step["curve"]]
            right.plot(*zip(*points), "-o", markersize=3, label=f"finetune behind {'attention' if not done else 'power-of-two weights'}")
            done = points[-1][0]
    right.set(title="digits-vit, the two stages", xlabel="minutes, one thread", ylabel="KL from the original on held-out images, nats", yscale="log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(Path(__file__).with_name("shiftadd.svg"), metadata={"Date": None})


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--table", choices=TABLES, action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models or MODELS:
        for table in args.table or TABLES:
            if table == "quality":
                for row, passes in rows_of(model).items():
                    if not RESULTS.has(model, table, row):
                        print(model, row, flush=True)
                        with TemporaryDirectory() as folder:
                            RESULTS.store(model, table, row, quality(model, passes, Path(folder) / "model.onnx"))
            elif table == "latency":
                print(model, table, flush=True)
                programs = {row: made_of(model, passes) for row, passes in rows_of(model).items() if row in LATENCY}
                RESULTS.store(model, table, None, latencies(model, programs, SHAPES[model], "fp32", 41, 120))
            elif model == "digits-vit":
                print(model, table, flush=True)
                RESULTS.store(model, table, None, stages())
    draw()


if __name__ == "__main__":
    main()
