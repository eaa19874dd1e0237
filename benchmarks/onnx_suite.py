"""`clean-onnx` on the backend suite that comes inside the onnx wheel, and on freshly exported small models: same results, how many nodes, seconds.

usage: python benchmarks/onnx_suite.py [--sample N] [--road file|graph|onnxscript] [--fresh] [--chunk N]
A case qualifies if onnxruntime (its optimizations off, one thread) gives the results that come with it; then the file goes through
`rw.optimize(file, recipe="clean-onnx").export(...)`, and onnxruntime must give the same from the new file within the case's own tolerances.
--road graph: through torch instead (`rw.optimize(file, recipe=[])`), which imports only what has a meaning there; refusals are counted, in
its own table, and nodes beside those of the same cases on the road of the file. --road onnxscript: its optimizer, as a peer.
--fresh: 18 models of timm and 12 of transformers with random weights, exported by torch without optimization, compared with torch.
Chunks run in processes of their own (a tool may crash); what was done is in benchmarks/onnx_suite.json and not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).with_suffix(".json")
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")
FRESH_TEXT = ("bert", "roberta", "electra", "bloom", "gpt2", "llama", "phi3", "gemma2", "qwen2")
FRESH_IMAGES = ("vit", "deit", "beit")
CLOSE = 1e-4  # of a fresh model's outputs against torch


# -- the suite's cases --------------------------------------------------------------------------------------------


def cases(names: set[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(kind/name, test case) of all there are, or of those named."""
    from onnx.backend.test.loader import load_model_tests

    for kind in KINDS:
        for case in load_model_tests(kind=kind):
            if names is None or f"{kind}/{case.name}" in names:
                yield f"{kind}/{case.name}", case


def model_and_data(kind: str, case: Any) -> tuple[Any, list[tuple[list[Any], list[Any]]]]:
    """A case's ModelProto and its (inputs, outputs)."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    if kind == "node":
        return case.model, [(list(i), list(o)) for i, o in case.data_sets]
    if kind == "real":
        stem = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / case.name.replace("test_", "light_")
        model = onnx.load(f"{stem}.onnx")
        weights, feeds = {x.name for x in model.graph.initializer}, []
        for i in model.graph.input:
            if i.name not in weights:
                shape = [d.dim_value for d in i.type.tensor_type.shape.dim]
                feeds.append((np.arange(n := int(np.prod(shape))).reshape(shape) / n).astype(np.float32))
        return model, [(feeds, [numpy_helper.to_array(onnx.load_tensor(f"{stem}_output_0.pb"))])]
    model = onnx.load(Path(case.model_dir) / "model.onnx")
    weights = {x.name for x in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    data = []
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        feeds = [_read(folder / f"input_{j}.pb", v) for j, v in enumerate(inputs) if (folder / f"input_{j}.pb").exists()]
        data.append((feeds, [_read(folder / f"output_{j}.pb", v) for j, v in enumerate(model.graph.output)]))
    return model, data


def _read(path: Path, value: Any) -> Any:
    import onnx
    from onnx import numpy_helper

    kind = value.type.WhichOneof("value")
    proto = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}.get(kind, onnx.TensorProto)()
    proto.ParseFromString(path.read_bytes())
    return {"sequence_type": numpy_helper.to_list, "optional_type": numpy_helper.to_optional}.get(kind, numpy_helper.to_array)(proto)


def same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether a result is the one wanted, of the same shape and dtype."""
    import numpy as np

    if isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, rtol, atol) for x, y in zip(a, b))
    if b is None:
        return a is None
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if b.dtype.kind in "OSU":
        return [str(x) for x in a.ravel()] == [str(x) for x in b.ravel()]
    if a.dtype != b.dtype:
        return False
    if b.dtype.kind != "c":
        a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.allclose(a, b, rtol, atol, equal_nan=True))


def gives(content: bytes, data: list[tuple[list[Any], list[Any]]], case: Any) -> bool:
    """Whether onnxruntime gives a case's results from a model."""
    import numpy as np

    from rewright.backends.onnx.agreement import session

    run = session(content)
    names = [i.name for i in run.get_inputs()]
    for feeds, wanted in data:
        got = run.run(None, {n: np.asarray(x) if isinstance(x, np.generic) else x for n, x in zip(names, feeds) if x is not None})
        if len(got) != len(wanted) or not all(same(g, w, case.rtol, case.atol) for g, w in zip(got, wanted)):
            return False
    return True


# -- the tools ----------------------------------------------------------------------------------------------------


def by_file(old: Path, new: Path) -> None:
    """What the table is about."""
    import rewright as rw

    rw.optimize(old, recipe="clean-onnx").export(new)


