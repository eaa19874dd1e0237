"""Nodes of a file that we have no meaning of, as regions onnxruntime runs: only tensors cross their edges, and nothing stands inside that need not."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CaptureError
from ..ops.onnx_node import encoded

EMBEDDED = 4096
"""Bytes up to which a weight that a region reads stays inside it, where shape inference sees it; larger ones stay weights of the graph."""

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
"""Operators that draw random numbers: a graph that gives other outputs at every call can't be compared with itself."""

_ONNX = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5, torch.int32: 6, torch.int64: 7,
    torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.uint32: 12, torch.uint64: 13,
}  # fmt: skip
_FROM_ORT = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bool": "bool",
    **{f"{u}int{n}": f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)},
}

_NUMPY = {f"tensor({name})": np.dtype(kind) for name, kind in _FROM_ORT.items()}


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes in order, what they read from outside and what is read of them."""

    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    declared_sizes: tuple[list[Any] | None, ...]
    """What the file says of each output's sizes: a number, "0.1" for axis 1 of input 0, None; or None for all."""
    held: tuple[Any, ...]
    """Small weights that stay inside, as onnx_ir values."""
    opsets: tuple[tuple[str, int], ...]
    ir_version: int

    @property
    def label(self) -> str:
        """'Loop node 'a'' or 'SplitToSequence node 'b' and 2 more'."""
        first = self.nodes[0]
        name = f"{first.op_type} node {first.name!r}" if first.name else f"{first.op_type} node that makes {first.outputs[0].name!r}"
        return name if len(self.nodes) == 1 else f"{name} and {len(self.nodes) - 1} more"

    def declared(self, given: Sequence[Tensor]) -> tuple[str, list[str]]:
        """The region as `onnx_node` takes it for inputs of these (maybe symbolic) sizes: its model, and what its outputs are like.

        Raises CaptureError where onnxruntime does not take it or an output is no tensor torch has.
        """
        import onnx
        import onnx_ir

        names: dict[str, str] = {}  # symbolic size -> input.axis
        graph = onnx.GraphProto(name="region")
        for i, (name, x) in enumerate(zip(self.inputs, given)):
            if x.dtype not in _ONNX:
                raise CaptureError(f"the {self.label} reads {name!r} of {x.dtype}, which can't be handed to onnxruntime")
            sizes = [s if isinstance(s, int) else names.setdefault(str(s), f"{i}.{axis}") for axis, s in enumerate(x.shape)]
            graph.input.append(onnx.helper.make_tensor_value_info(name, _ONNX[x.dtype], sizes))
        graph.node.extend(onnx_ir.serde.serialize_node(n) for n in self.nodes)
        for value in self.held:
            tensor = onnx_ir.serde.serialize_tensor(value.const_value)
            tensor.name = value.name
            graph.initializer.append(tensor)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs)
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)
        ranks = tuple(None if sizes is None else len(sizes) for sizes in self.declared_sizes)
        found = _outputs(model.SerializeToString(), self.label, ranks)
        for value, (kind, sizes) in zip(graph.output, found):
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, _ONNX[getattr(torch, kind)], [s if isinstance(s, int) else None for s in sizes]))
        known, made = set(names.values()), []
        for (kind, sizes), declared in zip(found, self.declared_sizes):
            exact = [
                s if isinstance(s, int) or s in known else declared[i] if declared is not None and i < len(declared) else None for i, s in enumerate(sizes)
            ]
            made.append(" ".join([kind, *("?" if s is None else str(s) for s in exact)]))
        return encoded(model), made


def with_types(model: Any) -> None:
    """Infer types that the file does not give, where some may be of sequences or strings, or of values at a region's edge."""
    import onnx
    import onnx_ir

    untyped = {v.name: v for n in model.graph for v in n.outputs if v.type is None and v.name}
    if not untyped or not any(_may_be_odd(n) for n in model.graph):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), data_prop=True)
    except Exception:  # a file of over 2 GB, or operators with faulty inference: what is not known stays so
        return
    for info in inferred.graph.value_info:
        if (value := untyped.get(info.name)) is not None and info.type.WhichOneof("value"):
            value.type = onnx_ir.serde.deserialize_type_proto_for_type(info.type)
            value.shape = onnx_ir.serde.deserialize_type_proto_for_shape(info.type)


def _may_be_odd(node: Any) -> bool:
    names = ("Sequence", "Optional", "String", "Loop", "If", "Scan", "SplitToSequence", "ConcatFromSequence", "RegexFullMatch", "Tokenizer")
    to = node.attributes.get("to")
    return any(name in node.op_type for name in names) or node.domain not in ("", "ai.onnx") or node.op_type == "Cast" and to is not None and to.value == 8


