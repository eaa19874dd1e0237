"""What the benchmarks of rewrites share: rows of results in a file, kept as they come, and the zoo's judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

MOST = {"minilm": 256, "digits-vit": 599, "stdlib-lm": 128}  # judged texts, images, windows of 256 tokens


class Rows:
    """benchmarks/NAME.json: conditions, then model -> table -> row; and NAME.txt for people, written with it."""

    def __init__(self, name: str, text: Callable[[dict[str, Any]], str]) -> None:
        here = Path(__file__).parent
        self.file, self.for_people, self.text, self.name = here / f"{name}.json", here / f"{name}.txt", text, name

    def load(self) -> dict[str, Any]:
        """All results so far."""
        from rewright.tools.demo import conditions

        return json.loads(self.file.read_text()) if self.file.exists() else {"conditions": conditions(), "models": {}}

    def has(self, model: str, table: str, row: str) -> bool:
        """Whether a row was made before."""
        return row in self.load()["models"].get(model, {}).get(table, {})

    def store(self, model: str, table: str, row: str | None, found: Any) -> None:
        """One row, or a whole table, into the file; several processes may work on other models."""
        import fcntl

        with open(Path(gettempdir()) / f"rewright-{self.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = self.load()
            tables = results["models"].setdefault(model, {})
            if row is None:
                tables[table] = found
            else:
                tables.setdefault(table, {})[row] = found
            self.file.write_text(json.dumps(results, indent=1))
            self.for_people.write_text(self.text(results))


def judged(model: str, run: Any) -> dict[str, dict[str, Any]]:
    """The scores of a model's own judge on held-out data."""
    from rewright.tools.zoo import load_zoo

    return {score.name: score.as_dict() for score in load_zoo(model).judge(run, MOST[model])}


def made(loaded: Any, passes: Any) -> Any:
    """A model optimized by a recipe's name, or by passes as names or tables; not verified (its judge does that)."""
    import rewright as rw
    from rewright.passes.recipe import make_pass

    if isinstance(passes, str):
        return rw.optimize(loaded, recipe=passes, verify=False)
    steps = [make_pass(p, {}) if isinstance(p, str) else make_pass(p["name"], {k: v for k, v in p.items() if k != "name"}) for p in passes]
    return rw.optimize(loaded, recipe=steps, verify=False)


def latencies(model: str, programs: Mapping[str, Any], shapes: Sequence[str], reference: str, runs: int, budget_s: float) -> dict[str, Any]:
    """Row name -> result of rw.optimize, as files in onnxruntime: all rows alternating at each shape, Timings as dicts."""
    from rewright.backends.onnx.session import Session
    from rewright.tools.bench import alternate
    from rewright.tools.compare import sized_inputs
    from rewright.tools.models import load_model

    graph = load_model(f"zoo:{model}").graph
    with TemporaryDirectory() as folder:
        sessions = {}
        for i, (row, result) in enumerate(programs.items()):
            result.export(path := Path(folder) / f"{i}.onnx")
            sessions[row] = Session(path)
        found: dict[str, Any] = {}
        for shape in shapes:
            flat = sized_inputs(graph, model, shape)
            calls = {row: (lambda s=s, flat=flat: s(flat)) for row, s in sessions.items()}
            found[shape] = {row: t.as_dict() for row, t in alternate(calls, reference, runs, budget_s=budget_s).items()}
        return found


def latency_lines(found: Mapping[str, Any], reference: str) -> list[str]:
    """Alternating timings (tools.bench.Timing as dicts) by shape, for people."""
    return [
        f"  {shape:8s} {row:44s} {t['median_ms']:9.3f} ms   ratio to {reference} {t['ratio']:.3f} [{t['ratio_low']:.3f}-{t['ratio_high']:.3f}]"
        for shape, rows in found.items()
        for row, t in rows.items()
    ]
