"""How results look to a person: rich tables on stdout, a progress bar on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from .lowering import Lowering, in_torch
from .onnx_file import TidiedFile

console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)  # names and shapes hold square brackets


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where stderr is a terminal and the work takes longer than two seconds; silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    begin, state = time.perf_counter(), {"started": False}
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("starting")

    def update(what: str, done: int, total: int) -> None:
        if not state["started"] and time.perf_counter() - begin > 2:
            bar.start()
            state["started"] = True
        bar.update(task, description=what, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()


def megabytes(count: float) -> str:
    """'22.7 MB'."""
    return f"{count / 1e6:,.1f} MB"


# -- results ----------------------------------------------------------------------------------------------------------


def result(found: Any, model: str, written: str | None, lowering: Lowering | None = None) -> None:
    """What `optimize` did, pass by pass, then the end against the original."""
    if isinstance(found, TidiedFile):
        return tidied(found, model, written)
    before, after = found.outcome.original, found.graph
    console.print(
        f"{model}: {len(before.nodes)} -> {len(after.nodes)} calls, weights {megabytes(before.weight_bytes())} -> {megabytes(after.weight_bytes())}",
        style="bold",
    )
    for note in after.notes:
        console.print(f"note: {note}")
    console.print(_passes_table(found.records))
    declined(found.records)
    v = found.verification
    if "cosine" in v:
        same = "bit-equal to the original" if v["bit_equal"] else f"cosine {v['cosine']:.5f}, relative error {v['relative_error']:.2g} against the original"
        console.print(f"end result: {same}, on {v['inputs']} inputs of several sizes")
    else:
        console.print(f"end result: {v['note']}")
    if modelled := _modelled_energy(before, after):
        console.print(modelled, soft_wrap=True)
    if lowering is not None:
        _lowering(lowering)
    if written:
        console.print(f"wrote {written}")


def _lowering(found: Lowering) -> None:
    """What runs the program, and what was measured for it."""
    choices = found.lowered.choices
    counts = Counter(c.kernel for c in choices)
    said = ", ".join(f"{n} calls in {kernel}" for kernel, n in counts.most_common()) or "nothing to lower"
    console.print(f"backend {found.lowered.backend}: {said}", style="bold")
    for why in in_torch(choices)[:5] if len(counts) > 1 else []:
        console.print(f"  in torch: {why}", soft_wrap=True)
    for name, t in found.timings.items():
        console.print(f"  {name:8s} {t.median_ms:9.2f} ms   {t.ratio:.2f} of torch [{t.ratio_low:.2f}-{t.ratio_high:.2f}], on {found.shape}")
    for name, why in found.declined.items():
        console.print(f"  {name:8s} not tried: {why}", soft_wrap=True)


def tidied(found: TidiedFile, model: str, written: str | None) -> None:
    """What became of an ONNX file's nodes."""
    before, after = found.tidied.before, found.tidied.after
    console.print(f"{model}: {before} -> {after} nodes, opset {found.file.model.opset_imports.get('', 0)} as it was", style="bold")
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "changes", "nodes", "s"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for step in found.tidied.steps:
        table.add_row(step.name, str(step.changes), f"{step.nodes:+d}" if step.nodes else "0", f"{step.seconds:.1f}")
    console.print(table)
    declined(found.records)
    v = found.verification
    same = v["note"] if "note" in v else "bit-equal to the file" if v["bit_equal"] else f"relative error {v['relative_error']:.2g} against the file"
    where = "" if "note" in v else f", in onnxruntime on {v['inputs']} made inputs"
    console.print(f"end result: {same}{where}")
    if written:
        console.print(f"wrote {written}")


