"""A module whose forward runs a file's nodes, with one torch function each: captured like any other module, it is the file's graph."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import traceback

from ..capture import LAYER
from ..errors import CaptureError, InputFileError, RewrightError
from . import quantized_linears, spellings, table
from .inputs import declared_inputs, legal
from .model import NIBBLES, torch_dtype, torch_tensor
from .opaque import Region, bodies_of, can_run, in_order, regions, with_types
from .provenance import layer_of
from .ranges import GATHER_FROM_START, never_negative
from .run import Step, ahead, arguments, run_op, stays_small
from .values import BY_PLACE, ELEMENTWISE, LARGEST, Known, NeedsValue, Value

DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")

NEVER_AHEAD = ("Shape", "Size")
"""What is known without its input's values."""


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
    layer: str


@dataclass(frozen=True)
class Branch:
    """An If node: which body runs is known while tracing."""

    label: str
    condition: str
    bodies: tuple[tuple[list[Any], tuple[str, ...]], tuple[list[Any], tuple[str, ...]]]
    outputs: tuple[str | None, ...]


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
        self.inputs = declared_inputs(model, name, self.notes)
        self.outputs = {v.name: torch_dtype(v.dtype, f"the output {v.name!r}") if v.dtype is not None else None for v in model.graph.outputs}
        unknown: Counter[str] = Counter()
        self.steps = self._steps(model.graph, unknown, self._regions(model))
        if unknown:
            listed = ", ".join(f"{what} ({count} node{'s' if count > 1 else ''})" for what, count in sorted(unknown.items()))
            raise CaptureError(f"{name} uses operators rewright can't import: {listed}")
        if convolutions := sum(map(_is_quantized_convolution, model.graph)):
            self.notes.append(
                f"{convolutions} quantized convolutions become float arithmetic on their codes: what is written of this graph is slower in onnxruntime "
                "than the file itself, which clean-onnx leaves as it is"
            )
        self._sign()
        self.eval()

    # -- what the file holds ----------------------------------------------------------------------------------------

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

    def _steps(self, graph: Any, unknown: Counter[str], left: Sequence[Region] = ()) -> list[Any]:
        self._add_weights(graph)
        graph.sort()
        steps = [
            Opaque(unit, unit.label, unit.inputs, unit.outputs, layer_of(unit.nodes[0])) if isinstance(unit, Region) else self._step(unit, unknown)
            for unit in in_order(graph, left)
        ]
        return [step for step in steps if step is not None]

    def _step(self, node: Any, unknown: Counter[str]) -> Step | Branch | None:
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
            unknown[f"{node.op_type} of {domain or 'ai.onnx'} {version}"] += 1
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
        layer = layer_of(node)
        if (softmax := spellings.safe_softmax(node)) is not None and version >= 13:
            axis = softmax.attributes["axis"].value if "axis" in softmax.attributes else -1
            return Step(spellings.SAFE_SOFTMAX, label, (softmax.inputs[0].name,), {"axis": axis}, outputs, layer)
        self._note_embedding(node)
        if (quantized := quantized_linears.quantized_linear(node)) is not None:
            return Step(quantized.op, label, quantized.inputs(), {}, outputs, layer)
        if (source := spellings.before_merged_transpose(node)) is not None:
            return Step(spellings.TRANSPOSED_HEADS, label, (source.name, *inputs), {}, outputs, layer)
        if op.name == "GatherElements" and never_negative(node.inputs[1]):
            op = GATHER_FROM_START
        return Step(op, label, inputs, attributes, outputs, layer)

    def _note_embedding(self, node: Any) -> None:
        """Where indices that are computed choose rows of a weight, ONNX counts negative ones from the end and an embedding refuses them."""
        table_, indices = (*node.inputs, None, None)[:2]
        if node.op_type != "Gather" or table_ is None or not table_.is_initializer() or table_.const_value is None or len(table_.const_value.shape) != 2:
            return
        if (
            indices is not None
            and not (indices.is_initializer() or never_negative(indices))
            and table_.const_value.dtype.is_floating_point()
            and not self.embeds
        ):
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

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's outputs by name."""
        env: dict[str, Value | None] = dict(self.constants)
        env.update({i.original: given[i.name] for i in self.inputs.values()})
        with traceback.preserve_node_meta():
            self._run(self.steps, env)
        return {name: self._tensor(self._value(name, env)) for name in self.outputs}

    def _run(self, steps: list[Any], env: dict[str, Value | None]) -> None:
        for step in steps:
            if isinstance(step, Branch):
                steps_of, names = step.bodies[0 if self._condition(step, env) else 1]
                self._run(steps_of, env)
                found: Any = tuple(self._value(name, env) for name in names)
            else:
                with traceback.annotate({LAYER: step.layer}):
                    found = self._left(step, env) if isinstance(step, Opaque) else self._call(step, env)
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
                    if (not step.op.grows or stays_small(step.op, inputs)) and (found := ahead(step, inputs)) is not None:
                        return found
                elif step.op.name in ELEMENTWISE or step.op.name in BY_PLACE and all(v.concrete for v in present[1:]):
                    return ((ELEMENTWISE | BY_PLACE)[step.op.name](*inputs, **step.attributes),)
            made = run_op(step, arguments(step, inputs, self._tensor))
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


def _is_quantized_convolution(node: Any) -> bool:
    if node.op_type != "Conv":
        return node.op_type in ("QLinearConv", "ConvInteger")
    maker = node.inputs[0].producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _shortest(value: float) -> float:
    """A 32-bit attribute as the number it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
