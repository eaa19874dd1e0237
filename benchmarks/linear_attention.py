"""Softmax attention of real models made linear: untrained maps, attention transfer, low-rank updates; all layers and half of them.

usage: python benchmarks/linear_attention.py [digits-vit] [stdlib-lm] [--table conversion|length|latency]
Writes benchmarks/linear_attention.json row by row (a row that is there is not made again) and benchmarks/linear_attention.txt.
One thread, seed 0. Quality is that of the models' own judges on held-out data, in torch; latency is the ratio to onnxruntime's fused softmax
attention of the same graph, all rows in one process, alternating. The models are short (65 and 256 tokens): where the pass would decline for lack
of tokens it is forced, for these tables say what conversion loses. digits-vit has no window, stdlib-lm one of 32 tokens (33 to 64 near ones).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rows import Rows, judged, latencies, latency_lines

MODELS = ("digits-vit", "stdlib-lm")
TABLES = ("conversion", "length", "latency")
SHAPES = {"digits-vit": ("1", "32"), "stdlib-lm": ("1x256", "1x1024")}
KEPT = {"all layers": 0.0, "half of the layers": 0.5}
WINDOW = {"digits-vit": 0, "stdlib-lm": 32}
TRANSFER = {"loss": "attention", "trainable": "rewritten", "rate": 1e-2, "judgings": 5}
TOGETHER = {"lora": 8, "trainable": ("attention", "rewritten"), "rate": 1e-3, "judgings": 6}
STEPS = {"digits-vit": (150, 200), "stdlib-lm": (120, 160)}
LONG, LONG_WINDOWS = 1024, 24  # tokens of a window, four times the training length, and how many


def conversion(model: str, kept: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Row name -> quality and what was said, of the three states of one conversion; its last state is saved in `folder`."""
    import rewright as rw
    from rewright.passes.linear_attention.linear_attention import LinearAttention
    from rewright.tools.finetune import finetune
    from rewright.tools.models import load_model, runner_of

    original = load_model(f"zoo:{model}")
    step = LinearAttention(window=WINDOW[model], keep=KEPT[kept], force=True, untrained="allow", tokens=256)
    result = rw.optimize(original, recipe=[step], verify=False)
    rows = {"untrained": {"quality": judged(model, runner_of(result.module)), "notes": result.graph.notes}}
    first, second = STEPS[model]
    for row, steps, options in (("transfer", first, TRANSFER), ("transfer + LoRA", second, TOGETHER)):
        found = finetune(result, original, steps=steps, **options)
        result = found.result
        facts = {k: v for k, v in found.as_dict().items() if k in ("sentence", "curve", "layers", "parts", "seconds", "conditions", "weights")}
        rows[row] = {"quality": judged(model, runner_of(result.module)), **facts}
        print(model, kept, row, rows[row]["sentence"], flush=True)
        result.save(folder / f"{model} {kept} {row}".replace(" ", "-"))
    return rows


def length(results: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of stdlib-lm and its conversions on windows of 4 x the training length: over all, and over the last quarter of each window."""
    import torch

    from rewright.tools.zoo import stdlib_lm

    ids, _ = stdlib_lm.windows(stdlib_lm.encoded(stdlib_lm.corpus()[1]), LONG_WINDOWS, LONG)
    found = {}
    for row, graph in results.items():
        losses = []
        for part in ids.long().split(2):
            with torch.no_grad():
                logits = graph(input_ids=part[:, :-1])
            logits = logits.logits if hasattr(logits, "logits") else logits
            losses.append(torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none").double())
        loss = torch.cat(losses)
        quarters = loss.unflatten(1, (4, -1)).mean((0, 2)).exp().tolist()
        found[row] = {"perplexity": math.exp(loss.mean().item()), "quarters": quarters, "windows": len(ids), "tokens": LONG}
        print(row, found[row], flush=True)
    return found


def programs(model: str, folder: Path) -> dict[str, Any]:
    """The original and the conversions that were trained, as results, fused as recipes fuse them."""
    import rewright as rw
    from rewright.passes.recipe import make_pass

    names = ("fuse-add-layer-norm", "pack-heads") if model == "digits-vit" else ("fuse-add-rms-norm",)
    fused = [make_pass(name, {}) for name in names]
    found = {"softmax": rw.optimize(f"zoo:{model}", recipe=fused, verify=False)}
    for kept in KEPT:
        saved = folder / f"{model} {kept} transfer + LoRA".replace(" ", "-")
        if saved.exists():
            found[kept] = rw.optimize(rw.load(saved).graph, recipe=fused, verify=False)
    return found


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = ["Linear attention on real models. " + ", ".join(f"{k} {v}" for k, v in results["conditions"].items()), ""]
    for model, tables in results["models"].items():
        for table, rows in tables.items():
            lines.append(f"{model}, {table}" + (f" (window {WINDOW[model]}, hedgehog_softmax, {STEPS[model]} steps)" if table == "conversion" else ""))
            if table == "latency":
                lines += latency_lines(rows, "softmax")
            elif table == "length":
                for row, r in rows.items():
                    quarters = " ".join(f"{q:9.2f}" for q in r["quarters"])
                    lines.append(f"  {row:28s} perplexity {r['perplexity']:9.2f}   by quarters of {r['tokens']} tokens {quarters}   ({r['windows']} windows)")
            else:
                for row, r in rows.items():
                    scores = "   ".join(f"{name} {q['value']:.4f} ({q['low']:.4f} to {q['high']:.4f})" for name, q in r["quality"].items())
                    lines.append(f"  {row:38s} {scores}")
                    lines += [f"      {x}" for x in [r["sentence"]] if x] if "sentence" in r else [f"      {n}" for n in r["notes"] if "linear-attention" in n]
                    lines += [f"      {layer}: relative squared error {a:.3f} -> {b:.3f}" for layer, (a, b) in r.get("layers", {}).items()]
            lines.append("")
    return "\n".join(lines)


RESULTS = Rows("linear_attention", text)


def main() -> None:
    import torch

    from rewright.tools.models import load_model

    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--table", choices=TABLES, action="append")
    parser.add_argument("--kept", type=Path, default=Path("converted"), help="Folder for the converted models.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for model in args.models or MODELS:
        for table in args.table or TABLES:
            if table == "conversion":
                for kept in KEPT:
                    if not RESULTS.has(model, table, f"{kept}, transfer + LoRA"):
                        for row, found in conversion(model, kept, args.kept).items():
                            RESULTS.store(model, table, f"{kept}, {row}", found)
            elif table == "length" and model == "stdlib-lm":
                import rewright as rw

                graphs = {"original": load_model(f"zoo:{model}").graph}
                names = {f"{kept}, {row}": args.kept / f"{model} {kept} {row}".replace(" ", "-") for kept in KEPT for row in ("transfer", "transfer + LoRA")}
                graphs |= {row: rw.load(saved).graph for row, saved in names.items() if saved.exists()}
                RESULTS.store(model, table, None, length(graphs))
            elif table == "latency":
                RESULTS.store(model, table, None, latencies(model, programs(model, args.kept), SHAPES[model], "softmax", 31, 60))


if __name__ == "__main__":
    main()