def _passes_table(records: list[Any], captured_ms: float | None = None) -> Table:
    """One row a pass, the canonical form as one; with the captured program's time, a column of times after each pass that was timed."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (
        ("pass", False),
        ("matched", True),
        ("applied", True),
        ("declined", True),
        ("launches", True),
        ("weights", True),
        ("bytes moved", True),
        ("outputs", False),
        ("s", True),
    ):
        table.add_column(name, justify="right" if right else "left")
    latency = captured_ms is not None
    if latency:
        table.add_column("8x128", justify="right")
        table.add_row("as captured", *[""] * (len(table.columns) - 2), f"{captured_ms:.1f} ms")
    quiet = [r for r in records if r.canonical]
    if quiet:
        table.add_row(*_row("canonical form", quiet, latency))
    for r in records:
        if not r.canonical:
            table.add_row(*_row(r.name, [r], latency))
    return table


def _row(name: str, records: list[Any], latency: bool) -> list[str]:
    def total(key: str) -> float:
        return sum(r.predicted.get(key, 0) for r in records)

    last = next((r for r in reversed(records) if r.measured), records[-1])
    cells = [
        name if len(records) == 1 else f"{name} ({len(records)} passes)",
        str(sum(r.matched for r in records)),
        str(sum(r.applied for r in records)),
        str(sum(len(r.declined) for r in records)),
        f"{total('launches'):+,.0f}" if total("launches") else "0",
        f"{total('weight_bytes') / 1e6:+,.1f} MB" if total("weight_bytes") else "0",
        f"{total('bytes') / 1e6:+,.1f} MB" if total("bytes") else "0",
        f"undone: {last.undone}" if last.undone else _measured(last),
        f"{sum(r.seconds for r in records):.1f}",
    ]
    if latency:
        times = [r.measured["latency_ms"] for r in records if "latency_ms" in r.measured]
        cells.append(f"{times[-1]:.1f} ms" if times else "")
    return cells


def _measured(record: Any) -> str:
    """An exact pass by its own promise (the program before it), a lossy one by the end result so far (the original)."""
    m = record.measured
    if "cosine" not in m:
        return str(m.get("note", "not measured"))
    if record.exact and "local_error" in m:
        return f"exact within {m['local_error']:.1e} a value, ties moved the outputs by {m['step_error']:.1e}"
    if record.exact:
        return "bit-equal" if not m.get("step_error") else f"exact within {m['step_error']:.1e}"
    return f"cosine {m['cosine']:.4f}, error {m['relative_error']:.2g}"


def declined(records: list[Any], most: int = 6) -> None:
    """The sentences, grouped: what was left alone, where, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in records:
        for d in r.declined:
            reasons.setdefault((r.name, d.why), []).append(d.layer or d.node)
    for (name, why), places in list(reasons.items())[:most]:
        where = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        console.print(f"  {name} declined {where}: {why}", soft_wrap=True)
    if len(reasons) > most:
        console.print(f"  and {len(reasons) - most} more reasons (--json has all)")


def plan_payload(found: Any, target: str) -> dict[str, Any]:
    """A dry run as data."""
    if isinstance(found, TidiedFile):
        return {"target": target, "nodes": [found.tidied.before, found.tidied.after], "passes": [r.as_dict() for r in found.records]}
    from ..backends.lower import lower
    from ..backends.target import Target
    from .optimize import predicted_seconds

    machine = Target.load(target)
    before, after = found.outcome.original, found.graph
    return {
        "target": target,
        "calls": [len(before.nodes), len(after.nodes)],
        "weight_bytes": [before.weight_bytes(), after.weight_bytes()],
        "predicted_seconds": [predicted_seconds(before, machine), predicted_seconds(after, machine)],
        "kernels": [dataclasses.asdict(c) for c in lower(after, machine, available=("triton", "tvm")).choices],
        "passes": [r.as_dict() for r in found.records],
    }


def plan(found: Any, target: str) -> None:
    """A dry run for a person."""
    if isinstance(found, TidiedFile):
        return tidied(found, found.name, None)
    data = plan_payload(found, target)
    (n0, n1), (b0, b1), (s0, s1) = data["calls"], data["weight_bytes"], data["predicted_seconds"]
    console.print(
        f"would go from {n0} to {n1} calls, weights {megabytes(b0)} to {megabytes(b1)}; "
        f"predicted on {target} at the example sizes: {s0 * 1e3:.3g} to {s1 * 1e3:.3g} ms (roofline, not measured)"
    )
    console.print(_passes_table(found.records))
    declined(found.records)
    for (op, kernel), count in Counter((k["op"], k["kernel"]) for k in data["kernels"]).items():
        why = next(k["why"] for k in data["kernels"] if (k["op"], k["kernel"]) == (op, kernel))
        console.print(f"  {count} {op} would run in {kernel}: {why}", soft_wrap=True)


