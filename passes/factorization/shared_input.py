"""Linears that read one value, as two products each: the first ones as one product, or one for all."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import path_of
from ...ir.graph import Graph

aten = torch.ops.aten


def insert_joint(graph: Graph, linears: Sequence[fx.Node], made: Mapping[str, fx.Node]) -> None:
    """y_i = linear(z, second_i, bias_i) of one z = linear(x, first). The linears stay nodes of their names."""
    z = graph.insert(aten.linear.default, linears[0].args[0], made["first"], None, before=linears[0])
    for i, node in enumerate(linears):
        _reads(graph, node, z, made[f"second{i}"], made.get(f"bias{i}"))


def insert_packed(graph: Graph, linears: Sequence[fx.Node], made: Sequence[Mapping[str, fx.Node]]) -> None:
    """y_i = linear(z_i, second_i, bias_i), the z_i parts of one linear(x, [first_0; first_1; ...]): x is read once, z_i is small."""
    before, x = linears[0], linears[0].args[0]
    if len(linears) == 1:
        return insert_joint(graph, linears, made[0])
    firsts = [m["first"] for m in made]
    packed = graph.add_weight(shared_name(linears), _stack, *(str(f.target) for f in firsts), like=before)
    z = graph.insert(aten.linear.default, x, packed, None, before=before)
    parts = graph.insert(aten.split_with_sizes.default, z, [int(f.meta["val"].shape[0]) for f in firsts], -1, before=before)
    for i, (node, m) in enumerate(zip(linears, made)):
        _reads(graph, node, graph.insert(operator.getitem, parts, i, before=before, like=node), m["second0"], m.get("bias0"))


def shared_name(linears: Sequence[fx.Node]) -> str:
    """Of a first factor that several linears have in common: "attention.q_k_v.weight_first"."""
    paths = [path_of(n) for n in linears]
    return f"{paths[0].rpartition('.')[0]}.{'_'.join(p.rpartition('.')[2] for p in paths)}.weight_first".lstrip(".")


def _reads(graph: Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    """A linear of its own name that reads something else: statistics and later layers know it by that name."""
    node.args, node.kwargs = (x, weight, bias), {}
    graph.infer(node)


def _stack(*firsts: Tensor) -> Tensor:
    return torch.cat(firsts)