def regions(model: Any, unknown: Iterable[Any]) -> list[Region]:
    """Regions around the nodes of the main graph that can't be imported. Raises CaptureError if something that is no tensor crosses the file's edge."""
    nodes = list(model.graph)
    place = {node: i for i, node in enumerate(nodes)}
    chosen = {node for node in unknown if node in place} | {n for n in nodes if any(_is_odd(v) for v in (*n.inputs, *n.outputs))}
    if not chosen:
        return []
    for value in (*model.graph.inputs, *model.graph.outputs):
        if _is_odd(value):
            raise CaptureError(f"the {'input' if value in model.graph.inputs else 'output'} {value.name!r} is no tensor that torch has ({value.type})")
    group = {node: i for i, node in enumerate(nodes) if node in chosen}
    for node in nodes:  # what shares a sequence or a string is one region
        for value in (*node.inputs, *_captured(node)):
            maker = None if value is None else value.producer()
            if maker in group and node in group and _is_odd(value):
                old, new = group[maker], group[node]
                group = {n: new if g == old else g for n, g in group.items()}
    groups: dict[int, set[Any]] = {}
    for node, g in group.items():
        groups.setdefault(g, set()).add(node)
    closed = [_closed(members, nodes) for members in groups.values()]
    while overlap := next(((a, b) for a in closed for b in closed if a is not b and a & b), None):
        closed = [c for c in closed if c is not overlap[0] and c is not overlap[1]] + [_closed(overlap[0] | overlap[1], nodes)]
    opsets = tuple(sorted(model.opset_imports.items()))
    return [_region(sorted(members, key=place.__getitem__), opsets, model.ir_version) for members in closed]


def in_order(graph: Any, left: Sequence[Region]) -> list[Any]:
    """The graph's nodes and, in place of theirs, the regions, each behind what it reads."""
    unit_of = {node: region for region in left for node in region.nodes}
    units: list[Any] = list(dict.fromkeys(unit_of.get(node, node) for node in graph))
    if not left:
        return units
    place = {unit: i for i, unit in enumerate(units)}
    needs: list[set[int]] = []
    for i, unit in enumerate(units):
        members: Sequence[Any] = unit.nodes if isinstance(unit, Region) else (unit,)
        makers: set[Any] = {v.producer() for n in members for v in (*n.inputs, *_captured(n)) if v is not None}
        needs.append({place[unit_of.get(m, m)] for m in makers if m is not None and unit_of.get(m, m) in place} - {i})
    readers: list[list[int]] = [[] for _ in units]
    for i, reads in enumerate(needs):
        for j in reads:
            readers[j].append(i)
    waiting = [len(reads) for reads in needs]
    ready = [i for i, n in enumerate(waiting) if n == 0]
    made = []
    while ready:
        made.append(units[i := heapq.heappop(ready)])
        for reader in readers[i]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    return made


def can_run(domain: str, name: str) -> bool:
    """Whether onnxruntime has a kernel for an operator on the CPU, or makes it of others, and it gives the same twice."""
    operator = ("" if domain == "ai.onnx" else domain, name)
    return name not in RANDOM and (operator in _kernels() or _is_function(*operator))


