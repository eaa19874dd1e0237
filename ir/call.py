"""The original's calling convention around a flat graph: its signature, defaults, nested inputs and output classes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from .errors import UsageError

SIMPLE = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the original forward. `default` is only kept when it is a plain Python value."""

    name: str
    kind: str  # of inspect.Parameter: POSITIONAL_OR_KEYWORD, KEYWORD_ONLY, VAR_POSITIONAL, VAR_KEYWORD, ...
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Captured:
    """One argument that was there at capture: its tree and, leaf by leaf, the constant it was bound to (None = tensor)."""

    name: str
    spec: pytree.TreeSpec
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]


@dataclass(frozen=True)
class Call:
    """Binds a call of the original's signature to the graph's flat inputs, and its flat outputs to the original's output."""

    parameters: tuple[Parameter, ...]
    captured: tuple[Captured, ...]
    out_spec: pytree.TreeSpec
    names: tuple[str, ...] = field(default=())
    """Flat input names, in graph order."""

    @staticmethod
    def parameters_of(function: Any) -> tuple[Parameter, ...]:
        """The signature as data; defaults that are not plain values become None."""
        found = []
        for p in inspect.signature(function).parameters.values():
            if p.name == "self":
                continue
            required = p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            default = p.default if isinstance(p.default, SIMPLE) else None
            found.append(Parameter(p.name, p.kind.name, default, required))
        return tuple(found)

    def flatten(self, given: dict[str, Any], rest: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The flat tensors of a call. Raises UsageError for an argument the capture did not have, or lacks."""
        values = {**given, **rest}
        flat: list[Tensor] = []
        for captured in self.captured:
            value = values.pop(captured.name, None)
            leaves, spec = pytree.tree_flatten(value)
            if spec != captured.spec:
                raise UsageError(_other_structure(captured, value))
            for leaf, constant, is_tensor in zip(leaves, captured.constants, captured.is_tensor):
                if is_tensor != isinstance(leaf, Tensor):
                    raise UsageError(_other_structure(captured, value))
                if is_tensor:
                    flat.append(leaf)
                elif leaf is not None and leaf != constant:
                    raise UsageError(f"argument {captured.name!r} was captured as {constant!r}; got {leaf!r}. Capture again with the new value")
        for name, value in values.items():
            if not self._is_default(name, value):
                raise UsageError(
                    f"argument {name!r} was not part of the capture (it has {', '.join(c.name for c in self.captured)}); give it in the example inputs"
                )
        return tuple(flat)

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether leaving the argument out means the same; None and False count as the same, as they do in most models."""
        absent = value is None or value is False
        for p in self.parameters:
            if p.name == name:
                if p.kind.startswith("VAR_"):
                    return not value
                return absent and not p.default or isinstance(value, SIMPLE) and value == p.default
        return absent or value is True and name == "return_dict"  # the capture already returns the class

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, for callers that hold (args, kwargs)."""
        positional = [p.name for p in self.parameters if p.kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
        if len(args) > len(positional):
            raise UsageError(f"{len(args)} positional arguments given, the model takes {len(positional)}: {', '.join(positional)}")
        return {**dict(zip(positional, args)), **kwargs}

    def unflatten(self, outputs: tuple) -> Any:
        """The original's output structure (ModelOutput, dict, tuple, ...) from the flat outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


@contextlib.contextmanager
def named_in_signature(model: nn.Module, unnamed: list[str]) -> Iterator[None]:
    """Arguments that the signature takes as **kwargs stand in it by name: torch.export takes no dynamic sizes for others."""
    if not unnamed:
        yield
        return
    original = model.forward
    own = [p for p in inspect.signature(original).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]
    forward.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _other_structure(captured: Captured, value: Any) -> str:
    if value is None:
        return f"argument {captured.name!r} is missing: it was part of the capture, so the graph needs it"
    expected = "a tensor" if captured.spec.is_leaf() and captured.is_tensor[0] else f"the structure {captured.spec}"
    return f"argument {captured.name!r} was captured as {expected}; got {type(value).__name__}. Capture again if it may differ"


class CallCodeGen(CodeGen):
    """Generated `forward` with the original's parameters; the graph inside stays flat, so edits and torch.compile just work."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("_call", self.call)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        arguments, given, rest = ["self"], [], "{}"
        keyword_only = False
        for p in self.call.parameters:
            if p.kind == "VAR_KEYWORD":
                arguments.append(f"**{p.name}")
                rest = p.name
            elif p.kind == "VAR_POSITIONAL":
                arguments.append(f"*{p.name}")
                given.append(p.name)
                keyword_only = True
            else:
                if p.kind == "KEYWORD_ONLY" and not keyword_only:
                    arguments.append("*")
                    keyword_only = True
                arguments.append(p.name if p.required else f"{p.name}={p.default!r}")
                given.append(p.name)
        flat = [v.split(":")[0].split("=")[0].split("#")[0].strip() for v in free_vars]
        target = f"{', '.join(flat)}, = " if flat else ""
        return f"def forward({', '.join(arguments)}):\n    {target}_call.flatten({{{', '.join(f'{n!r}: {n}' for n in given)}}}, {rest})"

    def generate_output(self, output_args: Any, *, descs: Any = None, repr_fn: Any = None) -> str:
        return f"return _call.unflatten({(repr_fn or repr)(output_args)})"

    def process_inputs(self, *args: Any) -> Any:
        """torch.export interprets a GraphModule instead of calling it, with arguments in the order of `Call.captured`."""
        flat = tuple(x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
        if len(flat) != len(self.call.names):
            raise UsageError(f"{len(flat)} tensors given, the graph takes {len(self.call.names)}: {', '.join(self.call.names)}")
        return flat

    def process_outputs(self, outputs: Any) -> Any:
        """The original's output classes, which the interpreter would leave out."""
        return self.call.unflatten(outputs)

    def __deepcopy__(self, memo: dict) -> CallCodeGen:
        return CallCodeGen(self.call)  # a Call never changes
