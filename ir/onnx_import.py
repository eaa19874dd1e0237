"""An ONNX file -> Graph: a module that runs the file's nodes with one torch function each, captured like any other module."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .capture import capture
from .errors import CaptureError, InputFileError, RewrightError
from .graph import Graph, Source
from .onnx import spellings, table
from .onnx.checks import OPSETS
from .onnx.model import OnnxFile, read_onnx, torch_dtype, torch_tensor
from .onnx.opaque import Region, bodies_of, can_run, in_order, regions, with_types
from .onnx.values import BY_PLACE, ELEMENTWISE, LARGEST, Known, NeedsValue, Value

FIRST_OPSET = 7
"""Oldest version of the standard domain that is imported."""

DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
NIBBLES = (21, 22)
"""UINT4 and INT4 as ONNX numbers them: weights of them are read a code a byte, and only DequantizeLinear may read those."""
MOST_LEFT = 8
"""Nodes that are left to onnxruntime because they need numbers that only running the model would tell; each is found by a capture of its own."""

NEVER_AHEAD = ("Shape", "Size")
"""What is known without its input's values."""


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
        raise CaptureError(f"{path} is of opset {version}; rewright imports {FIRST_OPSET} to {OPSETS.stop - 1} (onnx.version_converter moves a file)")
    args = args if isinstance(args, tuple) else (args,)
    left: set[str] = set()
    while True:
        module = OnnxModule(file.model, path.name, left)
        if not module.inputs:
            raise CaptureError(f"{path.name} has no inputs: it always gives the same outputs, and there is nothing to capture")
        dynamic = module.dynamic_shapes() if dynamic_shapes is None else dynamic_shapes
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
    apart, alike = module.example_inputs(), module.example_inputs(apart=False)
    try:
        return capture(module, (), apart, dynamic)
    except CaptureError:
        if all(a.shape == b.shape for a, b in zip(apart.values(), alike.values())):
            raise
        return capture(module, (), alike, dynamic)  # two names of the file stand for one size


@dataclass(frozen=True)
class Input:
    """One input of the file."""

    name: str  # a legal Python name
    original: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """One node of the file, ready to run."""

    op: table.Op
    label: str
    """As in "MatMul node 'encoder/q'", for messages."""
    inputs: tuple[str | None, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[str | None, ...]


class NeedsData(CaptureError):
    """A node that wants as a number what only running the model would tell. value: the name of its first output."""

    def __init__(self, message: str, value: str) -> None:
        super().__init__(message)
        self.value = value


@dataclass(frozen=True)
class Opaque:
    """Nodes that onnxruntime runs."""

    region: Region
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]


@dataclass(frozen=True)
class Branch:
    """An If node: which body runs is known while tracing."""

    label: str
    condition: str
    bodies: tuple[tuple[list[Any], tuple[str, ...]], tuple[list[Any], tuple[str, ...]]]
    outputs: tuple[str | None, ...]