@functools.cache
def _kernels() -> set[tuple[str, str]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[attr-defined]

    return {(k.domain, k.op_name) for k in state.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"}


@functools.cache
def _is_function(domain: str, name: str) -> bool:
    """Whether the standard says of what other operators this one is made."""
    import onnx

    if not onnx.defs.has(name, domain):
        return False
    schema: Any = onnx.defs.get_schema(name, domain)
    return schema.has_function or schema.has_context_dependent_function


def _is_odd(value: Any) -> bool:
    """Whether a value is a sequence, an optional, strings or a sparse tensor."""
    import onnx_ir

    if value is None or value.type is None:
        return False
    return not isinstance(value.type, onnx_ir.TensorType) or value.type.dtype == onnx_ir.DataType.STRING


def _captured(node: Any) -> list[Any]:
    """Values of the outer graph that graphs inside a node read."""
    import onnx_ir

    found, inside, todo = [], set(), [g for a in node.attributes.values() for g in bodies_of(a)]
    while todo:
        graph = todo.pop()
        inside.update(graph.inputs)
        inside.update(graph.initializers.values())
        for inner in graph:
            found += [v for v in inner.inputs if v is not None]
            inside.update(inner.outputs)
            todo += [g for a in inner.attributes.values() for g in bodies_of(a)]
        found += [v for v in graph.outputs if isinstance(v, onnx_ir.Value)]
    return [v for v in dict.fromkeys(found) if v not in inside]


def bodies_of(attribute: Any) -> list[Any]:
    """The graphs an attribute holds."""
    import onnx_ir

    if attribute.is_ref():
        return []
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return [attribute.value]
    return list(attribute.value) if attribute.type == onnx_ir.AttributeType.GRAPHS else []


def _closed(members: set[Any], nodes: list[Any]) -> set[Any]:
    """With all nodes that stand between members: none of them could run before or after the whole."""
    behind: set[Any] = set()
    for node in nodes:
        makers = {v.producer() for v in (*node.inputs, *_captured(node)) if v is not None}
        if makers & (behind | members):
            behind.add(node)
    before: set[Any] = set()
    readers: dict[Any, set[Any]] = {}
    for node in nodes:
        for v in (*node.inputs, *_captured(node)):
            if v is not None and v.producer() is not None:
                readers.setdefault(v.producer(), set()).add(node)
    for node in reversed(nodes):
        if readers.get(node, set()) & (before | members):
            before.add(node)
    return members | (behind & before)


def _region(nodes: list[Any], opsets: tuple[tuple[str, int], ...], ir_version: int) -> Region:
    inside = {v for n in nodes for v in n.outputs}
    read = [v for n in nodes for v in (*n.inputs, *_captured(n)) if v is not None and v not in inside]
    read = list(dict.fromkeys(read))
    held = [v for v in read if v.const_value is not None and v.is_initializer() and not v.is_graph_input() and (v.const_value.nbytes <= EMBEDDED or _is_odd(v))]
    members = set(nodes)
    outer = {v for n in nodes[0].graph if n not in members for v in (*n.inputs, *_captured(n))} if nodes[0].graph is not None else set()
    outputs = [v for n in nodes for v in n.outputs if v.name and (v.is_graph_output() or v in outer)]
    given = [v for v in read if v not in held]
    names: dict[str, str] = {}  # the file's name of a size -> input.axis
    for i, v in enumerate(given):
        for axis, d in enumerate(v.shape or ()):
            if not isinstance(d, int) and d.value is not None:
                names.setdefault(d.value, f"{i}.{axis}")
    sizes = [None if v.shape is None else [d if isinstance(d, int) else names.get(d.value) for d in v.shape] for v in outputs]
    return Region(tuple(nodes), tuple(v.name for v in given), tuple(v.name for v in outputs), tuple(sizes), tuple(held), opsets, ir_version)


@functools.lru_cache(maxsize=256)
def _outputs(model: bytes, label: str, ranks: tuple[int | None, ...]) -> list[tuple[str, tuple[Any, ...]]]:
    """dtype and sizes of each output as onnxruntime infers them. ranks: what the file says of them."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes
        raise CaptureError(f"the {label} can't be imported, and onnxruntime can't run it: {_line(error)}") from error
    found = []
    for value in session.get_outputs():
        kind = _FROM_ORT.get(value.type.removeprefix("tensor(").removesuffix(")"))
        if kind is None:
            raise CaptureError(f"the {label} can't be imported: its output {value.name!r} is {value.type}, which torch has no tensors of")
        found.append((kind, tuple(value.shape)))
    if any(not sizes for _, sizes in found):  # onnxruntime says [] of a single number and of a rank it does not know
        inferred = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model), data_prop=True)
        known = {o.name for o in inferred.graph.output if o.type.tensor_type.HasField("shape")}
        said = [len(sizes) or (0 if o.name in known else rank) for o, (_, sizes), rank in zip(session.get_outputs(), found, ranks)]
        all_said = [rank for rank in said if rank is not None]
        found_ranks = all_said if len(all_said) == len(said) else _ranks(session, label)
        found = [(kind, sizes or ("?",) * rank) for (kind, sizes), rank in zip(found, found_ranks)]
    return found


def _ranks(session: Any, label: str) -> list[int]:
    """Ranks of the outputs, found by a run on ones."""
    feeds = {i.name: np.ones([d if isinstance(d, int) else 2 for d in i.shape], _NUMPY[i.type]) for i in session.get_inputs()}
    try:
        return [a.ndim for a in session.run(None, feeds)]
    except Exception as error:
        raise CaptureError(f"the {label} can't be imported: nothing says what rank its outputs have ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
