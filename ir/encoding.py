"""Calls, arguments and calling conventions as plain JSON and back. Whatever is named in a file resolves through an allow list."""

from __future__ import annotations

import collections
import importlib
import inspect
import keyword
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .call import SIMPLE, Call, Captured, Parameter
from .errors import InputFileError, UsageError

NAMESPACES = ("aten", "prims", "rewright")
"""Where a saved op may come from."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    **{f.__name__: f for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow, operator.neg)},
    **{f.__name__: f for f in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_)},
    **{f.__name__: f for f in (torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_float, torch.sym_int, torch.sym_ite)},
    **{f.__name__: f for f in (math.ceil, math.floor, math.trunc)},
}
"""What graphs call besides ops: arithmetic on sizes, and picking one of several results."""

CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "ordered_dict": collections.OrderedDict}
CLASS_MODULES = ("torch", "transformers", "diffusers")
"""Packages an output class may be imported from."""


def target_name(target: Any) -> str:
    """`aten.linear.default`, `getitem`. Raises UsageError for a call that could not be loaded again."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    name = getattr(target, "__name__", "")
    if FUNCTIONS.get(name) is target:
        return name
    raise UsageError(f"a graph that calls {target} can't be saved: only ops of {', '.join(NAMESPACES)} and size arithmetic can be loaded again")


def find_target(name: str) -> Callable[..., Any]:
    """What `target_name` named. Raises InputFileError for anything else, such as `os.system`."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if namespace not in NAMESPACES:
        raise InputFileError(f"the graph calls {name!r}, which is no op of {', '.join(NAMESPACES)}; it is damaged or unsafe, or made by a newer rewright")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise InputFileError(f"the graph calls {name!r}, which this rewright with torch {torch.__version__} does not have")
    if found._schema.is_mutable or any(a.name == "filename" for a in found._schema.arguments):  # aten.from_file, aten.save
        raise InputFileError(f"the graph calls {name!r}, which writes to memory or files; no graph of ours does, so the file is unsafe")
    return found


def identifier(name: Any) -> str:
    """A name that is put into generated Python as it stands. Raises InputFileError for any that would be more than a name."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise InputFileError(f"{name!r} is not usable as a name; the file is damaged or unsafe")
    return name


def weight_name(name: Any) -> str:
    """The same for dotted weight names, which generated Python quotes where they are no identifiers."""
    if not isinstance(name, str) or not name.isprintable() or any(c in name for c in "\"'\\") or not all(name.split(".")):
        raise InputFileError(f"{name!r} is not usable as the name of a weight; the file is damaged or unsafe")
    return name


def encode(value: Any) -> Any:
    """One argument of a call. Nodes become {"node": name}; what JSON lacks becomes an object with one key."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case complex():
            return {"complex": [encode(value.real), encode(value.imag)]}
        case list():
            return [encode(v) for v in value]
        case tuple():
            return {"tuple": [encode(v) for v in value]}
        case slice():
            return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {type(value).__name__: str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
    raise UsageError(f"a graph with an argument of type {type(value).__name__} can't be saved")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument `encode` wrote. Raises InputFileError for anything it would not write."""
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    [(kind, held)] = value.items()
    match kind:
        case "node":
            return nodes[held]
        case "float":
            return float(held)
        case "complex":
            return complex(*(decode(v, nodes) for v in held))
        case "tuple":
            return tuple(decode(v, nodes) for v in held)
        case "slice":
            return slice(*(decode(v, nodes) for v in held))
        case "dtype":
            return torch_constant(held, torch.dtype)
        case "layout":
            return torch_constant(held, torch.layout)
        case "memory_format":
            return torch_constant(held, torch.memory_format)
        case "device":
            return torch.device(held)
    raise InputFileError(f"unknown kind of argument {kind!r}; the file is damaged or made by a newer rewright")


def torch_constant(name: str, kind: type) -> Any:
    """`torch.float32` and its like by name."""
    found = getattr(torch, name, None)
    if not isinstance(found, kind):
        raise InputFileError(f"torch {torch.__version__} has no {kind.__name__} {name!r}")
    return found


def encode_call(call: Call) -> dict[str, Any]:
    """The original's signature, the arguments of the capture and the structure of the output."""
    return {
        "parameters": [{"name": p.name, "kind": p.kind, "default": encode(p.default), "required": p.required} for p in call.parameters],
        "captured": [
            {"name": c.name, "structure": _encode_tree(c.spec), "constants": [encode(x) for x in c.constants], "is_tensor": list(c.is_tensor)}
            for c in call.captured
        ],
        "output": _encode_tree(call.out_spec),
        "names": list(call.names),
    }


def decode_call(data: Mapping[str, Any], notes: list[str]) -> Call:
    """The Call again. A class that can't be had here becomes a dict or a tuple, which `notes` then says."""
    parameters = tuple(_decode_parameter(p) for p in data["parameters"])
    captured = tuple(
        Captured(str(c["name"]), _decode_tree(c["structure"], notes), tuple(decode(x, {}) for x in c["constants"]), tuple(map(bool, c["is_tensor"])))
        for c in data["captured"]
    )
    return Call(parameters, captured, _decode_tree(data["output"], notes), tuple(identifier(n) for n in data["names"]))


def _decode_parameter(data: Mapping[str, Any]) -> Parameter:
    inspect._ParameterKind[data["kind"]]  # KeyError for a kind that does not exist
    return Parameter(identifier(data["name"]), data["kind"], decode(data["default"], {}), bool(data["required"]))


def _encode_tree(spec: pytree.TreeSpec) -> Any:
    """None for a leaf, else its kind with children; a class carries its name and the field names it was flattened to."""
    if spec.is_leaf():
        return None
    children = [_encode_tree(c) for c in spec.children()]
    for name, kind in CONTAINERS.items():
        if spec.type is kind:
            keys = {} if spec.context is None else {"keys": [_plain(k) for k in spec.context]}
            return {"kind": name, **keys, "children": children}
    return {"kind": "class", "class": f"{spec.type.__module__}.{spec.type.__qualname__}", "context": _plain(spec.context), "children": children}


def _plain(value: Any) -> Any:
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    raise UsageError(f"a graph whose inputs or outputs are structured by a {type(value).__name__} can't be saved")


def _decode_tree(data: Any, notes: list[str]) -> pytree.TreeSpec:
    if data is None:
        return pytree.tree_structure(0)
    children = [_decode_tree(c, notes) for c in data["children"]]
    if data["kind"] != "class":
        return pytree.TreeSpec(CONTAINERS[data["kind"]], data.get("keys"), children)
    name, context = str(data["class"]), data["context"]
    kind = _find_class(name)
    if kind is not None:
        return pytree.TreeSpec(kind, context, children)
    by_name = isinstance(context, list) and len(context) == len(children) and all(isinstance(k, str) for k in context)
    note = f"{name} is not available here: a plain {'dict' if by_name else 'tuple'} stands for it"
    if note not in notes:
        notes.append(note)
    return pytree.TreeSpec(dict, context, children) if by_name else pytree.TreeSpec(tuple, None, children)


def _find_class(name: str) -> type | None:
    """A class torch's pytree knows, from an allowed package; None if there is none of that name."""
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in CLASS_MODULES or "__" in module:
        return None
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and found in pytree.SUPPORTED_NODES else None
