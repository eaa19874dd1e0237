"""MiniLM and the other zoo models through TVM beside everything else one has on this CPU; single products; where the time goes.

usage: python benchmarks/compiled.py [--table minilm|quality|products|zoo|images|profile]
Writes benchmarks/compiled.json table by table, and compiled.txt. One thread, processor time, all rows of a shape in one process, alternating.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Rows

SHAPES = ("1x16", "1x32", "1x128", "8x128", "32x64")
FP32 = "onnxruntime fp32"
PRODUCTS = {
    "ffn in": (1024, 384, 1536),
    "ffn out": (1024, 1536, 384),
    "projection": (1024, 384, 384),
    "wide": (512, 4096, 4096),
    "one row": (1, 4096, 4096),
    "few rows": (32, 384, 1536),
}
"""Rows, channels in, channels out."""
IMAGE_NETS = ("resnet50", "mobilenetv3_large_100", "convnext_atto", "efficientnet_b0")


def programs() -> dict[str, Any]:
    """Row -> a result of rw.optimize, made once and kept in the temporary folder: calibration takes minutes."""
    import rewright as rw

    found = {}
    for recipe in ("clean", "encoder-int8", "encoder-int8-tvm"):
        folder = Path(tempfile.gettempdir()) / f"rewright-benchmark-{recipe}"
        if not (folder / "manifest.json").exists():
            rw.optimize("zoo:minilm", recipe=recipe, verify=False).save(folder)
        found[recipe] = rw.load(folder)
    return found


def runs() -> dict[str, Any]:
    """Row -> what runs a batch of texts."""
    import torch

    from rewright.backends.onnx.session import Session
    from rewright.backends.tvm.build import compile_graph
    from rewright.tools.demo import baselines
    from rewright.tools.models import load_model

    zoo = load_model("zoo:minilm").zoo
    module, half = zoo.module, copy.deepcopy(zoo.module).to(torch.bfloat16)
    fast, fast_half = (torch.compile(m, dynamic=True) for m in (module, half))
    folder = Path(tempfile.mkdtemp())
    fp32, dynamic = baselines(zoo, folder)
    sessions = {FP32: Session(fp32), "onnxruntime quantize_dynamic": Session(dynamic)}
    made = programs()
    made["encoder-int8"].export(folder / "ours.onnx")
    sessions["encoder-int8 in onnxruntime"] = Session(folder / "ours.onnx")
    found = {name: (lambda batch, s=s: s([batch[i] for i in s.inputs])[0]) for name, s in sessions.items()}
    for name, model in (("torch fp32", module), ("torch.compile fp32", fast), ("torch bf16", half), ("torch.compile bf16", fast_half)):
        found[name] = lambda batch, m=model: m(**batch).last_hidden_state
    for recipe, name in (("clean", "TVM fp32"), ("encoder-int8", "TVM encoder-int8"), ("encoder-int8-tvm", "TVM encoder-int8-tvm")):
        compiled, names = compile_graph(made[recipe].graph), made[recipe].graph.call.names
        found[name] = lambda batch, c=compiled, names=names: c([batch[n] for n in names])[0]
    return found


def minilm(rows: Rows) -> None:
    """Every way to run it, as ratios to onnxruntime's fp32."""
    import torch

    from rewright.tools.bench import alternate
    from rewright.tools.zoo.minilm import encode, judged_texts

    found, table = runs(), {}
    for shape in SHAPES:
        batch, length = map(int, shape.split("x"))
        inputs = encode(judged_texts("held_out")[:batch], length)
        with torch.inference_mode():
            calls = {name: (lambda run=run, inputs=inputs: run(inputs)) for name, run in found.items()}
            table[shape] = {name: t.as_dict() for name, t in alternate(calls, FP32, 21, budget_s=60, clock=time.process_time).items()}
    rows.store("minilm", "minilm", None, table)


