"""`verify` and `bench` over anything that runs: captured models, saved results and plain .onnx files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backends.lower import BACKENDS, lower
from ..backends.onnx.session import Session
from ..backends.target import Target
from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.verify import Drift, compare, example_inputs, padding_mask
from .bench import alternate
from .lowering import canonical
from .models import Flat, Loaded, check_onnx, load_model, named_inputs, random_input

Run = Callable[[Flat], Sequence[Any]]


def runner(spec: str, inputs: str | None, threads: int = 1) -> tuple[Run, Loaded | None]:
    """What runs MODEL, or MODEL@BACKEND, on flat inputs, and the capture behind it (None for an .onnx file)."""
    model, _, backend = spec.rpartition("@")
    if model and backend in BACKENDS:
        loaded = load_model(model, inputs)
        return lower(canonical(loaded.graph), Target.load("cpu"), backend=backend).run, loaded
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
        flats = _onnx_inputs(Path(a), [{"batch": n, "sequence": m} for n, m in ((2, 16), (1, 7), (3, 24))], inputs)
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
        flat = sized_inputs(graph, specs[0], shape, inputs)
        calls = {spec: (lambda run=run, flat=flat: run(flat)) for spec, (run, _) in runs.items()}
        found["shapes"][shape] = {name: t.as_dict() for name, t in alternate(calls, specs[0], rounds).items()}
    return found


def sized_inputs(graph: Graph | None, spec: str, shape: str, inputs: str | None = None) -> Flat:
    """Inputs whose dynamic dims have the sizes of 'AxB', in the order the graph names them. inputs: --inputs, for an .onnx file."""
    sizes = _sizes(shape)
    if graph is None:
        return _onnx_inputs(Path(spec), [dict(zip(("batch", "sequence"), sizes))], inputs)[0]
    chosen = {graph.symbols[name].node.expr: size for name, size in dim_sizes(graph, sizes).items()}
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


def dim_sizes(graph: Graph, shape: str | Sequence[int]) -> dict[str, int]:
    """Sizes of a graph's dynamic dims, from 'AxB' or numbers in its order. Raises UsageError."""
    sizes = _sizes(shape) if isinstance(shape, str) else shape
    if len(sizes) != len(graph.dims):
        said = "x".join(map(str, sizes))
        raise UsageError(f"shape {said!r} has {len(sizes)} sizes; the model's dynamic dims are {', '.join(graph.dims) or 'none'}")
    return dict(zip(graph.dims, sizes))


def _sizes(shape: str) -> list[int]:
    try:
        return [int(s) for s in shape.split("x")]
    except ValueError:
        raise UsageError(f"shape {shape!r} is not like 8x128") from None


_DTYPES = {"float": torch.float32, "float16": torch.float16, "double": torch.float64, "bool": torch.bool}
_DTYPES |= {name: getattr(torch, name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")}


def _onnx_inputs(path: Path, sizes: list[dict[str, int]], inputs: str | None) -> list[Flat]:
    """What was given with --inputs; else made inputs for each set of sizes (once where the file declares them all): first axes are batches."""
    declared, given = Session(path).session.get_inputs(), named_inputs(inputs)
    if given:
        if missing := [value.name for value in declared if value.name not in given]:
            raise UsageError(f"{path} reads {', '.join(missing)}, which --inputs lacks; it has {', '.join(given)}")
        return [tuple(given[value.name] for value in declared)]
    made = []
    for chosen in sizes if any(not isinstance(d, int) for value in declared for d in value.shape) else sizes[:1]:
        names, flat = list(chosen), []
        for value in declared:
            if (kind := _DTYPES.get(value.type.removeprefix("tensor(").removesuffix(")"))) is None:
                raise UsageError(f"{path}: input {value.name} is {value.type}, which can't be filled by itself; give --inputs data.npz")
            shape = [d if isinstance(d, int) else chosen.get(d, chosen[names[min(axis, len(names) - 1)]]) for axis, d in enumerate(value.shape)]
            flat.append(random_input(value.name, shape, kind, torch.Generator().manual_seed(0)))
        made.append(tuple(flat))
    return made