def by_graph(old: Path, new: Path) -> None:
    """Through torch, checked in onnxruntime by the export."""
    import rewright as rw

    rw.optimize(old, recipe=[], verify=False).export(new)


def by_onnxscript(old: Path, new: Path) -> None:
    """A peer."""
    import onnx
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(old)), new)


TOOLS: dict[str, Callable[[Path, Path], None]] = {"file": by_file, "graph": by_graph, "onnxscript": by_onnxscript}


def judged(name: str, case: Any, tool: Callable[[Path, Path], None], folder: Path) -> dict[str, Any]:
    """One case through a tool."""
    import onnx

    from rewright.ir.errors import InputFileError, RewrightError

    model, data = model_and_data(name.split("/")[0], case)
    old, new = folder / "old.onnx", folder / "new.onnx"
    new.unlink(missing_ok=True)
    old.write_bytes(model.SerializeToString())
    begin, before = time.perf_counter(), len(model.graph.node)
    row: dict[str, Any] = {"before": before}
    try:
        tool(old, new)
    except RewrightError as error:
        kind = "refused" if tool is by_graph and not isinstance(error, InputFileError) else "exception"
        return {**row, "verdict": kind, "said": str(error).replace(str(old), "FILE")[:200], "seconds": time.perf_counter() - begin}
    except Exception as error:
        return {**row, "verdict": "exception", "said": f"{type(error).__name__}: {error}"[:200], "seconds": time.perf_counter() - begin}
    row |= {"seconds": round(time.perf_counter() - begin, 3), "after": len(onnx.load(new).graph.node)}
    try:
        return {**row, "verdict": "same" if gives(new.read_bytes(), data, case) else "wrong"}
    except Exception as error:
        return {**row, "verdict": "invalid", "said": str(error)[:200]}


def qualifying() -> list[str]:
    """Cases whose results onnxruntime gives from the original."""
    found = []
    for name, case in cases():
        try:
            model, data = model_and_data(name.split("/")[0], case)
            if gives(model.SerializeToString(), data, case):
                found.append(name)
        except Exception:  # onnxruntime has no kernel for it
            continue
    return found


# -- fresh models -------------------------------------------------------------------------------------------------


def fresh_names() -> list[str]:
    """18 of timm, 12 of transformers."""
    from rewright.tools.torchvision_stand_in import torchvision_stand_in

    with torchvision_stand_in():
        import timm
    return [*(f"timm/{n}" for n in sorted(timm.list_models("test_*"))), *(f"transformers/{n}" for n in (*FRESH_TEXT, *FRESH_IMAGES))]


