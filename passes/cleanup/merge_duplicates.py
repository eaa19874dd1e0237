"""The same call on the same operands twice -> once; every spelling of a dynamic size -> one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.graph import Graph
from ..rewrite import Context, GraphPass

aten = torch.ops.aten


class MergeDuplicates(GraphPass):
    """Common-subexpression elimination; also `x.size(i)` of every value whose size is a dynamic dim becomes that dim of one input."""

    name = "merge-duplicates"

    def run(self, graph: Graph, context: Context) -> Graph:
        _one_node_per_size(graph)
        seen: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                context.apply(node)
                node.replace_all_uses_with(first, propagate_meta=False)
                graph.fx.erase_node(node)
        return graph


def _one_node_per_size(graph: Graph) -> None:
    home = {}  # symbol -> (input, axis)
    for node in graph.inputs:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                home.setdefault(size.node.expr, (node, axis))
    for node in graph.find(aten.sym_size.int):
        value = node.meta["val"]
        if isinstance(value, torch.SymInt) and value.node.expr in home:
            node.args = home[value.node.expr]


def _key(node: fx.Node) -> Any:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and (torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable):
        return None
    if node.is_impure():
        return None
    return target, _freeze(node.args), _freeze(node.kwargs)


def _freeze(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    return (type(value).__name__, repr(value)) if isinstance(value, bool | int | float | slice) else value  # 1, 1.0 and True differ; so do 0.0 and -0.0