def quality(rows: Rows) -> None:
    """Of the programs as TVM runs them, on held-out texts."""
    from rows import judged

    from rewright.backends.tvm.build import compile_graph

    for recipe, result in programs().items():
        graph = result.graph
        compiled = compile_graph(graph)
        scores = judged("minilm", lambda batch, c=compiled, g=graph: c([batch[n] for n in g.call.names])[0])
        rows.store("minilm", "quality", recipe, {"compile_seconds": compiled.seconds, "in_torch": dict(compiled.in_torch), **scores})


def products(rows: Rows) -> None:
    """Single linear layers: GFLOP/s of ours and of torch."""
    import torch
    import torch.nn.functional as F

    from rewright.backends.target import cpu_features
    from rewright.backends.tvm import gemm
    from rewright.backends.tvm.compat import llvm_target, tvm
    from rewright.tools.bench import alternate

    def compiled(function: Any) -> Any:
        return tvm.compile(function, target=llvm_target())["main"]

    table = {}
    for name, (n, width, out) in PRODUCTS.items():
        plan = gemm.Plan.of(cpu_features(), out)
        x, w, b, y = torch.randn(n, width), torch.randn(out, width) / width**0.5, torch.randn(out), torch.empty(n, out)
        codes, wq = torch.randint(0, 256, (n, width), dtype=torch.uint8), torch.randint(-127, 128, (out, width), dtype=torch.int8)
        signed, step, scale = (codes.int() - 128).to(torch.int8), torch.rand(n), torch.rand(out)
        xh, wh, bh = x.bfloat16(), w.bfloat16(), b.bfloat16()
        rank = int(0.47 * width * out / (width + out)) // 16 * 16
        first, second, middle = torch.randn(rank, width), torch.randn(out, rank), torch.empty(n, rank)
        low = gemm.Plan.of(cpu_features(), rank)
        plain, fused = (compiled(gemm.Product(width, out, activation=a).build(plan, "main")) for a in (None, "gelu"))
        int8 = compiled(gemm.Product(width, out, codes=True).build(plan, "main"))
        down, up = compiled(gemm.Product(width, rank, bias=False).build(low, "main")), compiled(gemm.Product(rank, out).build(plan, "main"))
        wp, bp, wqp = gemm.pack(w, plan), gemm.pack_channels(b, plan), gemm.pack_codes(wq, plan)
        offset, scales = gemm.pack_channels(-128 * wq.int().sum(1).to(torch.int32), plan), gemm.pack_channels(scale, plan)
        firstp, secondp = gemm.pack(first, low), gemm.pack(second, plan)
        calls = {
            "torch fp32": lambda x=x, w=w, b=b: F.linear(x, w, b),
            "torch fp32 + gelu": lambda x=x, w=w, b=b: F.gelu(F.linear(x, w, b)),
            "torch bf16": lambda x=xh, w=wh, b=bh: F.linear(x, w, b),
            "torch int8 (_int_mm, no scales)": lambda x=signed, w=wq: torch._int_mm(x, w.T),
            "torch low rank, 47 %": lambda x=x, p=first, q=second, b=b: F.linear(F.linear(x, p), q, b),
            "ours fp32": lambda f=plain, a=(x, wp, bp, y): f(*a),
            "ours fp32 + gelu": lambda f=fused, a=(x, wp, bp, y): f(*a),
            "ours int8": lambda f=int8, a=(codes, step, wqp, offset, scales, bp, y): f(*a),
            "ours low rank, 47 %": lambda p=down, q=up, a=(x, firstp, middle), c=(middle, secondp, bp, y): (p(*a), q(*c)),
        }
        if n <= 32 or width == out == 4096:
            calls["ours 4 bit"] = four_bits(n, width, out, plan)
        times = alternate(calls, "torch fp32", 31, clock=time.process_time)
        table[f"{name} {n}x{width}x{out}"] = {k: {**t.as_dict(), "gflops": 2 * n * width * out / t.median_ms / 1e6} for k, t in times.items()}
    rows.store("minilm", "products", None, table)


