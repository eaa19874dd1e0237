"""Quantized real models, method by method: quality, bytes and latency in onnxruntime; 6 and 4 bits in torch; planted outliers.

usage: python benchmarks/quantization.py [minilm] [digits-vit] [stdlib-lm] [--table w8a8|w4a16|low-bit|planted|latency]
Writes benchmarks/quantization.json row by row (a row that is there is not made again) and benchmarks/quantization.txt.
One thread. Quality is that of the models' own judges on held-out data, against the original; latency is the ratio to
onnxruntime fp32 of the same graph, all rows of a table in one process, alternating.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rows import Rows, judged, latencies, latency_lines, made

MODELS = ("minilm", "digits-vit", "stdlib-lm")
TABLES = ("w8a8", "w4a16", "low-bit", "planted", "latency")
SHAPES = {"minilm": ("1x32", "8x128"), "digits-vit": ("1", "32"), "stdlib-lm": ("1x1", "1x128")}

# what every row of a model starts with: exact, for onnxruntime
FUSED: dict[str, list[Any]] = {
    "minilm": ["fuse-add-layer-norm", "pack-heads"],
    "digits-vit": ["fuse-add-layer-norm", "pack-heads"],
    "stdlib-lm": ["fuse-add-rms-norm"],
}
MIGRATE = {"name": "outlier-migration", "explicit": "restore", "sites": ["norm-linear", "value-output", "up-down"]}
# post-norm models can't rotate their residual stream
ROTATE = {"minilm": [{"name": "rotate-values"}]}
ROTATE["digits-vit"] = [{"name": "rotate-residual", "untie": True}, *ROTATE["minilm"]]
ROTATE["stdlib-lm"] = ROTATE["digits-vit"]


def linear(weights: str = "int8-channel", activations: str = "int8-dynamic", **options: Any) -> dict[str, Any]:
    return {"name": "quantize-linear", "weights": weights, "activations": activations, **options}


def migrated(activations: str, **options: Any) -> dict[str, Any]:
    return {**MIGRATE, "activations": activations, **options}


def w8a8(model: str) -> dict[str, Any]:
    """Row name -> passes, or the name of a recipe."""
    fused, tied = FUSED[model], {"tied": "copy"}
    rows: dict[str, Any] = {"fp32": fused}
    for kind in ("int8-dynamic", "int8-static"):
        q = linear(activations=kind, **tied)
        rows[kind] = [*fused, q]
        rows[f"{kind}, osplus"] = [migrated(kind), *fused, q]
        rows[f"{kind}, smoothquant-bias 0.7"] = [migrated(kind, method="smoothquant-bias", alpha=0.7), *fused, q]
        rows[f"{kind}, smoothquant-bias 0.7, gptq"] = [migrated(kind, method="smoothquant-bias", alpha=0.7), *fused, {**q, "algorithm": "gptq"}]
        if model != "minilm":
            rows[f"{kind}, rotated"] = [*ROTATE[model], *fused, q]
    rows["int8-static, percentile 99.99"] = [*fused, linear(activations="int8-static", range="percentile:99.99", **tied)]
    rows["int8-static, affine correction"] = [*fused, linear(activations="int8-static", affine_correction=True, **tied)]
    rows["int8-token"] = [*fused, linear(activations="int8-token", **tied)]
    recipes = {"minilm": ("encoder-int8", "encoder-int8-static"), "digits-vit": ("vit-int8",), "stdlib-lm": ("decoder-w8a8",)}
    return rows | {f"recipe {name}": name for name in recipes[model]}


def w4a16(model: str) -> dict[str, Any]:
    if model != "stdlib-lm":
        return {}
    rows: dict[str, Any] = {"fp32": FUSED[model], "int8-group 32": [*FUSED[model], linear("int8-group", "none", group_size=32, tied="copy")]}
    for group in (128, 32):
        q = linear("int4-group", "none", group_size=group, tied="copy")
        awq = migrated("none", method="awq", weights="int4-group", group_size=group)
        gptq = {**q, "algorithm": "gptq"}
        rows |= {
            f"g{group} rtn": [*FUSED[model], q],
            f"g{group} hqq": [*FUSED[model], {**q, "algorithm": "hqq"}],
            f"g{group} clip": [*FUSED[model], {**q, "clip": True}],
            f"g{group} awq": [awq, *FUSED[model], q],
            f"g{group} awq + clip": [awq, *FUSED[model], {**q, "clip": True}],
            f"g{group} gptq": [*FUSED[model], {**gptq, "act_order": False}],
            f"g{group} gptq act-order": [*FUSED[model], gptq],
            f"g{group} awq + gptq act-order": [awq, *FUSED[model], gptq],
        }
    return rows | {f"recipe {name}": name for name in ("decoder-w4a16", "data-free-int4")}


def low_bit(model: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for bits in (6, 4):
        q = linear(f"int{bits}-channel", f"int{bits}-token", tied="copy")
        migrate = migrated(f"int{bits}-token", weights=f"int{bits}-channel")
        rows |= {
            f"W{bits}A{bits}": [q],
            f"W{bits}A{bits}, migration": [migrate, q],
            f"W{bits}A{bits}, rotation": [*ROTATE[model], q],
            f"W{bits}A{bits}, rotation and migration": [*ROTATE[model], migrate, q],
        }
    return rows


def planted(model: str) -> dict[str, Any]:
    rows: dict[str, Any] = {"as trained, W8A8": [linear(tied="copy")]}
    rows["planted, fp32"] = []
    rows["planted, W8A8"] = [linear(tied="copy")]
    rows["planted, W8A8, osplus"] = [migrated("int8-dynamic"), linear(tied="copy")]
    rows["planted, W8A8, smoothquant-bias 0.7"] = [migrated("int8-dynamic", method="smoothquant-bias", alpha=0.7), linear(tied="copy")]
    if model != "minilm":
        rows["planted, W8A8, rotation"] = [*ROTATE[model], linear(tied="copy")]
    return rows


ROWS: dict[str, Callable[[str], dict[str, Any]]] = {"w8a8": w8a8, "w4a16": w4a16, "low-bit": low_bit, "planted": planted}


def plant(graph: Any, batches: list[Any], channels: int = 4, scale: float = 30.0, shift: float = 20.0) -> int:
    """Outliers by an exact inverse migration: the widest channels behind every norm, `scale` times as wide and, where the norm has a bias, `shift` off."""
    import torch

    from rewright.ir.blocks.edges import edges
    from rewright.passes.outliers.migrate import migrate, road
    from rewright.passes.statistics import Calibration, Request

    places = [e for e in edges(graph) if e.site == "norm-linear" and not isinstance(road(e, "restore").scale, str)]
    seen = Calibration(batches).gather(graph, [Request(e.value.name, frozenset({"absmax"})) for e in places])
    for edge in places:
        chosen = seen[edge.value].absmax.topk(channels).indices
        s, z = torch.ones(edge.width, dtype=torch.float64), torch.zeros(edge.width, dtype=torch.float64)
        s[chosen], z[chosen] = 1 / scale, -shift / scale
        migrate(graph, edge, s, None if isinstance(road(edge, "restore").shift, str) else z, "restore")
    graph.clean()
    return len(places)


def build(model: str, passes: Any, outliers: bool = False) -> Any:
    """The optimized model."""
    import rewright as rw
    from rewright.tools.models import Loaded, load_model

    loaded = load_model(f"zoo:{model}")
    if outliers:
        graph = rw.optimize(loaded, recipe=[], verify=False).graph
        plant(graph, loaded.inputs[1:5])
        loaded = Loaded(loaded.name, graph, loaded.inputs, loaded.module, loaded.zoo)
    return made(loaded, passes)


def in_torch(model: str, passes: Any, outliers: bool) -> dict[str, Any]:
    from rewright.tools.models import runner_of

    result = build(model, passes, outliers)
    return {"quality": judged(model, runner_of(result.module)), "bytes": result.graph.weight_bytes()}


def in_onnxruntime(model: str, passes: Any, path: Path) -> dict[str, Any]:
    from rewright.backends.onnx.session import Session

    exported = build(model, passes).export(path)
    session = Session(path)
    quality = judged(model, lambda batch: session([batch[i] for i in session.inputs])[0])
    return {"quality": quality, "bytes": exported.bytes, "nodes": exported.nodes}


def latency(model: str, rows: list[str], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Alternating runs of all rows' files at each shape; ratios to fp32."""
    programs = {row: build(model, passes) for table in tables.values() for row, passes in table.items() if row in rows}
    return latencies(model, programs, SHAPES[model], "fp32", 41, 120)


