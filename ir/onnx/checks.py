"""Is a parsed ONNX file sound and safe? Every tensor inside its folder and as long as declared, nodes in order, names defined once, types that fit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputFileError

OPSETS = range(1, 27)
"""Versions of the standard domain there are; the importer reads those from 7 on."""

MOST_NODES = 1_000_000
LARGEST_TENSOR = 2**40  # bytes a tensor may declare
EXTERNAL_KEYS = {"location", "offset", "length", "checksum", "basepath"}

# bits a value, by ONNX's number of the dtype; strings have none
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8}
BITS |= {21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
STRING = 8
BULK = 4096
"""Bytes from which on a weight's data is left out of what onnx's checker is given."""


def check(path: Path, model: Any, known: set[tuple[str, str]]) -> list[str]:
    """Check a ModelProto and put its nodes in order. known: operators (domain, name) outside the standard that we read.

    Returns remarks a user should see. Raises InputFileError, in one sentence, for a file that is unsound, unsafe or newer than we know.
    """
    import onnx

    if not model.HasField("graph") or not model.graph.output:
        raise InputFileError(f"{path} is not an ONNX model: it has no graph with outputs")
    if not 1 <= model.ir_version <= onnx.IR_VERSION:
        raise InputFileError(f"{path} has the IR version {model.ir_version or 'missing'}; rewright reads 1 to {onnx.IR_VERSION}")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            raise InputFileError(f"{path} is of opset {opset.version}; rewright reads {OPSETS.start} to {OPSETS.stop - 1}")
    _check_functions(path, model)
    all_graphs = list(graphs(model))
    nodes = sum(len(g.node) for g in all_graphs)
    if nodes > MOST_NODES:
        raise InputFileError(f"{path} has {nodes} nodes; rewright reads {MOST_NODES}")
    for graph in all_graphs:
        for what, tensor in tensors(graph):
            _check_tensor(path, what, tensor)
    for value in (*model.graph.input, *model.graph.output):
        for d in value.type.tensor_type.shape.dim:
            if d.HasField("dim_value") and not 0 <= d.dim_value <= LARGEST_TENSOR:
                raise InputFileError(f"{path}: {value.name!r} is declared with a dimension of {d.dim_value}")
    remarks = [r for r in (_sort(path, graph) for graph in all_graphs if not hasattr(graph, "opset_import")) if r]
    _ask_the_checker(path, model, known)
    return remarks


def external_files(path: Path, model: Any) -> list[Path]:
    """The files beside the model that its tensors lie in."""
    places = {e.value for g in graphs(model) for _, t in tensors(g) if t.data_location == 1 for e in t.external_data if e.key == "location"}
    return [path.resolve().parent / place for place in sorted(places)]


def graphs(model: Any) -> Iterator[Any]:
    """The main graph, all functions, and the graphs inside nodes, without recursion."""
    todo: list[Any] = [model.graph, *model.functions]
    while todo:
        graph = todo.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    todo.append(attribute.g)
                todo.extend(attribute.graphs)


def tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """(what it is, TensorProto) of all that a graph or function holds itself."""
    for tensor in getattr(graph, "initializer", ()):
        yield f"the weight {tensor.name!r}", tensor
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield f"the weight {sparse.values.name!r}", sparse.values
        yield f"the places of {sparse.values.name!r}", sparse.indices
    for node in graph.node:
        for a in node.attribute:
            what = f"{a.name} of the {node.op_type} node {node.name!r}"
            for tensor in (*((a.t,) if a.HasField("t") else ()), *a.tensors):
                yield what, tensor
            for sparse in (*((a.sparse_tensor,) if a.HasField("sparse_tensor") else ()), *a.sparse_tensors):
                yield what, sparse.values
                yield what, sparse.indices


def _check_tensor(path: Path, what: str, tensor: Any) -> None:
    if tensor.data_type != STRING and tensor.data_type not in BITS:
        raise InputFileError(f"{path}: {what} is of the unknown type {tensor.data_type}")
    if any(d < 0 for d in tensor.dims):
        raise InputFileError(f"{path}: {what} is declared with a negative dimension, {list(tensor.dims)}")
    if tensor.data_type == STRING:
        return
    needed = (math.prod(tensor.dims) * BITS[tensor.data_type] + 7) // 8
    if needed > LARGEST_TENSOR:
        raise InputFileError(f"{path}: {what} is declared as {list(tensor.dims)}, {needed} bytes; rewright reads {LARGEST_TENSOR}")
    if tensor.data_location == 1:
        return _check_external(path, what, tensor, needed)
    if tensor.raw_data and len(tensor.raw_data) != needed:
        raise InputFileError(f"{path}: {what} is declared as {list(tensor.dims)}, {needed} bytes, and holds {len(tensor.raw_data)}")
    held = sum(len(x) for x in (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data))
    if needed and not tensor.raw_data and not held:
        raise InputFileError(f"{path}: {what} is declared as {list(tensor.dims)} and holds no data")


def _check_external(path: Path, what: str, tensor: Any, needed: int) -> None:
    """Resolve, contain, refuse links, and bound by the real file's size."""
    entries = {e.key: e.value for e in tensor.external_data}
    place, folder = entries.get("location", ""), path.resolve().parent
    said = f"{path}: {what} lies in {place!r}"
    if unknown := sorted(set(entries) - EXTERNAL_KEYS):
        raise InputFileError(f"{said} with the unknown key {unknown[0]!r}; ONNX knows {', '.join(sorted(EXTERNAL_KEYS))}")
    parts = place.replace("\\", "/").split("/")
    if "\0" in place or not place or place.startswith(("/", "\\")) or ".." in parts or (len(place) > 1 and place[1] == ":"):
        raise InputFileError(f"{said}, which leaves the model's folder; the file is unsafe")
    step = folder
    for part in place.split("/"):
        step = step / part
        if step.is_symlink():
            raise InputFileError(f"{said}, which goes through a symbolic link; copy the data beside the model")
    if not step.is_file():
        raise InputFileError(f"{said}, which is missing; it belongs beside the model")
    state = os.stat(step)
    if state.st_nlink > 1:
        raise InputFileError(f"{said}, which is a hard link to another file; copy the data beside the model")
    numbers = {key: entries.get(key, str(default)) for key, default in (("offset", 0), ("length", needed))}
    for key, text in numbers.items():
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise InputFileError(f"{said} with the {key} {text!r}; expected a number of bytes")
    offset, length = int(numbers["offset"]), int(numbers["length"])
    if offset + max(length, needed) > state.st_size:
        raise InputFileError(f"{said} at bytes {offset} to {offset + max(length, needed)}; that file has {state.st_size}")


