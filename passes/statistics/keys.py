"""What a value depends on, as a hash: equal exactly where equal programs compute it from equal weights, whatever their nodes are called."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ...ir.graph import Graph
from ...ir.weights import WeightStore, digest


def value_keys(graph: Graph, values: Iterable[fx.Node], weights: Mapping[str, Tensor] | None = None) -> dict[fx.Node, str]:
    """Node -> hash of its upstream cone: ops, literals, inputs by name, weights by content.

    A pass that leaves the cone of a value alone leaves its key, and so its statistics, as they were.
    """
    wanted = list(values)
    needed, work = set(wanted), list(wanted)
    for node in work:
        fresh = [n for n in node.all_input_nodes if n not in needed]
        needed.update(fresh)
        work += fresh
    keys: dict[fx.Node, str] = {}
    for node in graph.fx.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr":
            keys[node] = weight_key(graph, str(node.target), weights or {})
        elif node.op == "placeholder":
            keys[node] = hashed("input", node.target)
        else:
            keys[node] = hashed(str(node.target), *map(str, fx.map_arg((node.args, node.kwargs), lambda n: f"%{keys[n]}")))
    return keys


def weight_key(graph: Graph, name: str, weights: Mapping[str, Tensor]) -> str:
    """The hash of a weight's values, or of how they are made where the graph has none."""
    own = graph.weight(name) if graph.has_weight(name) else None
    if own is not None and not own.is_meta:
        return digest(own)
    if (recipe := graph.recipes.get(name)) is not None:
        return hashed("made by", function_key(recipe.function), *(weight_key(graph, s, weights) for s in recipe.sources))
    name = graph.stored_name(name, weights)
    if name not in weights:
        return hashed("missing", name)
    return weights.digest(name) if isinstance(weights, WeightStore) else digest(weights[name])


def function_key(function: Any) -> str:
    """The hash of a recipe's function: its name, code, bound arguments and closure."""
    if isinstance(function, functools.partial):
        bound = [_plain(v) for v in (*function.args, *sorted(function.keywords.items()))]
        return hashed("partial", function_key(function.func), *bound)
    code = getattr(function, "__code__", None)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    if code is None:
        return hashed(name, _plain(getattr(function, "__dict__", {})))
    cells = [_plain(c.cell_contents) for c in function.__closure__ or () if c.cell_contents is not function]
    return hashed(name, _code(code), _plain(function.__defaults__), *cells)


def data_key(graph: Graph, batches: Sequence[tuple[Tensor, ...]]) -> str:
    """The hash of the calibration inputs, in order."""
    return hashed(*graph.call.names, *(digest(t) for flat in batches for t in flat))


def hashed(*parts: Any) -> str:
    """A hash of strings in order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(str(part).encode() + b"\0")
    return found.hexdigest()


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return hashed(code.co_code.hex(), *code.co_names, *constants)


def _plain(value: Any) -> str:
    if isinstance(value, Tensor):
        return digest(value) if not value.is_meta else f"meta{value.dtype}{tuple(value.shape)}"
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return function_key(value)
    if isinstance(value, dict):
        return hashed(*(f"{k}={_plain(v)}" for k, v in value.items()))
    if isinstance(value, list | tuple):
        return hashed(type(value).__name__, *map(_plain, value))
    return repr(value)
