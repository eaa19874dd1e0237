"""Merged tokens: quality of a real model and latency of real sizes, beside the FLOPs.

usage: python benchmarks/tokens.py [digits-vit] [vit-s-224] [vit-l-384] [--table quality|latency|torch]
Writes benchmarks/tokens.json row by row (a row that is there is not made again), tokens.txt and tokens.svg. One thread; all rows of a shape in
one process, alternating, as ratios to the original (onnxruntime fully optimised, torch's SDPA, torch.compile). digits-vit has its
trained weights, the other two random ones: they are for latency only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import Rows, judged, latencies, latency_lines, made

FUSED = ["fuse-add-layer-norm", "pack-heads"]
RATIOS = (1.25, 1.5, 2.0, 3.0, 4.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "merge": {},
    "merge, allocated": {"allocation": "sensitivity"},
    "merge, early": {"inflection": -0.5},
    "merge, late": {"inflection": 0.5},
    "merge tofu": {"variant": "tofu"},
    "merge pitome": {"variant": "pitome"},
    "merge kth": {"variant": "kth"},
    "merge random": {"variant": "random"},
    "merge hidden": {"metric": "hidden"},
    "not proportional": {"proportional": False},
    "drop alike": {"rule": "drop"},
    "drop random": {"rule": "drop", "variant": "random"},
}
SIZES = {"vit-s-224": ("vit_small_patch16_224", 224, (8, 13, 16), (1, 8)), "vit-l-384": ("vit_large_patch16_384", 384, (8, 23), (1,))}


def step(**options: Any) -> dict[str, Any]:
    """The pass as it is measured: nothing it would refuse is hidden."""
    return {"name": "token-merging", "min_agreement": 0.0, "require_faster": False, **options}


def quality(variant: str, ratio: float) -> dict[str, Any]:
    """The judge's scores of digits-vit in torch, KL divergence from the original on the same images (nats), FLOPs ratio."""
    import torch
    from torch.utils._pytree import tree_leaves

    from rewright.ir.cost import cost
    from rewright.tools.models import load_model, runner_of

    loaded = load_model("zoo:digits-vit")
    result = made(loaded, [step(ratio=ratio, **VARIANTS[variant])])
    record = result.records[-1]
    assert record.applied, record.declined[:1]
    run, original, divergences = runner_of(result.module), runner_of(made(loaded, []).module), []

    def compared(flat: Any) -> Any:
        found = run(flat)
        a, b = (tree_leaves(y)[0].double().log_softmax(-1) for y in (original(flat), found))
        divergences.append((a.exp() * (a - b)).sum(-1))
        return found

    scores = judged("digits-vit", compared)
    return {
        "quality": scores,
        "kl": float(torch.cat(divergences).mean()),
        "flops_ratio": cost(made(loaded, []).graph).flops / cost(result.graph).flops,
        "note": result.graph.notes[-1],
        "seconds": round(record.seconds, 2),
    }


def digits_programs(fused: bool) -> dict[str, Any]:
    """The original and merged ones."""
    from rewright.tools.models import load_model

    loaded, last = load_model("zoo:digits-vit"), FUSED if fused else []
    return {"original": made(loaded, last)} | {f"ratio {r:g}": made(loaded, [step(ratio=r), *last]) for r in RATIOS}


def sized_programs(model: str, fused: bool) -> dict[str, Any]:
    """timm's architecture with random weights."""
    import torch

    import rewright as rw
    from rewright.passes.recipe import make_pass
    from rewright.tools.torchvision_stand_in import torchvision_stand_in

    with torchvision_stand_in():
        import timm

    name, size, rs, _ = SIZES[model]
    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False).eval()
    graph = rw.capture(module, (torch.randn(2, 3, size, size),))
    last = [make_pass(p, {}) for p in FUSED] if fused else []

    def program(**options: Any) -> Any:
        merge = [make_pass("token-merging", {k: v for k, v in step(**options).items() if k != "name"})] if options else []
        return rw.optimize(graph, recipe=[*merge, *last], verify=False)

    return {"original": program()} | {f"r = {r}": program(r=r) for r in rs}


