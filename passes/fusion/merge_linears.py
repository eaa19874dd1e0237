"""linear(x, wa), linear(x, wb), ... -> split(linear(x, [wa; wb; ...])): one product reads x once."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass

aten = torch.ops.aten


class MergeLinears(GraphPass):
    """Join linear layers that share their input (q, k, v; gate, up) into one.

    Before:  q = linear(x, wq, bq); k = linear(x, wk, bk)      After:  q, k = split(linear(x, [wq; wk], [bq; bk]), [out_q, out_k], -1)
    A layer without bias gets zeros when another of the group has one. Declines a weight that other calls read too
    (tied embeddings) or that is computed.
    """

    name = "merge-linears"
    exact = True  # every output is the same dot product; the library may block it differently, so within fp tolerance

    def run(self, graph: Graph, context: Context) -> Graph:
        groups: dict[tuple[Any, torch.dtype], list[fx.Node]] = defaultdict(list)
        for node in graph.find(aten.linear.default):
            groups[node.args[0], node.args[1].meta["val"].dtype].append(node)  # type: ignore[union-attr]
        for (x, _), linears in groups.items():
            mergeable = []
            for node in linears if len(linears) > 1 else []:
                why = _why_not(graph, node)
                if why:
                    context.decline(node, why)
                else:
                    mergeable.append(node)
            if len(mergeable) > 1:
                _merge(graph, x, mergeable)
                for node in mergeable:
                    context.apply(node)
        return graph


def _why_not(graph: Graph, node: fx.Node) -> str | None:
    weight, bias = node.args[1], argument(node, "bias")
    if not graph.is_weight(weight) or bias is not None and not graph.is_weight(bias):
        return "its weight is computed, not stored"
    if len(weight.users) > 1:  # type: ignore[union-attr]
        return f"its weight {weight.target} is also read by {next(u.name for u in weight.users if u is not node)}"  # type: ignore[union-attr]
    return None


def _merge(graph: Graph, x: fx.Node, linears: list[fx.Node]) -> None:
    first = linears[0]
    paths = [n.meta.get("path", "") for n in linears]
    owner = paths[0].rpartition(".")[0]
    name = f"{owner}.{'_'.join(p.rpartition('.')[2] for p in paths)}".lstrip(".")
    weights = [str(n.args[1].target) for n in linears]  # type: ignore[union-attr]
    biases = [argument(n, "bias") for n in linears]
    sizes = [int(n.args[1].meta["val"].shape[0]) for n in linears]  # type: ignore[union-attr]
    weight = graph.add_weight(f"{name}.weight", _concatenate, *weights, like=first)
    bias = None
    if any(b is not None for b in biases):
        bias = graph.add_weight(
            f"{name}.bias",
            _Biases(tuple(None if b is not None else n for b, n in zip(biases, sizes))),
            *(str(b.target) for b in biases if b is not None),
            like=first,
        )
    wide = graph.insert(aten.linear.default, x, weight, bias, before=first)
    parts = graph.insert(aten.split_with_sizes.default, wide, sizes, -1, before=first)
    for node in (wide, parts):
        node.meta["path"] = name
    for i, node in enumerate(linears):
        part = graph.insert(operator.getitem, parts, i, before=first, like=node)
        node.replace_all_uses_with(part, propagate_meta=False)
    for node in linears:
        graph.fx.erase_node(node)


def _concatenate(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


class _Biases:
    """Concatenate biases, with zeros for the layers that have none."""

    def __init__(self, zeros: tuple[int | None, ...]) -> None:
        self.zeros = zeros

    def __call__(self, *biases: Tensor) -> Tensor:
        given = iter(biases)
        return torch.cat([next(given) if n is None else biases[0].new_zeros(n) for n in self.zeros])