def _check_functions(path: Path, model: Any) -> None:
    """No function may contain itself."""
    calls = {}
    for f in model.functions:
        inner, todo = set(), [f]
        while todo:
            for node in todo.pop().node:
                inner.add((node.domain, node.op_type, node.overload))
                todo.extend(a.g for a in node.attribute if a.HasField("g"))
        calls[f.domain, f.name, f.overload] = inner
    left = {key: {c for c in inner if c in calls} for key, inner in calls.items()}
    while free := [key for key, inner in left.items() if not inner & left.keys()]:
        for key in free:
            del left[key]
    if left:
        raise InputFileError(f"{path}: the function {min(left)[1]!r} contains itself")


def _sort(path: Path, graph: Any) -> str | None:
    """Put nodes behind what they read, keeping their order otherwise. A remark if they were not."""
    made_at = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reads = [{made_at[name] for name in _read(node) if name in made_at} for node in graph.node]
    if all(j < i for i, needs in enumerate(reads) for j in needs):
        return None
    import heapq

    waiting = [len(needs) for needs in reads]
    readers: list[list[int]] = [[] for _ in reads]
    for i, needs in enumerate(reads):
        for j in needs:
            readers[j].append(i)
    ready = [i for i, n in enumerate(waiting) if n == 0]
    order = []
    while ready:
        order.append(i := heapq.heappop(ready))
        for reader in readers[i]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(reads):
        stuck = graph.node[next(i for i, n in enumerate(waiting) if n)]
        raise InputFileError(f"{path} is not a sound ONNX model: the {stuck.op_type} node that makes {stuck.output[0]!r} needs its own output (a cycle)")
    nodes = [graph.node[i] for i in order]
    copies = [type(n)() for n in nodes]
    for copy, node in zip(copies, nodes):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
    return "the file's nodes stood out of order; they were sorted"


def _read(node: Any) -> set[str]:
    """What a node reads, in the graphs inside it too."""
    names, todo = set(), [node]
    while todo:
        one = todo.pop()
        names.update(one.input)
        for a in one.attribute:
            for graph in (*((a.g,) if a.HasField("g") else ()), *a.graphs):
                todo.extend(graph.node)
                names.update(o.name for o in graph.output)
    return names


def _ask_the_checker(path: Path, model: Any, known: set[tuple[str, str]]) -> None:
    """onnx's own checks: names defined once and before use, operators and attributes that exist, shapes that don't contradict each other."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(_without_weights(model))
    inputs = {i.name for i in copy.graph.input}
    for tensor in model.graph.initializer:
        if (tensor.data_location == 1 or len(tensor.raw_data) > BULK) and tensor.name not in inputs:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        elif tensor.data_location != 1 and len(tensor.raw_data) <= BULK:
            copy.graph.initializer.append(tensor)
    for graph in graphs(copy):
        for node in graph.node:
            if node.domain in ("", "ai.onnx") and ("", node.op_type) in known and not onnx.defs.has(node.op_type):
                node.domain = "com.microsoft"
            for a in node.attribute:  # contained already; the checker would look for the files in the working directory
                if a.HasField("t") and a.t.data_location == 1:
                    a.t.CopyFrom(onnx.TensorProto(name=a.t.name, data_type=a.t.data_type, dims=[0]))
    if not any(o.domain == "com.microsoft" for o in copy.opset_import):
        copy.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    try:
        onnx.checker.check_model(copy)
    except Exception as error:  # ValidationError, and what pybind makes of others
        raise InputFileError(f"{path} is not a sound ONNX model: {_said(error)}") from error
    try:
        onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
    except Exception as error:  # InferenceError; its own functions' bodies have such errors too, so onnxruntime has the last word
        if not _loads(path):
            raise InputFileError(f"{path} is not a sound ONNX model: {_said(error)}") from error


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0])[:300]


def _loads(path: Path) -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises its own classes
        return False
    return True


def _without_weights(model: Any) -> Any:
    """The same model without initialisers: their data may be gigabytes."""
    import onnx

    copy = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        if model.HasField(name):
            setattr(copy, name, getattr(model, name))
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.graph.name = model.graph.name or "graph"
    for name in ("node", "input", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        getattr(copy.graph, name).extend(getattr(model.graph, name))
    return copy