def notes(programs: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of the original over each one's, and its schedule."""
    from rewright.ir.cost import cost

    base = cost(programs["original"].graph).flops
    return {row: {"flops_ratio": base / cost(p.graph).flops, "note": (p.graph.notes or [""])[-1]} for row, p in programs.items()}


def in_onnxruntime(model: str) -> dict[str, Any]:
    """Latency of the exported files."""
    from tempfile import TemporaryDirectory

    import torch

    from rewright.backends.onnx.session import Session
    from rewright.tools.bench import alternate

    if model == "digits-vit":
        programs = digits_programs(True)
        return latencies(model, programs, ("1", "32"), "original", 31, 10) | {"programs": notes(programs)}
    programs, (_, size, _, batches) = sized_programs(model, True), SIZES[model]
    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        sessions = {}
        for i, (row, result) in enumerate(programs.items()):
            result.export(path := Path(folder) / f"{i}.onnx")
            sessions[row] = Session(path)
        for batch in batches:
            flat = (torch.randn(batch, 3, size, size),)
            calls = {row: (lambda s=s, flat=flat: s(flat)) for row, s in sessions.items()}
            found[str(batch)] = {row: t.as_dict() for row, t in alternate(calls, "original", 11, budget_s=60).items()}
    return found | {"programs": notes(programs)}


def in_torch(model: str) -> dict[str, Any]:
    """Latency in eager torch (SDPA), and for digits-vit compiled too."""
    import torch

    from rewright.tools.bench import alternate

    programs = digits_programs(False) if model == "digits-vit" else sized_programs(model, False)
    shape = programs["original"].graph.inputs[0].meta["val"].shape[1:]
    found: dict[str, Any] = {}
    with torch.no_grad():
        for batch in (1, 32) if model == "digits-vit" else SIZES[model][3]:
            x = torch.randn(batch, *shape)
            calls = {row: (lambda p=p, x=x: p.module(x)) for row, p in programs.items()}
            found[f"eager {batch}"] = {row: t.as_dict() for row, t in alternate(calls, "original", 11, budget_s=40).items()}
        if model == "digits-vit":
            calls = {}
            for row, p in programs.items():
                torch._dynamo.reset()
                module = torch.compile(p.module, dynamic=False)
                module(x)
                calls[row] = lambda module=module, x=x: module(x)
            found["compiled 32"] = {row: t.as_dict() for row, t in alternate(calls, "original", 11, budget_s=20).items()}
    return found | {"programs": notes(programs)}


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = ["Merged tokens. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for model, tables in results["models"].items():
        for table, rows in tables.items():
            lines.append(f"{model}, {table}")
            if table == "quality":
                for row, r in rows.items():
                    scores = "   ".join(f"{name} {q['value']:.4f} ({q['low']:.4f} to {q['high']:.4f})" for name, q in r["quality"].items())
                    lines.append(f"  {row:24s} FLOPs /{r['flops_ratio']:.2f}   KL {r['kl']:.1e}   {scores}")
            else:
                lines += latency_lines({k: v for k, v in rows.items() if k != "programs"}, "original")
                lines += [f"  {row:24s} FLOPs /{p['flops_ratio']:.2f}   {p['note']}" for row, p in rows["programs"].items()]
            lines.append("")
    return "\n".join(lines)


RESULTS = Rows("tokens", text)


def draw() -> None:
    """Left: KL divergence of digits-vit from the original against FLOPs, by method. Right: measured speed-up against the FLOPs ratio."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tokens"
    from matplotlib import pyplot

    results = RESULTS.load()["models"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, variant in enumerate(VARIANTS):
        rows = [r for row, r in results.get("digits-vit", {}).get("quality", {}).items() if row.rpartition(" ")[0] == variant]
        if rows:
            points = [(r["flops_ratio"], r["kl"]) for r in rows]
            left.plot(*zip(*points), "--s" if variant.startswith("drop") else "-o", color=f"C{i % 10}", label=variant, markersize=4, linewidth=1.2)
    left.set(title="digits-vit: KL divergence from the original, nats", xlabel="FLOPs of the original over its own", yscale="log")
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    for i, (model, tables) in enumerate(results.items()):
        for table, style in (("latency", "-o"), ("torch", ":^")):
            for shape, rows in tables.get(table, {}).items():
                if shape != "programs":
                    points = [(tables[table]["programs"][row]["flops_ratio"], 1 / t["ratio"]) for row, t in rows.items()]
                    where = "onnxruntime" if table == "latency" else "torch"
                    right.plot(*zip(*points), style, color=f"C{i}", label=f"{model} {where} {shape}", markersize=4, linewidth=1.2, alpha=0.8)
    right.plot([1, 4], [1, 4], color="black", linewidth=0.8)
    right.set(title="measured speed-up", xlabel="FLOPs of the original over its own", ylabel="times faster")
    right.legend(fontsize=7)
    right.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_name("tokens.svg"), metadata={"Date": None})


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--table", choices=("quality", "latency", "torch"), action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models or ("digits-vit", *SIZES):
        for table in args.table or ("quality", "latency", "torch"):
            if table == "quality":
                for variant in VARIANTS if model == "digits-vit" else ():
                    for ratio in RATIOS:
                        if not RESULTS.has(model, table, row := f"{variant} {ratio:g}"):
                            print(model, row, flush=True)
                            RESULTS.store(model, table, row, quality(variant, ratio))
            else:
                print(model, table, flush=True)
                RESULTS.store(model, table, None, in_onnxruntime(model) if table == "latency" else in_torch(model))
    draw()


if __name__ == "__main__":
    main()
