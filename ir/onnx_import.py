"""An ONNX file -> Graph: a module that runs the file's nodes with one torch function each, captured like any other module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .capture import capture
from .errors import CaptureError
from .graph import Graph, Source
from .onnx.inputs import dynamic_shapes as dynamic_shapes_of
from .onnx.inputs import example_inputs
from .onnx.model import OnnxFile, read_onnx
from .onnx.module import NeedsData, OnnxModule
from .onnx.older import brought_to

FIRST_OPSET = 7
"""Oldest version of the standard domain that is imported; files of older ones are brought to it."""
MOST_LEFT = 8
"""Nodes that are left to onnxruntime because they need numbers that only running the model would tell; each is found by a capture of its own."""


def import_onnx(path: Path | str, args: tuple | Tensor = (), kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Mapping[str, Any] | None = None) -> Graph:
    """Read an ONNX file as a Graph: its inputs are arguments by name, its outputs a dict, weights keep their names, dynamic dims theirs.

    args, kwargs: example inputs; by default zeros, of sizes chosen for the dynamic dims.
    dynamic_shapes: as in `capture`; by default what the file declares.
    Operators without a meaning in torch stay what they are (ir.ops.onnx_node), and the notes say so.
    Raises InputFileError for a file that can't be read, CaptureError for operators that onnxruntime can't run either, all of them named.
    """
    path = Path(path)
    file = read_onnx(path)
    version = file.model.opset_imports.get("", file.model.opset_imports.get("ai.onnx"))
    if version is not None and version < FIRST_OPSET:
        file = brought_to(FIRST_OPSET, file, version)
    args = args if isinstance(args, tuple) else (args,)
    left: set[str] = set()
    while True:
        module = OnnxModule(file.model, path.name, left)
        if not module.inputs:
            raise CaptureError(f"{path.name} has no inputs: it always gives the same outputs, and there is nothing to capture")
        dynamic = dynamic_shapes_of(module.inputs) if dynamic_shapes is None else dynamic_shapes
        try:
            graph = capture(module, args, kwargs, dynamic) if args or kwargs else _capture_with_examples(module, dynamic)
            break
        except NeedsData as error:
            if error.value in left or len(left) == MOST_LEFT:
                raise
            left.add(error.value)
    graph.source = _source(file, module, version)
    graph.notes += [*file.remarks, *module.notes]
    graph.notes += [f"the file's input {i.original!r} is called {i.name!r} here" for i in module.inputs.values() if i.original != i.name]
    moved = [(old, new) for old, new in module.places.items() if old != new and old in module.given and graph.has_weight(new)]
    if moved:
        more = f" ({len(moved) - 1} more were renamed for Python)" if len(moved) > 1 else ""
        graph.notes.append(f"the file's weight {moved[0][0]!r} is called {moved[0][1]!r} here{more}")
    return graph


def _source(file: OnnxFile, module: OnnxModule, opset: int | None) -> Source:
    """What a file written of the graph keeps of this one."""
    made_by = " ".join(filter(None, (file.model.producer_name, file.model.producer_version)))
    return Source(
        {i.name: i.original for i in module.inputs.values()},
        tuple(module.outputs),
        {place: name for name, place in module.places.items() if name in module.given},
        opset if opset is not None else FIRST_OPSET,
        {**file.model.metadata_props, **({"rewright.made_of": made_by} if made_by else {})},
        len(file.digests) > 1,
    )


def _capture_with_examples(module: OnnxModule, dynamic: Mapping[str, Any]) -> Graph:
    apart, alike = example_inputs(module.inputs), example_inputs(module.inputs, apart=False)
    try:
        return capture(module, (), apart, dynamic)
    except CaptureError:
        if all(a.shape == b.shape for a, b in zip(apart.values(), alike.values())):
            raise
        return capture(module, (), alike, dynamic)  # two names of the file stand for one size