@dataclass
class _Unknown:
    """Operators we can't import, with how often they occur."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class OnnxModule(nn.Module):
    """Runs an onnx_ir.Model in torch. Parameters and buffers are the file's initialisers, by their names made legal."""

    def __init__(self, model: Any, name: str = "model.onnx", left: Collection[str] = ()) -> None:
        """left: first outputs of nodes that are left to onnxruntime though we know them."""
        super().__init__()
        self.left, self.embeds = left, False
        self.file = name
        self.notes: list[str] = []
        self.places: dict[str, str] = {}  # value name -> parameter or buffer
        self.given = {v.name for v in model.graph.initializers.values()}  # the rest of the places hold Constant nodes
        self.constants: dict[str, Known] = {}
        self.opsets = dict(model.opset_imports)
        with_types(model)
        self._add_inputs(model)
        self.outputs = {v.name: torch_dtype(v.dtype, f"the output {v.name!r}") if v.dtype is not None else None for v in model.graph.outputs}
        unknown = _Unknown()
        self.steps = self._steps(model.graph, unknown, self._regions(model))
        if unknown.counts:
            listed = ", ".join(f"{what} ({count} node{'s' if count > 1 else ''})" for what, count in sorted(unknown.counts.items()))
            raise CaptureError(f"{name} uses operators rewright can't import: {listed}")
        self._sign()
        self.eval()

    # -- what the file declares -------------------------------------------------------------------------------------

    def _add_inputs(self, model: Any) -> None:
        self.inputs: dict[str, Input] = {}
        for value in model.graph.inputs:
            if value.name in model.graph.initializers:
                continue  # before IR 4 weights are inputs with a default
            what = f"the input {value.name!r}"
            if value.dtype is not None and int(value.dtype) in NIBBLES:
                raise InputFileError(f"{self.file}: {what} is of 4-bit integers, which torch has no tensors of")
            if value.dtype is None or value.shape is None:
                raise InputFileError(f"{self.file}: {what} has no {'type' if value.dtype is None else 'shape'}; rewright reads tensors of known rank")
            new = legal(value.name, set(self.inputs), dots=False)
            shape = tuple(d if isinstance(d, int) else str(d.value) if d.value else f"{new}_{axis}" for axis, d in enumerate(value.shape))
            self.inputs[new] = Input(new, value.name, torch_dtype(value.dtype, what), shape)
        self._name_batch()

    def _add_weights(self, graph: Any) -> None:
        for value in graph.initializers.values():
            if value.const_value is None:
                raise InputFileError(f"{self.file}: the weight {value.name!r} has no data")
            self._add_weight(value.name, torch_tensor(value.const_value, f"the weight {value.name!r}"))

    def _add_weight(self, name: str, tensor: Tensor) -> None:
        place = self._free_place(name)
        owner, _, leaf = place.rpartition(".")
        module: nn.Module = self
        for part in filter(None, owner.split(".")):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            module.register_parameter(leaf, nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
        self.places[name] = place
        single = tensor.numel() == 1 and tensor.dim() <= 1
        if (
            tensor.numel() <= LARGEST
            and tensor.dtype.itemsize > 1 - single
            and (not tensor.is_floating_point() or tensor.numel() <= 8)
            and not tensor.is_complex()
        ):
            self.constants[name] = Known.from_tensor(tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor, name)

    def _free_place(self, name: str) -> str:
        wanted = legal(name, set(), dots=True)
        taken = set(self.places.values())
        candidate, n = wanted, 1
        while candidate in taken or not self._fits(candidate):
            candidate, n = f"{wanted.replace('.', '_')}_{n}", n + 1
        return candidate

    def _fits(self, place: str) -> bool:
        module: nn.Module = self
        *owner, leaf = place.split(".")
        for part in owner:
            if part in module._modules:
                module = module._modules[part]  # type: ignore[assignment]
            elif hasattr(module, part):
                return False
            else:
                return not hasattr(nn.Module(), leaf)
        return not hasattr(module, leaf) and not (
            module is self and leaf in ("file", "steps", "inputs", "outputs", "places", "constants", "given", "notes", "opsets", "left", "embeds")
        )

    def _regions(self, model: Any) -> list[Region]:
        """What is left to onnxruntime, and a note that says so."""
        model.graph.sort()
        found = regions(model, [n for n in model.graph if self._is_opaque(n)])
        if found:
            counts = Counter(n.op_type for region in found for n in region.nodes)
            listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(6))
            self.notes.append(f"{sum(counts.values())} nodes stay as they are and run in onnxruntime, which no pass looks into: {listed}")
        return found

    def _is_opaque(self, node: Any) -> bool:
        """Whether a node, or one in a graph inside it, has no meaning in torch but a kernel in onnxruntime."""
        if any(v.name in self.left for v in node.outputs):
            return True
        domain = "" if node.domain == "ai.onnx" else node.domain
        bodies = [g for a in node.attributes.values() for g in bodies_of(a)]
        if domain == "" and node.op_type == "If":
            return any(self._is_opaque(inner) for body in bodies for inner in body)
        if domain == "" and node.op_type == "Constant":
            return False
        known = table.find(domain, node.op_type, self._version(domain)) is not None and not bodies
        return not known and can_run(domain, node.op_type)

    def _version(self, domain: str) -> int:
        return self.opsets.get(domain, self.opsets.get("ai.onnx", 1) if not domain else 1)

    def _steps(self, graph: Any, unknown: _Unknown, left: Sequence[Region] = ()) -> list[Any]:
        self._add_weights(graph)
        graph.sort()
        steps = [
            Opaque(unit, unit.label, unit.inputs, unit.outputs) if isinstance(unit, Region) else self._step(unit, unknown) for unit in in_order(graph, left)
        ]
        return [step for step in steps if step is not None]

    def _step(self, node: Any, unknown: _Unknown) -> Step | Branch | None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        label = f"{node.op_type} node {node.name!r}" if node.name else f"{node.op_type} node that makes {node.outputs[0].name!r}"
        inputs = tuple(None if v is None else v.name for v in node.inputs)
        outputs = tuple(v.name or None for v in node.outputs)
        if domain == "" and node.op_type == "Constant":
            self._constant(node, label)
            return None
        if domain == "" and node.op_type == "If":
            branches = [node.attributes[name].value for name in ("then_branch", "else_branch")]
            bodies = tuple((self._steps(body, unknown), tuple(v.name for v in body.outputs)) for body in branches)
            return Branch(label, str(inputs[0]), bodies, outputs)  # type: ignore[arg-type]
        version = self._version(domain)
        op = table.find(domain, node.op_type, version)
        if op is None:
            unknown.add(f"{node.op_type} of {domain or 'ai.onnx'} {version}")
            return None
        if op.name != "DequantizeLinear" and (
            found := next((v.name for v in node.inputs if v is not None and v.dtype is not None and int(v.dtype) in NIBBLES), None)
        ):
            raise CaptureError(f"{self.file}: the {label} reads the 4-bit integers {found!r}; only DequantizeLinear can")
        attributes = {name: self._attribute(name, attribute, label) for name, attribute in node.attributes.items()}
        if strange := [name for name in attributes if not _takes(op.function, name)]:
            raise CaptureError(f"{self.file}: the {label} has the attribute {', '.join(strange)}, which rewright does not know")
        if op.outputs:
            attributes["outputs"] = len(outputs)
        if (softmax := spellings.safe_softmax(node)) is not None and version >= 13:
            axis = softmax.attributes["axis"].value if "axis" in softmax.attributes else -1
            return Step(spellings.SAFE_SOFTMAX, label, (softmax.inputs[0].name,), {"axis": axis}, outputs)
        self._note_embedding(node)
        if (layer := spellings.quantized_linear(node)) is not None:
            return Step(layer[0], label, layer[1], {}, outputs)
        if (source := spellings.before_merged_transpose(node)) is not None:
            return Step(spellings.TRANSPOSED_HEADS, label, (source.name, *inputs), {}, outputs)
        return Step(op, label, inputs, attributes, outputs)

    def _note_embedding(self, node: Any) -> None:
        """Where indices that are computed choose rows of a weight, ONNX counts negative ones from the end and an embedding refuses them."""
        table_, indices = (*node.inputs, None, None)[:2]
        if node.op_type != "Gather" or table_ is None or not table_.is_initializer() or table_.const_value is None or len(table_.const_value.shape) != 2:
            return
        if indices is not None and not indices.is_initializer() and table_.const_value.dtype.is_floating_point() and not self.embeds:
            self.embeds = True
            self.notes.append(f"rows of {table_.name!r} are chosen as by an embedding: negative indices, which ONNX counts from the end, are refused")

    def _constant(self, node: Any, label: str) -> None:
        import onnx_ir

        (kind, attribute), *_ = node.attributes.items()
        name = node.outputs[0].name
        if kind == "value":
            tensor = torch_tensor(attribute.value, f"the {label}")
        elif kind in ("value_int", "value_ints"):
            tensor = torch.tensor(attribute.value, dtype=torch.int64)
        elif kind in ("value_float", "value_floats"):
            tensor = torch.tensor(attribute.value, dtype=torch.float32)
        else:
            raise CaptureError(f"{self.file}: the {label} holds {onnx_ir.AttributeType(attribute.type).name.lower()}s, which torch has no tensors of")
        self._add_weight(name, tensor)

    def _attribute(self, name: str, attribute: Any, label: str) -> Any:
        import onnx_ir

        kinds = onnx_ir.AttributeType
        if attribute.type in (kinds.GRAPH, kinds.GRAPHS):
            raise CaptureError(f"{self.file}: the {label} holds a graph, which rewright can't import")
        if attribute.type == kinds.TENSOR:
            return torch_tensor(attribute.value, f"{name} of the {label}")
        if name in DTYPE_ATTRIBUTES:
            if attribute.value in NIBBLES:
                raise CaptureError(f"{self.file}: the {label} makes 4-bit integers, which torch has no tensors of")
            return torch_dtype(attribute.value, f"the {label}") if attribute.value else None
        if attribute.type == kinds.FLOAT:
            return _shortest(attribute.value)
        if attribute.type == kinds.FLOATS:
            return [_shortest(v) for v in attribute.value]
        return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value

    # -- the call ---------------------------------------------------------------------------------------------------

    def _sign(self) -> None:
        """forward takes the file's inputs by name, in its order."""

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return self.run({**dict(zip(self.inputs, args)), **kwargs})

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.inputs]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def dynamic_shapes(self) -> dict[str, dict[int, str]]:
        """Input -> axis -> the file's name of its dynamic size."""
        return {i.name: {axis: d for axis, d in enumerate(i.shape) if isinstance(d, str)} for i in self.inputs.values()}

    def _name_batch(self) -> None:
        """First axes that an exporter gave numbers for names (s72, s43) are the batch: one size, and the notes say so."""
        first = next((str(i.shape[0]) for i in self.inputs.values() if i.shape and _is_anonymous(i.shape[0])), None)
        for name, i in self.inputs.items():
            if first is not None and i.shape and i.shape[0] != first and _is_anonymous(i.shape[0]):
                self.notes.append(f"{name} axis 0 ({i.shape[0]}) is taken to be as long as {first}: neither has a name of its own")
                self.inputs[name] = Input(name, i.original, i.dtype, (first, *i.shape[1:]))

    def example_inputs(self, apart: bool = True) -> dict[str, Tensor]:
        """Zeros of the declared shapes; sizes like 'past + 1' follow from their parts.

        apart: every named dynamic dim gets a size of its own, so that nothing finds two equal by chance. Dims without a name of
        their own (an exporter's s72, unk__3) have one size an axis: most often they must be equal, and the trace says which.
        """
        sizes: dict[str, int] = {}
        for axis_names in self.dynamic_shapes().values():
            for axis, name in axis_names.items():
                if name in sizes or not name.isidentifier():
                    continue
                start = 2 if axis == 0 or "batch" in name.lower() else 16
                sizes[name] = start
                if apart and not _is_anonymous(name) and name not in (f"{i}_{axis}" for i in self.inputs):
                    taken = set(sizes.values()) - {start} if list(sizes.values()).count(start) == 1 else set(sizes.values())
                    sizes[name] = next(n for n in range(start, 10**6, 1 if start == 2 else 8) if n not in taken)
        made = {}
        for i in self.inputs.values():
            shape = [d if isinstance(d, int) else _size_of(d, sizes) for d in i.shape]
            made[i.name] = torch.zeros(shape, dtype=i.dtype)
        return made

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's outputs by name."""
        env: dict[str, Value | None] = dict(self.constants)
        env.update({i.original: given[i.name] for i in self.inputs.values()})
        self._run(self.steps, env)
        return {name: self._tensor(self._value(name, env)) for name in self.outputs}

    def _run(self, steps: list[Any], env: dict[str, Value | None]) -> None:
        for step in steps:
            if isinstance(step, Opaque):
                found: Any = self._left(step, env)
            elif isinstance(step, Branch):
                steps_of, names = step.bodies[0 if self._condition(step, env) else 1]
                self._run(steps_of, env)
                found = tuple(self._value(name, env) for name in names)
            else:
                found = self._call(step, env)
            env.update((name, value) for name, value in zip(step.outputs, found) if name is not None)

    def _condition(self, step: Branch, env: Mapping[str, Value | None]) -> bool:
        condition = self._value(step.condition, env)
        if not isinstance(condition, Known):
            raise NeedsData(f"{self.file}: the condition of the {step.label} is computed from data", str(step.outputs[0]))
        return bool(condition.scalar())

    def _value(self, name: str | None, env: Mapping[str, Value | None]) -> Any:
        if name is None:
            return None
        if name in env:
            return env[name]
        return operator.attrgetter(self.places[name])(self)

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, Known):
            return operator.attrgetter(self.places[value.weight])(self) if value.weight is not None else value.tensor()
        return value

    def _left(self, step: Opaque, env: Mapping[str, Value | None]) -> list[Tensor]:
        inputs = [self._tensor(self._value(name, env)) for name in step.inputs]
        try:
            model, outputs = step.region.declared(inputs)
        except CaptureError as error:
            raise CaptureError(f"{self.file}: {error}") from error
        return torch.ops.rewright.onnx_node(inputs, model, outputs)

    def _call(self, step: Step, env: Mapping[str, Value | None]) -> tuple[Any, ...]:
        inputs = [self._value(name, env) for name in step.inputs]
        present = [v for v in inputs if v is not None]
        try:
            if all(isinstance(v, Known) for v in present) and step.op.name not in NEVER_AHEAD:
                if all(v.concrete for v in present):
                    if (not step.op.grows or _stays_small(step.op, inputs)) and (ahead := _ahead(step, inputs)) is not None:
                        return ahead
                elif step.op.name in ELEMENTWISE or step.op.name in BY_PLACE and all(v.concrete for v in present[1:]):
                    return ((ELEMENTWISE | BY_PLACE)[step.op.name](*inputs, **step.attributes),)
            made = _run_op(step, arguments(step, inputs, self._tensor))
        except NeedsValue as why:
            raise self._refusal(step, f"can't be imported: {why}") from why
        except RewrightError:
            raise
        except Exception as error:
            if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
                raise self._refusal(step, "needs a number that only running the model would tell") from error
            shapes = ", ".join(str(list(v.shape)) if v is not None else "none" for v in inputs)
            first = next(iter(str(error).splitlines()), "")[:200]
            raise CaptureError(f"{self.file}: the {step.label} can't be imported for inputs {shapes}: {type(error).__name__}: {first}") from error
        return tuple(made) if isinstance(made, tuple | list) else (made,)

    def _refusal(self, step: Step, why: str) -> CaptureError:
        """The next try leaves the node to onnxruntime, where that has it."""
        message, value = f"{self.file}: the {step.label} {why}", next((name for name in step.outputs if name is not None), None)
        return NeedsData(message, value) if value is not None and can_run(step.op.domain, step.op.name) else CaptureError(message)


