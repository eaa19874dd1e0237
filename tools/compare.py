"""`verify` and `bench` over anything that runs: captured models, saved results and plain .onnx files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends.onnx.session import Session
from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.verify import Drift, compare, example_inputs, padding_mask
from .bench import alternate
from .models import Flat, Loaded, check_onnx, load_model, random_input

Run = Callable[[Flat], Sequence[Any]]


def runner(spec: str, inputs: str | None, threads: int = 1) -> tuple[Run, Loaded | None]:
    """What runs MODEL on flat inputs, and the capture behind it (None for an .onnx file)."""
    if spec.endswith(".onnx"):
        check_onnx(Path(spec))
        return Session(Path(spec), threads), None
    loaded = load_model(spec, inputs)
    return loaded.graph.run, loaded


def compare_models(a: str, b: str, inputs: str | None) -> Drift:
    """Drift of `b` from `a` on example inputs, at batch 1 and other sizes."""
    (run_a, loaded_a), (run_b, loaded_b) = runner(a, inputs), runner(b, inputs)
    loaded = loaded_a or loaded_b
    if loaded is None:
        flats = [_onnx_inputs(Path(a), {"batch": n, "sequence": m}) for n, m in ((2, 16), (1, 7), (3, 24))]
    else:
        flats = list(example_inputs(loaded.graph, loaded.inputs[0])) + loaded.inputs[1:3]
    return compare(run_a, run_b, flats) if loaded is None else compare(run_a, run_b, flats, padding_mask(loaded.graph))


def bench_models(specs: list[str], shapes: str, inputs: str | None, threads: int, rounds: int) -> dict[str, Any]:
    """Alternating wall times at each shape; the first model is the reference. Torch models run eagerly."""
    torch.set_num_threads(threads)
    runs = {spec: runner(spec, inputs, threads) for spec in specs}
    graph = next((loaded.graph for _, loaded in runs.values() if loaded is not None), None)
    found: dict[str, Any] = {"reference": specs[0], "threads": threads, "shapes": {}}
    for shape in shapes.split(","):
        flat = sized_inputs(graph, specs[0], shape)
        calls = {spec: (lambda run=run, flat=flat: run(flat)) for spec, (run, _) in runs.items()}
        found["shapes"][shape] = {name: t.as_dict() for name, t in alternate(calls, specs[0], rounds).items()}
    return found


def sized_inputs(graph: Graph | None, spec: str, shape: str) -> Flat:
    """Inputs whose dynamic dims have the sizes of 'AxB', in the order the graph names them."""
    try:
        sizes = [int(s) for s in shape.split("x")]
    except ValueError:
        raise UsageError(f"shape {shape!r} is not like 8x128") from None
    if graph is None:
        return _onnx_inputs(Path(spec), dict(zip(("batch", "sequence"), sizes)))
    if len(sizes) != len(graph.dims):
        raise UsageError(f"shape {shape!r} has {len(sizes)} sizes; the model's dynamic dims are {', '.join(graph.dims) or 'none'}")
    chosen = {graph.symbols[name].node.expr: size for name, size in zip(graph.dims, sizes)}
    made = []
    for node in graph.inputs:
        value = node.meta["val"]
        made.append(
            random_input(
                str(node.target),
                [chosen[s.node.expr] if isinstance(s, torch.SymInt) else int(s) for s in value.shape],
                value.dtype,
                torch.Generator().manual_seed(0),
            )
        )
    return tuple(made)


def _onnx_inputs(path: Path, sizes: dict[str, int]) -> Flat:
    import onnxruntime

    dtypes = {
        "tensor(float)": torch.float32,
        "tensor(int64)": torch.int64,
        "tensor(int32)": torch.int32,
        "tensor(bool)": torch.bool,
        "tensor(float16)": torch.float16,
    }
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    made = []
    for value in session.get_inputs():
        if value.type not in dtypes:
            raise UsageError(f"{path}: input {value.name} is {value.type}, which can't be filled by itself; give --inputs data.npz")
        names = list(sizes)
        shape = [d if isinstance(d, int) else sizes.get(d, sizes[names[min(i, len(names) - 1)]]) for i, d in enumerate(value.shape)]
        made.append(random_input(value.name, shape, dtypes[value.type], torch.Generator().manual_seed(0)))
    return tuple(made)
