"""Structure passes on Llama-70B-shaped graphs without weights: seconds and peak memory by number of layers.

usage: python benchmarks/scale.py [LAYERS ...]      writes benchmarks/scale.json, one process a size
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

FUSIONS = ("merge-linears", "fuse-add-rms-norm", "fuse-add-layer-norm")


def measure(layers: int) -> dict:
    """Capture a meta Llama of Llama-70B's widths, run the canonical form and the fusions, each verified structurally."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rewright.ir.capture import capture
    from rewright.passes.pipeline import Pipeline
    from rewright.passes.recipe import make_pass

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=32000,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    ids = torch.ones(2, 16, dtype=torch.long, device="meta")
    begin = time.perf_counter()
    graph = capture(model, (), {"input_ids": ids, "attention_mask": ids})
    captured = time.perf_counter() - begin
    begin = time.perf_counter()
    outcome = Pipeline([make_pass(n, {}) for n in FUSIONS]).run(graph)
    passes = time.perf_counter() - begin
    slowest = sorted(((r.name, round(r.seconds, 2), r.applied) for r in outcome.records), key=lambda r: -r[1])[:4]
    if undone := [f"{r.name}: {r.undone}" for r in outcome.undone]:
        raise SystemExit(f"undone: {undone}")
    return {
        "layers": layers,
        "nodes_captured": len(graph.fx.nodes),
        "nodes_after": len(outcome.graph.fx.nodes),
        "capture_s": round(captured, 1),
        "passes_s": round(passes, 2),
        "passes_ms_per_layer": round(passes / layers * 1e3, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "slowest": slowest,
    }


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(int(sys.argv[2]))))
        return
    rows = []
    for layers in [int(a) for a in sys.argv[1:]] or [40, 80, 128]:
        done = subprocess.run([sys.executable, __file__, "--one", str(layers)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    conditions = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    Path(__file__).with_suffix(".json").write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
