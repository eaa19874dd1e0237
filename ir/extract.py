"""A part of a program as a program of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .call import Call, CallCodeGen, Captured, Parameter
from .evaluate import is_size
from .graph import Graph, share_weight


def extract(graph: Graph, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Graph | str:
    """What computes `outputs` from `inputs`, or why that can't be cut out: which other value it needs.

    Nodes keep their names and provenance, weights are shared, dims are those of the inputs. A size is taken from an input that has it.
    """
    sizes = {s.node.expr: (n, axis) for n in reversed(inputs) for axis, s in enumerate(n.meta["val"].shape) if isinstance(s, torch.SymInt)}
    inside = _between(inputs, outputs, sizes)
    if isinstance(inside, str):
        return inside
    copies: dict[fx.Node, fx.Node] = {}
    copy = fx.Graph()
    for node in inputs:
        copies[node] = copy.placeholder(node.name)
        copies[node].meta = {key: node.meta[key] for key in ("val", "path") if key in node.meta}
    for node in sorted(inside):
        if is_size(node) and (place := sizes.get(_expression(node))) is not None:
            copies[node] = copy.create_node("call_function", torch.ops.aten.sym_size.int, (copies[place[0]], place[1]), name=node.name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = copy.node_copy(node, lambda n: copies[n])
    copy.output(tuple(copies[n] for n in outputs))
    call = _call([copies[n].name for n in inputs], len(outputs))
    copy._codegen = CallCodeGen(call)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    module.training = graph.module.training
    for name in (str(n.target) for n in copy.find_nodes(op="get_attr")):
        share_weight(graph.module, module, name)
    module._graph, copy.owning_module = copy, module
    symbols = _symbols(inputs)
    dims = {name: dim for name, dim in graph.dims.items() if name in graph.symbols and graph.symbols[name].node.expr in symbols}
    made = {n: r for n, r in graph.recipes.items() if copy.find_nodes(op="get_attr", target=n)}
    part = Graph(module, call, dims, made, [], graph.canonical, graph.fake_mode, graph.symbols, graph.known, graph.ties)
    part.recompile()
    return part


def _between(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], sizes: Mapping[Any, Any]) -> set[fx.Node] | str:
    inside, work = set(), list(outputs)
    while work:
        node = work.pop()
        if node in inside or node in inputs:
            continue
        if node.op == "placeholder":
            return f"{node.name} is read besides {', '.join(n.name for n in inputs)}"
        inside.add(node)
        if not (is_size(node) and _expression(node) in sizes):
            work += node.all_input_nodes
    return inside


def _expression(size: fx.Node) -> Any:
    value = size.meta["val"]
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _call(names: list[str], outputs: int) -> Call:
    leaf = pytree.tree_flatten(0)[1]
    out: Any = pytree.tree_flatten((0,) * outputs)[1]
    parameters = tuple(Parameter(n, "POSITIONAL_OR_KEYWORD", required=True) for n in names)
    return Call(parameters, tuple(Captured(n, leaf, (None,), (True,)) for n in names), out, tuple(names))


def _symbols(values: Sequence[fx.Node]) -> set[Any]:
    sizes = [s for n in values if isinstance(v := n.meta.get("val"), Tensor) for s in v.shape]
    return {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}
