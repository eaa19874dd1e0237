"""MiniLM as the files people have it in, beside the PyTorch model: the same structure, the same recipes, the same results?

usage: python benchmarks/onnx_roads.py [--files torch18,torch20,ort-basic,ort-extended,ort-bert,ort-quantized] [--recipes encoder-int8,...]
The files are exported by torch (opsets 18 and 20), optimized by onnxruntime (basic, extended, its transformer optimizer) and quantized by its
`quantize_dynamic`. Each is captured and compared with the capture of the module on calibration texts, bit by bit; then each recipe is applied to both
with the same calibration data: matches, bits of the outputs on 16 batches, and the judge's scores. A recipe's row needs the module's, which is
made first. The quantized file's weights are other ones: its recipes start with dequantize-linear, and its rows are scores alone.
What was done is in benchmarks/onnx_roads.json and not done again.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from rows import Rows, judged

FOLDER = Path(gettempdir()) / "rewright-onnx-roads"
MODULE = "the module"
RECIPES: dict[str, dict[str, int]] = {"encoder-int8": {}, "ffn-30": {}, "encoder-half-tokens": {"sequence": 128}}
OPTIMIZED = {"ort-basic": "ORT_ENABLE_BASIC", "ort-extended": "ORT_ENABLE_EXTENDED"}
FILES = ("torch18", "torch20", *OPTIMIZED, "ort-bert", "ort-quantized")


def file(name: str) -> Path:
    """One of the files, made if it is not there."""
    path = FOLDER / f"{name}.onnx"
    if path.exists():
        return path
    FOLDER.mkdir(exist_ok=True)
    if name.startswith("torch"):
        _export(path, int(name.removeprefix("torch")))
        return path
    source = file("torch18")
    if name in OPTIMIZED:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMIZED[name])
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    elif name == "ort-bert":
        from onnxruntime.transformers import optimizer

        optimizer.optimize_model(str(source), "bert", num_heads=12, hidden_size=384).save_model_to_file(str(path))
    else:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, path, per_channel=True)
    return path


def _export(path: Path, opset: int) -> None:
    from rewright.tools.zoo import load_zoo

    zoo = load_zoo("minilm")
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(zoo.example, dims)
    torch.onnx.export(zoo.module, (), path, kwargs=dict(zoo.example), dynamo=True, opset_version=opset, dynamic_shapes=shapes, external_data=opset == 20)


def structure(results: Rows, name: str) -> None:
    """What is recognised in a file, and whether the program gives the bits of the module's."""
    import rewright as rw
    from rewright.ir.blocks.attention import attention_blocks
    from rewright.ir.blocks.feed_forward import ffn_blocks
    from rewright.passes.pipeline import Pipeline
    from rewright.tools.models import load_model

    loaded = load_model("zoo:minilm")
    module, graph = Pipeline([], verify=False).run(loaded.graph).graph, rw.capture(file(name))
    differences = [float((a - b).abs().max()) for flat in loaded.inputs[:17] for a, b in zip(module.run(flat), graph.run(flat), strict=True)]
    found = {"attention blocks": len(attention_blocks(graph)), "feed-forward blocks": len(ffn_blocks(graph)), "calls": len(graph.nodes)}
    found |= {"calls of the module": len(module.nodes), "bit-equal": not any(differences), "largest difference": max(differences)}
    results.store(name, "structure", None, found)


def recipe_row(results: Rows, name: str, recipe: str) -> None:
    """One recipe on the module or on a file."""
    import rewright as rw
    from rewright.passes.recipe import from_command_line
    from rewright.tools.models import at_length, runner_of
    from rewright.tools.zoo import load_zoo

    sizes = [f"{dim}={size}" for dim, size in RECIPES[recipe].items()]
    plan = from_command_line(recipe, ["dequantize-linear"] if name == "ort-quantized" else [], [], sizes)
    subject = "zoo:minilm" if name == MODULE else str(file(name))
    zoo = load_zoo("minilm")
    result = rw.optimize(subject, recipe=plan, calibration=zoo.calibration)
    run = at_length(runner_of(result.module), RECIPES[recipe].get("sequence"))
    outputs = FOLDER / f"{recipe}.pt"
    here = [run(batch) for batch in zoo.calibration[:16]]
    row: dict[str, Any] = {
        "passes": {r.name: [r.matched, r.applied, len(r.declined)] for r in result.records if not r.canonical},
        "undone": [f"{r.name}: {r.undone}" for r in result.records if r.undone],
        "scores": judged("minilm", run),
    }
    if name == MODULE:
        FOLDER.mkdir(exist_ok=True)
        torch.save(here, outputs)
    elif name != "ort-quantized":
        there = torch.load(outputs, weights_only=True)
        row["same passes"] = row["passes"] == results.load()["models"][MODULE]["recipes"][recipe]["passes"]
        row["bit-equal"] = all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    results.store(name, "recipes", recipe, row)


def text(results: dict[str, Any]) -> str:
    """Two tables."""
    models = results["models"]
    lines = [f"{k}: {v}" for k, v in results["conditions"].items()]
    lines += ["", f"{'file':<16}{'attention':>10}{'FFN':>5}{'calls':>7}   outputs against the module's, 17 batches"]
    for name, tables in models.items():
        if (s := tables.get("structure")) is not None:
            said = "bit-equal" if s["bit-equal"] else "of other weights" if name == "ort-quantized" else f"differ by {s['largest difference']:.1e}"
            lines.append(f"{name:<16}{s['attention blocks']:>10}{s['feed-forward blocks']:>5}{s['calls']:>7}   {said}")
    lines += ["", f"{'recipe':<22}{'on':<16}{'passes':<12}{'outputs':<12}scores on 256 held-out texts"]
    for recipe in RECIPES:
        for name, tables in models.items():
            if (row := tables.get("recipes", {}).get(recipe)) is not None:
                same = "the same" if row.get("same passes") else "other" if "same passes" in row else ""
                equal = "bit-equal" if row.get("bit-equal") else "differ" if "bit-equal" in row else ""
                scores = ", ".join(f"{k} {v['value']:.4f}" for k, v in row["scores"].items())
                lines.append(f"{recipe:<22}{name:<16}{same:<12}{equal:<12}{scores}" + (f"; undone: {'; '.join(row['undone'])}" if row["undone"] else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Everything that was not done before."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results = Rows("onnx_roads", text)
    for name in asked.files.split(","):
        if "structure" not in results.load()["models"].get(name, {}):
            structure(results, name)
    for recipe in asked.recipes.split(","):
        for name in (MODULE, *asked.files.split(",")):
            if not results.has(name, "recipes", recipe):
                recipe_row(results, name, recipe)


if __name__ == "__main__":
    main()