LATENCY = {
    "minilm": ["fp32", "int8-dynamic", "int8-static", "int8-token", "recipe encoder-int8", "recipe encoder-int8-static"],
    "digits-vit": ["fp32", "int8-dynamic", "int8-static", "recipe vit-int8"],
    "stdlib-lm": ["fp32", "int8-dynamic", "int8-static", "int8-token", "int8-group 32", "g128 rtn", "g32 rtn", "recipe decoder-w8a8", "recipe decoder-w4a16"],
}


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = ["Quality of quantized real models. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for model, tables in results["models"].items():
        for table, rows in tables.items():
            lines += [f"{model}, {table}"]
            if table == "latency":
                lines += [*latency_lines(rows, "fp32"), ""]
                continue
            for row, found in rows.items():
                quality = "   ".join(f"{q['name']} {q['value']:.4f} ({q['low']:.4f} to {q['high']:.4f})" for q in found["quality"].values())
                lines += [f"  {row:44s} {found['bytes'] / 1e6:7.2f} MB   {quality}"]
            lines += [""]
    return "\n".join(lines)


RESULTS = Rows("quantization", text)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--table", choices=TABLES, action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models or MODELS:
        for table in args.table or TABLES:
            if table == "latency":
                RESULTS.store(model, table, None, latency(model, LATENCY[model], {"w8a8": w8a8(model), "w4a16": w4a16(model)}))
                continue
            for row, passes in ROWS[table](model).items():
                if RESULTS.has(model, table, row):
                    continue
                print(model, table, row, flush=True)
                if table in ("low-bit", "planted"):
                    RESULTS.store(model, table, row, in_torch(model, passes, row.startswith("planted")))
                else:
                    with TemporaryDirectory() as folder:
                        RESULTS.store(model, table, row, in_onnxruntime(model, passes, Path(folder) / "model.onnx"))


if __name__ == "__main__":
    main()