@functools.cache
def _takes(function: Any, attribute: str) -> bool:
    """Whether a torch function takes an attribute; torch's own take none."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    return attribute in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def arguments(step: Step, inputs: list[Any], tensor: Any) -> list[Any]:
    """The node's inputs as its function takes them: lists of numbers, scalars, `Known` or tensors."""
    op = step.op
    some_tensor = any(isinstance(v, Tensor) for v in inputs)
    made = []
    for i, v in enumerate(inputs):
        if v is None:
            made.append(None)
        elif i in op.numbers:
            made.append(_numbers(v, i))
        elif i in op.known and isinstance(v, Known):
            made.append(v)
        elif op.scalars and some_tensor and isinstance(v, Known) and v.array.size == 1 and _lends_itself(v, inputs):
            made.append(v.scalar())
        else:
            made.append(tensor(v))
    return made


_UNSIGNED = (torch.uint16, torch.uint32)
_WIDENED = {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "BitShift", "BitwiseNot", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Clip"}


def _run_op(step: Step, given: list[Any]) -> Any:
    """The step's function; arithmetic on unsigned integers, which torch has little of, runs on wider ones."""
    if step.op.name in _WIDENED and any(isinstance(v, Tensor) and v.dtype == torch.uint64 for v in given):
        raise NeedsValue("it computes with unsigned 64-bit integers, which torch does not")
    narrow = next((v.dtype for v in given if isinstance(v, Tensor) and v.dtype in _UNSIGNED), None)
    if narrow is None or step.op.name not in _WIDENED:
        return step.op.function(*given, **step.attributes)
    made = step.op.function(*(v.to(torch.int64) if isinstance(v, Tensor) and v.dtype == narrow else v for v in given), **step.attributes)
    return made.to(narrow) if made.dtype == torch.int64 else made


def _numbers(value: Value, index: int) -> list[Any]:
    if isinstance(value, Known):
        return value.flat()
    raise NeedsValue(f"its input {index} is computed from data, and must be known while tracing")


def _lends_itself(value: Known, inputs: list[Any]) -> bool:
    """Whether a single number as a Python scalar gives the tensors' own shape and dtype."""
    tensors = [v for v in inputs if isinstance(v, Tensor) and v.dtype != torch.bool or isinstance(v, Tensor) and len(inputs) == 2]
    rank = max((v.dim() for v in tensors), default=0)
    return bool(tensors) and value.dim() <= rank and all(v.dtype == value.dtype for v in tensors)


def _stays_small(op: table.Op, inputs: list[Any]) -> bool:
    """Whether the output of an operator that grows its input has few numbers for certain."""
    if op.name == "Range":
        start, limit, delta = (v.scalar() for v in inputs)
        return delta != 0 and (limit - start) / delta <= LARGEST
    if op.name not in ("ConstantOfShape", "Expand", "Tile"):
        return False
    numbers = math.prod(max(n, 1) for n in inputs[op.numbers[0]].flat())
    return numbers * (1 if op.name == "ConstantOfShape" else inputs[0].array.size) <= LARGEST


def _ahead(step: Step, inputs: list[Any]) -> tuple[Known, ...] | None:
    """The node's outputs, computed now because all inputs are plain numbers; None if they are too many to carry as such."""
    with _disable_current_modes(), torch.no_grad():
        made = _run_op(step, arguments(step, inputs, lambda v: v.tensor() if isinstance(v, Known) else v))
    outputs = tuple(made) if isinstance(made, tuple | list) else (made,)
    if any(isinstance(v, Tensor) and (v.numel() > LARGEST or v.dtype.itemsize == 1 and v.is_floating_point() or v.is_complex()) for v in outputs):
        return None
    return tuple(Known.from_tensor(v) if isinstance(v, Tensor) else v for v in outputs)


def _shortest(value: float) -> float:
    """A 32-bit attribute as the number it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


_ANONYMOUS = re.compile(r"s\d+|unk__\d+|dim_?\d+|d\d+|dynamic_axes_\d+|None")


def _is_anonymous(size: int | str) -> bool:
    return isinstance(size, str) and _ANONYMOUS.fullmatch(size) is not None


_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def _size_of(expression: str, sizes: dict[str, int]) -> int:
    """The value of a dim's name, or of an expression of names such as 'past_sequence_length + 1'."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes.setdefault(node.id, 8 + 8 * len(sizes))
        raise ValueError(ast.dump(node))

    try:
        if len(expression) < 200:
            return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, ZeroDivisionError):
        pass
    return sizes.setdefault(expression, 8 + 8 * len(sizes))


def legal(name: str, taken: set[str], dots: bool) -> str:
    """A name torch and Python take: letters, digits and underscores (and dots between parts), not used yet."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII)[:200] or "_" for part in (name.strip("/.").split(".") if dots else [name])]
    made = ".".join(parts)
    if not dots and (made[0].isdigit() or made in ("self",) or made.startswith("__")):
        made = f"_{made}" if made[0].isdigit() else f"x_{made}"
    candidate, n = made, 1
    while candidate in taken:
        candidate, n = f"{made}_{n}", n + 1
    return candidate