def demo(found: Any) -> None:
    """The demo's tables."""
    from .demo import BASELINE, OURS

    c = found.conditions
    graph, original = found.result.graph, found.result.outcome.original
    console.print(
        f"MiniLM-L6 (22.7 M parameters), {len(original.nodes)} -> {len(graph.nodes)} calls, "
        f"weights {megabytes(original.weight_bytes())} -> {megabytes(graph.weight_bytes())}",
        style="bold",
    )
    console.print(
        f"{c['cpu']} ({', '.join(c['isa'])}), {c['threads']} thread, torch {c['torch']}, onnxruntime {c['onnxruntime']}; alternating runs in one process\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("nodes", "file", *(f"{s} ms" for s in found.timings), *(f"{s} ratio" for s in found.timings), *(q.name for q in _shown(found.quality[OURS]))):
        table.add_column(name, justify="right")
    for name in next(iter(found.timings.values())):
        nodes, size = found.sizes.get(name, (None, None))
        quality = found.quality.get(name, [])
        rows = [row[name] for row in found.timings.values()]
        cells = [str(nodes or ""), megabytes(size) if size else ""]
        cells += [f"{t.median_ms:.1f} [{t.low_ms:.1f}-{t.high_ms:.1f}]" for t in rows]
        cells += [f"{t.ratio:.3f}" for t in rows]
        cells += [f"{q.value:.4f} ±{(q.high - q.low) / 2:.4f}" for q in _shown(quality)]
        table.add_row(name, *cells, style="bold" if name == OURS else None)
    console.print(table)
    on = " and ".join(dict.fromkeys(q.on for q in found.quality[OURS]))
    console.print(f"ms: median [quartiles]; ratio: to {BASELINE}, median of paired rounds; quality against torch fp32 on {on}, ± half the 95 % interval\n")
    console.print(_passes_table(found.result.records, found.captured_ms))
    declined(found.result.records)
    e = found.exported
    console.print(
        f"\nwrote {e.path}: {e.nodes} nodes, {megabytes(e.bytes)}, opset {e.opset}, profile {e.profile}; "
        f"onnxruntime against the graph: cosine {e.parity.cosine:.5f} over {e.parity.inputs} input sizes"
    )


def _shown(quality: list[Any]) -> list[Any]:
    """The scores a wide table has room for."""
    return [q for q in quality if q.name in ("cosine", "nearest neighbour", "MRR change")]


def evaluation(found: Any) -> None:
    """`evaluate` for a person."""
    console.print(f"{found.model} in {found.backend}, judged on {found.on}, {found.seconds:.1f} s")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "value", "95 % interval", "on"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for score in found.scores:
        interval = f"{score.low:.4f} to {score.high:.4f}" if score.low == score.low else "not given"  # NaN: the user's own number
        table.add_row(score.name, f"{score.value:.4f}", interval, score.on)
    console.print(table)


def recovery(found: Any, out: str) -> None:
    """`finetune` for a person: the curve, then what came back."""
    if found.trained.resumed_at is not None:
        console.print(f"went on from step {found.trained.resumed_at}")
    trained, of = found.weights
    console.print(f"{', '.join(found.terms)}; trained {trained:,} of {of:,} weights on {found.data}; {found.conditions}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = [found.metric.name] if found.metric is not None else []
    for name in ("step", "seconds", "rows", "loss", f"drift: {found.drift}", *names):
        table.add_column(name, justify="right")
    for i, row in enumerate(found.curve):
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        cells = [f"{row['step']:,}", f"{row['seconds']:.0f}", f"{row['rows']:,}", loss, f"{row['drift']:.4f}", *(f"{row[n]:.4f}" for n in names)]
        table.add_row(*cells, style="bold" if i == found.trained.best else None)
    console.print(table)
    if found.metric is not None and found.metric.on:
        console.print(f"{found.metric.name}: on {found.metric.on}; nothing was chosen by it")
    console.print(f"wrote {out}")
    console.print(found.sentence(), style="bold", soft_wrap=True)


def timings(found: dict[str, Any]) -> None:
    """`bench` for a person."""
    for shape, rows in found["shapes"].items():
        table = Table(title=f"{shape}, {found['threads']} thread(s)", title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("model", "median ms", "quartiles", "ratio", "quartiles of the ratio"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for name, t in rows.items():
            table.add_row(
                name, f"{t['median_ms']:.2f}", f"{t['low_ms']:.2f}-{t['high_ms']:.2f}", f"{t['ratio']:.2f}", f"{t['ratio_low']:.2f}-{t['ratio_high']:.2f}"
            )
        console.print(table)


def difference(found: Any) -> None:
    """`diff` for a person."""
    if found.equal:
        console.print("the two programs read the same")
        return
    for op, (a, b) in found.ops.items():
        console.print(f"{op:<28}{a:>6} -> {b}")
    for what, (a, b) in (("calls", found.calls), ("weight bytes", found.weight_bytes), ("bytes moved", found.bytes), ("FLOPs", found.flops)):
        console.print(f"{what:<28}{a:>14,} -> {b:,}")
    print(found.text)


def cost_payload(rows: list[Any], target: str, sizes: dict[str, int]) -> dict[str, Any]:
    """`cost` as data: rows of `tools.optimize.cost` at sizes of dynamic dims."""
    nodes = [
        {"node": c.node, "op": c.op, "layer": c.layer, **dataclasses.asdict(c.cost), "weight_bytes": c.weight_bytes, "predicted_seconds": s, "bound": b}
        for c, s, b in rows
    ]
    totals = {key: sum(n[key] for n in nodes) for key in ("bytes", "flops", "launches", "weight_bytes", "predicted_seconds")}
    return {"target": target, "sizes": sizes, "total": totals, "nodes": nodes}


def costs(rows: list[Any], payload: dict[str, Any], most: int) -> None:
    """`cost` for a person: the sum, each kind of op, the dearest calls."""
    total, at = payload["total"], ", ".join(f"{dim} {size}" for dim, size in payload["sizes"].items())
    console.print(
        f"on {payload['target']}{f' at {at}' if at else ''}: {total['predicted_seconds'] * 1e3:.3g} ms predicted by roofline, "
        f"{total['flops'] / 1e9:.3g} GFLOP, {megabytes(total['bytes'])} moved, {total['launches']} launches"
    )
    kinds: dict[str, list[Any]] = {}
    for row in rows:
        kinds.setdefault(row[0].op, []).append(row)
    table = _right("op", "calls", "GFLOP", "MB moved", "ms", "share", "bounds")
    for op, calls in sorted(kinds.items(), key=lambda k: -sum(s for _, s, _ in k[1])):
        seconds = sum(s for _, s, _ in calls)
        bounds = ", ".join(f"{bound} {n}" for bound, n in Counter(b for _, _, b in calls).most_common())
        share = f"{100 * seconds / max(total['predicted_seconds'], 1e-30):.1f} %"
        table.add_row(op, str(len(calls)), *_work(sum((c.cost for c, _, _ in calls[1:]), calls[0][0].cost)), f"{seconds * 1e3:.3f}", share, bounds)
    console.print(table)
    dearest = sorted(rows, key=lambda r: -r[1])[:most]
    console.print(f"\nthe {len(dearest)} dearest of {len(rows)} calls{'; --most lists more' if len(dearest) < len(rows) else ''}")
    table = _right("node", "op", "GFLOP", "MB moved", "ms", "bound", "layer")
    for c, seconds, bound in dearest:
        table.add_row(c.node, c.op, *_work(c.cost), f"{seconds * 1e3:.3f}", bound, c.layer)
    console.print(table)


def _right(*columns: str) -> Table:
    """A table with numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in ("calls", "GFLOP", "MB moved", "ms", "share") else "left")
    return table


def _work(cost: Any) -> tuple[str, str]:
    return f"{cost.flops / 1e9:.3f}", f"{cost.bytes / 1e6:.2f}"


def energy_payload(rows: list[Any]) -> dict[str, Any]:
    """`cost --energy` as data: modelled picojoules."""
    from ..ir.energy import CAPTION, total

    def plain(row: Any) -> dict[str, Any]:
        return {**dataclasses.asdict(row), "total": row.total}

    sums = plain(total(rows))
    return {"caption": CAPTION, "unit": "modelled pJ", "total": {k: v for k, v in sums.items() if isinstance(v, float)}, "nodes": [plain(r) for r in rows]}


def energies(rows: list[Any], most: int) -> None:
    """`cost --energy` for a person."""
    from ..ir.energy import CAPTION, PARTS, total

    whole = total(rows)
    shares = ", ".join(f"{part} {100 * getattr(whole, part) / max(whole.total, 1e-9):.1f} %" for part in PARTS)
    console.print(f"modelled energy at the example sizes: {whole.total / 1e6:,.3g} uJ ({shares})")
    console.print(CAPTION)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("node", "op", "modelled uJ", *PARTS, "layer"):
        table.add_column(name, justify="left" if name in ("node", "op", "layer") else "right")
    for r in sorted(rows, key=lambda r: -r.total)[:most]:
        table.add_row(r.node, r.op, f"{r.total / 1e6:.3f}", *(f"{getattr(r, part) / 1e6:.3f}" for part in PARTS), r.layer)
    console.print(table)


def _modelled_energy(before: Any, after: Any) -> str | None:
    """The change in modelled energy in one sentence, from half a percent on."""
    from ..ir.energy import CAPTION, energy, total

    a, b = (total(energy(g)).total for g in (before, after))
    return f"modelled energy {100 * (b / a - 1):+.1f} % ({CAPTION})" if a and abs(b / a - 1) >= 0.005 else None
