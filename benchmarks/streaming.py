"""A 1.1 B-parameter decoder that stays on disk: captured on meta, run, calibrated and rewritten, each weight read as it is needed.

usage: python benchmarks/streaming.py [LAYERS]      writes benchmarks/streaming.json
Random float32 weights (TinyLlama's sizes) in a temporary folder, 4.4 GB at 22 layers, written by streaming. Three processes: one
writes the weights, one does all the work with them on disk, one holds them all in memory to compare the logits. Peaks are ru_maxrss,
torch and transformers included.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

STEPS = ("generate", "streamed", "in_memory")
SHARD = 512 << 20  # bytes
LIMIT = 512 << 20  # bytes for weights at hand, accumulators and values between parts
TOKENS = ((2, 32), (1, 48))  # texts and their length, a batch


def configuration(layers: int):
    """TinyLlama 1.1 B: width 2048, 32 heads over 4 key-value heads, SwiGLU of 5632, vocabulary 32000, untied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        use_cache=False,
    )


def on_meta(layers: int):
    """The model without weights, and the buffer it computes when it is built, which no checkpoint holds."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    with torch.device("meta"):
        model = LlamaForCausalLM(configuration(layers)).eval()
    return model, {"model.rotary_emb.inv_freq": LlamaRotaryEmbedding(configuration(layers)).inv_freq}


def captured(layers: int):
    """The canonical graph, on meta, and the buffer."""
    import torch

    from rewright.ir.capture import capture
    from rewright.passes.pipeline import Pipeline

    model, buffers = on_meta(layers)
    graph = capture(model, (), {"input_ids": torch.ones(2, 16, dtype=torch.long, device="meta")})
    return Pipeline([]).run(graph).graph, buffers


def batches() -> list:
    import torch

    return [(torch.randint(0, 32000, size, generator=torch.Generator().manual_seed(i)),) for i, size in enumerate(TOKENS)]


def generate(folder: Path, layers: int) -> dict:
    import torch

    from rewright.ir.weights import write_sharded

    model, _ = on_meta(layers)
    layout = {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}

    def tensors() -> Iterator[tuple]:
        generator = torch.Generator().manual_seed(0)
        for name, (_, shape) in layout.items():
            yield name, torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5)

    files = write_sharded(folder / "model", layout, tensors(), SHARD)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "gigabytes": round(sum(f.stat().st_size for f in files) / 1e9, 2), "shards": len(files)}


def streamed(folder: Path, layers: int) -> dict:
    """One process: capture, run, calibrate, rewrite, run the result. Peaks are those of the process so far."""
    from rewright.ir.stream import stream_run
    from rewright.ir.weights import WeightStore

    begin = time.perf_counter()
    graph, buffers = captured(layers)
    result: dict = {"capture": {"seconds": _since(begin), "peak_rss_gib": _peak()}}
    store = WeightStore.open(folder / "model", held=buffers)
    begin = time.perf_counter()
    _save(folder / "original.safetensors", stream_run(graph, store, batches(), memory_limit=LIMIT))
    result["run"] = {"seconds": _since(begin), "peak_rss_gib": _peak()}
    begin = time.perf_counter()
    result["calibrate"] = {**calibrate(graph, store, layers), "seconds": _since(begin), "peak_rss_gib": _peak()}
    begin = time.perf_counter()
    graph = quantized(graph)
    result["rewrite"] = {**rewrite(graph, store, folder), "seconds": _since(begin), "peak_rss_gib": _peak()}
    graph.recipes.clear()  # the weights have been made
    begin = time.perf_counter()
    _save(folder / "rewritten.safetensors", stream_run(graph, WeightStore.open(folder / "int8"), batches(), memory_limit=LIMIT))
    result["run_rewritten"] = {"seconds": _since(begin), "peak_rss_gib": _peak()}
    return result


def calibrate(graph, store, layers: int) -> dict:
    """Channels, token quantiles, histogram and rows of all linears' inputs, Grams of those of three layers."""
    from rewright.passes.statistics import Calibration, linear_inputs

    nodes = {n.name: n for n in graph.fx.nodes}
    chosen = tuple(f"model.layers.{i}." for i in (0, layers // 2, layers - 1))
    with_gram = [r for r in linear_inputs(graph, ["gram"]) if any(u.meta["path"].startswith(chosen) for u in nodes[r.value].users)]
    parts = [0]
    calibration = Calibration(batches(), store, memory_limit=LIMIT, progress=lambda what, done, total: parts.__setitem__(0, total))
    found = calibration.gather(graph, [*linear_inputs(graph, ["absmax", "token_absmax", "histogram", "rows"]), *with_gram])
    widest = max(len(found[r.value].absmax) for r in with_gram)
    return {"values": len(found), "grams": len(with_gram), "widest_gram": widest, "runs": calibration.runs, "parts": parts[0]}


def quantized(graph):
    """8-bit weights in every linear, by quantize-linear's recipes."""
    from rewright.passes.pipeline import Pipeline
    from rewright.passes.quantization.quantize_linear import QuantizeLinear

    return Pipeline([QuantizeLinear()], verify=False).run(graph).graph


def rewrite(graph, store, folder: Path) -> dict:
    from rewright.ir.stream import stream_materialize

    files = stream_materialize(graph, store, folder / "int8", SHARD)
    return {"linears": len(graph.recipes) // 2, "gigabytes": round(sum(f.stat().st_size for f in files) / 1e9, 2), "shards": len(files)}


def in_memory(folder: Path, layers: int) -> dict:
    """The same graphs with all weights loaded: are the logits the same bits?"""
    from safetensors.torch import load_file

    from rewright.ir.weights import WeightStore

    meta, buffers = captured(layers)
    result: dict = {}
    for name in ("original", "rewritten"):
        graph = meta.clone() if name == "original" else quantized(meta)
        graph.materialize(WeightStore.open(folder / "model", held=buffers))
        begin = time.perf_counter()
        outputs = [graph.run(flat)[0] for flat in batches()]
        seconds = _since(begin)
        wanted = [t for _, t in sorted(load_file(folder / f"{name}.safetensors").items())]
        result[name] = {
            "run_s": seconds,
            "bit_equal": all(a.equal(b) for a, b in zip(outputs, wanted, strict=True)),
            "largest_difference": max((a - b).abs().max().item() for a, b in zip(outputs, wanted)),
            "largest_logit": max(a.abs().max().item() for a in outputs),
            "peak_rss_gib": _peak(),
        }
        del graph
    return result


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 1)


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _save(file: Path, outputs: list[tuple]) -> None:
    from rewright.ir.weights import write_tensors

    tensors = {f"logits_{i}": out[0] for i, out in enumerate(outputs)}
    write_tensors(file, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        step, folder, layers = sys.argv[2:5]
        begin = time.perf_counter()
        found = {"generate": generate, "streamed": streamed, "in_memory": in_memory}[step](Path(folder), int(layers))
        print(json.dumps({"step": step, "peak_rss_gib": _peak(), "seconds": _since(begin), **found}))
        return
    layers = int(sys.argv[1]) if sys.argv[1:] else 22
    folder = Path(tempfile.mkdtemp(prefix="rewright-streaming-"))
    rows = []
    try:
        for step in STEPS:
            done = subprocess.run([sys.executable, __file__, "--one", step, str(folder), str(layers)], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    import torch

    conditions = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "weights": "float32",
        "layers": layers,
        "limit_mib": LIMIT >> 20,
        "tokens": sum(a * b for a, b in TOKENS),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps({"conditions": conditions, "steps": rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