def fresh(name: str) -> tuple[Any, dict[str, Any]]:
    """A small model with random weights, and inputs for it."""
    import torch

    torch.manual_seed(0)
    package, _, kind = name.partition("/")
    if package == "timm":
        from rewright.tools.torchvision_stand_in import torchvision_stand_in

        with torchvision_stand_in():
            import timm
        model = timm.create_model(kind, pretrained=False).eval()
        return model, {"x": torch.randn(1, *model.default_cfg["input_size"])}
    from transformers import AutoModel
    from transformers.models.auto import configuration_auto

    made: Any = configuration_auto.CONFIG_MAPPING[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind in FRESH_IMAGES:
        config = {**sizes, "image_size": 32, "patch_size": 8}
        return AutoModel.from_config(made(**config)).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    config = {**sizes, "num_key_value_heads": 2, "vocab_size": 128, "use_cache": False, "max_position_embeddings": 64}
    own: dict[str, dict[str, Any]] = {
        "electra": {**config, "embedding_size": 16},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "use_cache": False},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "use_cache": False},
        **{k: {**config, "pad_token_id": 0, "head_dim": 8} for k in ("llama", "phi3", "gemma2", "qwen2")},
    }
    ids = torch.randint(0, 128, (1, 16))
    return AutoModel.from_config(made(**own.get(kind, config))).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fresh_row(name: str, folder: Path) -> dict[str, Any]:
    """Export, tidy, compare with torch; nodes of onnxscript's optimizer beside ours."""
    import onnx
    import torch
    from torch.utils import _pytree as pytree

    from rewright.backends.onnx.agreement import session
    from rewright.backends.onnx.silence import silent

    model, inputs = fresh(name)
    old, new, peer = folder / "old.onnx", folder / "new.onnx", folder / "peer.onnx"
    with torch.no_grad(), silent():
        wanted = [x for x in pytree.tree_leaves(model(**inputs)) if isinstance(x, torch.Tensor)]
        program = torch.onnx.export(model, kwargs=inputs, dynamo=True, optimize=False, verbose=False)
        assert program is not None
        program.save(old)
    begin = time.perf_counter()
    by_file(old, new)
    seconds = time.perf_counter() - begin
    with silent():
        by_onnxscript(old, peer)
    run = session(new)
    got = run.run(None, {i.name: x.numpy() for i, x in zip(run.get_inputs(), inputs.values())})
    error = max(float((torch.from_numpy(a) - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(got, wanted))
    counts = [len(onnx.load(p).graph.node) for p in (old, new, peer)]
    verdict = "same" if len(got) == len(wanted) and error <= CLOSE else "wrong"
    row = dict(zip(("before", "after", "onnxscript"), counts))
    return {**row, "verdict": verdict, "error": error, "seconds": round(seconds, 2)}


# -- running ------------------------------------------------------------------------------------------------------


def run_chunk(road: str, names: list[str]) -> None:
    """In a process of its own: one line of JSON a case."""
    import logging
    import warnings

    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        if road == "fresh":
            rows: Iterator[tuple[str, Any]] = ((name, fresh_row(name, Path(folder))) for name in names)
        elif road == "qualifying":
            rows = ((name, {}) for name in qualifying())
        else:
            rows = ((name, judged(name, case, TOOLS[road], Path(folder))) for name, case in cases(set(names)))
        for name, row in rows:
            print(json.dumps([name, row]), flush=True)


def in_processes(road: str, names: list[str], chunk: int) -> Iterator[tuple[str, Any]]:
    """Rows as they come. The case at which a process dies is a crash, and the rest of its chunk goes on in the next."""
    todo = list(names)
    while todo:
        part = todo[:chunk]
        command = [sys.executable, __file__, "--chunk-of", road, "--names", json.dumps(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        yield from rows
        todo = [n for n in todo if n not in {r[0] for r in rows}]
        if left := [n for n in part if n in todo]:
            yield left[0], {"verdict": "exception", "said": f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
            todo.remove(left[0])


def text(results: dict[str, Any]) -> str:
    """The tables for people."""
    lines = [str(results["conditions"]), ""]
    for road, rows in results["roads"].items():
        counts = Counter(r["verdict"] for r in rows.values())
        listed = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
        both = [r for r in rows.values() if "after" in r]
        lines.append(f"{road:11s} {len(rows):5d} cases: {listed}")
        lines.append(f"            nodes {sum(r['before'] for r in both)} -> {sum(r['after'] for r in both)}, {sum(r['seconds'] for r in rows.values()):.0f} s")
        if road == "graph" and (own := results["roads"].get("file")):
            alike = [(own[n]["after"], r["after"]) for n, r in rows.items() if "after" in r and "after" in own.get(n, {})]
            lines.append(f"            on the {len(alike)} of both roads: file {sum(a for a, _ in alike)}, graph {sum(b for _, b in alike)} nodes")
        if road == "fresh":
            furthest = max(r["error"] for r in both)
            lines.append(f"            onnxscript's optimizer {sum(r['onnxscript'] for r in both)}; largest error against torch {furthest:.1g}")
            lines += [f"              {n:28s} {r['before']:5d} -> {r['after']:4d}   onnxscript {r['onnxscript']:4d}" for n, r in rows.items() if "after" in r]
        lines += [f"              {n}: {r['verdict']}: {r.get('said', '')}" for n, r in rows.items() if r["verdict"] not in ("same", "refused")]
        refused = Counter(r["said"].split(":")[-1].strip()[:80] for r in rows.values() if r["verdict"] == "refused")
        lines += [f"              refused {n} times: {why}" for why, n in refused.most_common(12)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is asked for and not there yet."""
    from rewright.tools.demo import conditions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--road", choices=tuple(TOOLS), default="file")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--chunk", type=int, default=100)
    parser.add_argument("--chunk-of", help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.chunk_of:
        return run_chunk(given.chunk_of, json.loads(given.names))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"conditions": conditions(), "qualifying": [], "roads": {}}
    if not results["qualifying"]:
        results["qualifying"] = [name for name, _ in in_processes("qualifying", ["all"], 1) if name != "all"]
    road = "fresh" if given.fresh else given.road
    rows = results["roads"].setdefault(road, {})
    names = fresh_names() if given.fresh else results["qualifying"]
    if given.sample:
        names = random.Random(0).sample(names, given.sample)
    begin = time.time()
    for name, row in in_processes(road, [n for n in names if n not in rows], given.chunk if not given.fresh else 5):
        rows[name] = row
        if time.time() - begin > 5:
            begin = time.time()
            RESULTS.write_text(json.dumps(results, indent=0))
    RESULTS.write_text(json.dumps(results, indent=0))
    RESULTS.with_suffix(".txt").write_text(text(results))
    print(text(results))


if __name__ == "__main__":
    main()