def four_bits(n: int, width: int, out: int, plan: Any) -> Any:
    """A product whose weights are codes of 4 bits with a scale and a zero point every 32 channels."""
    import torch

    from rewright.backends.tvm import nbits
    from rewright.backends.tvm.compat import llvm_target, tvm

    run = tvm.compile(nbits.Grouped(width, out, bias=False, group=32).build(plan, "main"), target=llvm_target())["main"]
    codes, scale, zero = torch.randint(0, 16, (out, width)), torch.rand(out, width // 32), torch.randint(0, 16, (out, width // 32)).float()
    x, y, packed = torch.randn(n, width), torch.empty(n, out), nbits.pack_groups(codes, scale, zero, plan)
    return lambda: run(x, *packed, y)


def zoo(rows: Rows) -> None:
    """The zoo models in fp32: error against torch, compile seconds, times beside onnxruntime's, the dynamic program beside a static one."""
    import rewright as rw
    from rewright.backends.onnx.session import Session
    from rewright.backends.tvm.build import compile_graph
    from rewright.tools.bench import alternate
    from rewright.tools.compare import sized_inputs

    shapes = {"minilm": ("1x1", "1x32", "3x77", "8x128"), "digits-vit": ("1", "8", "32"), "stdlib-lm": ("1x16", "1x128", "4x256")}
    for model, sizes in shapes.items():
        result = rw.optimize(f"zoo:{model}", recipe="clean", verify=False)
        compiled, table = compile_graph(result.graph), {}
        with tempfile.TemporaryDirectory() as folder:
            result.export(path := Path(folder) / "model.onnx")
            session = Session(path)
            for shape in sizes:
                flat = sized_inputs(result.graph, model, shape)
                wanted, found = result.graph.run(flat)[0], compiled(flat)[0]
                calls = {FP32: lambda s=session, f=flat: s(f), "TVM fp32": lambda c=compiled, f=flat: c(f)}
                times = alternate(calls, FP32, 15, clock=time.process_time)
                table[shape] = {"error": float((wanted - found).abs().max() / wanted.abs().max()), **times["TVM fp32"].as_dict()}
        fixed = dict.fromkeys(result.graph.call.names)
        static = compile_graph(rw.capture(result.graph.module, flat, dynamic_shapes=fixed))
        calls = {"dynamic": lambda c=compiled, f=flat: c(f), "static": lambda c=static, f=flat: c(f)}
        ratio = alternate(calls, "static", 15, clock=time.process_time)["dynamic"].as_dict()
        found = {"compile_seconds": compiled.seconds, "in_torch": dict(compiled.in_torch), "shapes": table}
        rows.store(model, "zoo", None, {**found, "dynamic_to_static": ratio, "static_compile_seconds": static.seconds})


def images(rows: Rows) -> None:
    """Convolutional nets of timm at their own size, one image and eight. Their weights are random: times alone."""
    import torch

    import rewright as rw
    from rewright.backends.onnx.session import Session
    from rewright.backends.tvm.build import compile_graph
    from rewright.tools.bench import alternate
    from rewright.tools.models import load_model, random_inputs

    for name in IMAGE_NETS:
        loaded = load_model(f"timm:{name}")
        clean = rw.optimize(loaded, recipe="clean", verify=False)
        compiled, table = compile_graph(clean.graph), {}
        assert loaded.module is not None
        with tempfile.TemporaryDirectory() as folder:
            clean.export(path := Path(folder) / "model.onnx")
            runs: dict[str, Any] = {FP32: Session(path), "torch fp32": loaded.module, "torch fp32, cleaned": clean.module, "TVM fp32": compiled}
            (image,) = random_inputs(clean.graph)
            for batch in (1, 8):
                x = image.repeat_interleave(4, 0)[:batch].contiguous()
                calls = {name: (lambda run=run, x=x if "torch" in name else (x,): run(x)) for name, run in runs.items()}
                wanted, found = clean.graph.run((x,))[0], compiled((x,))[0]
                error = float((wanted - found).abs().max() / wanted.abs().max())
                with torch.inference_mode():
                    times = alternate(calls, FP32, 15, budget_s=40, clock=time.process_time)
                table[f"{batch}x{x.shape[-1]}"] = {"error": error, "times": {k: t.as_dict() for k, t in times.items()}}
        rows.store(name, "images", None, {"compile_seconds": compiled.seconds, "in_torch": dict(compiled.in_torch), "shapes": table})


def profile(rows: Rows) -> None:
    """Processor time of every kernel of one run at 8x128."""
    from rewright.backends.tvm.build import compile_graph
    from rewright.tools.zoo.minilm import encode, judged_texts

    inputs = encode(judged_texts("held_out")[:8], 128)
    for recipe in ("clean", "encoder-int8-tvm"):
        graph = programs()[recipe].graph
        rows.store("minilm", "profile", recipe, compile_graph(graph).profile([inputs[n] for n in graph.call.names]))


def _ratio(t: dict[str, float]) -> str:
    return f"{t['ratio']:.3f} [{t['ratio_low']:.3f}-{t['ratio_high']:.3f}]"


def text(results: dict[str, Any]) -> str:
    """For people."""
    lines = [f"conditions: {results['conditions']}", ""]
    models = results["models"]
    if table := models.get("minilm", {}).get("minilm"):
        lines += [f"minilm, processor time of one thread: ms (ratio to {FP32} [quartiles])", ""]
        names = list(next(iter(table.values())))
        for name in names:
            lines.append(f"  {name:32s}" + "  ".join(f"{table[s][name]['median_ms']:8.2f} ({_ratio(table[s][name])})" for s in table))
        lines += ["  " + " " * 32 + "  ".join(f"{s:>32s}" for s in table), ""]
    for recipe, row in models.get("minilm", {}).get("quality", {}).items():
        scores = ", ".join(f"{k} {v['value']:.4f}" for k, v in row.items() if isinstance(v, dict) and "value" in v)
        lines.append(f"quality of {recipe} as TVM runs it: {scores}; compiled in {row['compile_seconds']:.1f} s; in torch: {row['in_torch'] or 'nothing'}")
    for name, row in models.get("minilm", {}).get("products", {}).items():
        lines += ["", f"product {name}: GFLOP/s (time, ratio to torch fp32)"]
        lines += [f"  {k:34s} {t['gflops']:7.0f}   {t['median_ms']:8.3f} ms  {_ratio(t)}" for k, t in row.items()]
    for model, tables in models.items():
        if row := tables.get("zoo"):
            lines += ["", f"zoo:{model} fp32, compiled in {row['compile_seconds']:.1f} s, in torch: {row['in_torch'] or 'nothing'}"]
            lines.append(f"  the program for all sizes takes {_ratio(row['dynamic_to_static'])} of one for the last size alone")
            lines += [f"  {s:8s} error {t['error']:.1e}   {t['median_ms']:8.2f} ms   {t['ratio']:.3f} of {FP32}" for s, t in row["shapes"].items()]
    for model, tables in models.items():
        if row := tables.get("images"):
            lines += ["", f"timm:{model} (random weights) fp32, compiled in {row['compile_seconds']:.1f} s, in torch: {row['in_torch'] or 'nothing'}"]
            for shape, t in row["shapes"].items():
                lines.append(f"  {shape}: error of TVM {t['error']:.1e}")
                lines += [f"    {k:24s} {v['median_ms']:8.2f} ms  {_ratio(v)}" for k, v in t["times"].items()]
    for recipe, row in models.get("minilm", {}).get("profile", {}).items():
        total = sum(t["ms"] for t in row.values())
        lines += ["", f"profile of {recipe} at 8x128: {total:.1f} ms"]
        lines += [
            f"  {k:32s} {t['calls']:5d} calls  {t['ms']:8.2f} ms  {t['ms'] / total:6.1%}"
            for k, t in sorted(row.items(), key=lambda kv: -kv[1]["ms"])
            if t["ms"] > 0.005 * total
        ]
    return "\n".join(lines) + "\n"


TABLES = {"products": products, "zoo": zoo, "images": images, "quality": quality, "profile": profile, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", choices=TABLES, action="append")
    chosen = parser.parse_args().table or list(TABLES)
    import torch

    torch.set_num_threads(1)
    rows = Rows("compiled", text)
    for name in chosen:
        TABLES[name](rows)
        print(rows.for_people.read_text())


if __name__ == "__main__":
    main()
