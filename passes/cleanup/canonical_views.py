"""view, flatten, unflatten, t, transpose, ... -> reshape and permute; reshape(reshape(x)) -> reshape(x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass

aten = torch.ops.aten


class CanonicalViews(GraphPass):
    """Two layout ops instead of ten, so that every later pattern is written once.

    Before:  view, _unsafe_view, flatten, unflatten, transpose, t     After:  reshape, permute
    Strides stop mattering: a reshape copies where a view would have failed. Source: specs/capture_ir.md 7.
    """

    name = "canonical-views"

    def run(self, graph: Graph, context: Context) -> Graph:
        for node in graph.nodes:
            if new := _canonical(graph, node):
                target, args = new
                if (node.target, node.args) != (target, args):
                    node.target, node.args, node.kwargs = target, args, {}
                    context.apply(node)
        for node in graph.find(aten.reshape.default, aten.permute.default):
            source = node.args[0]
            if not isinstance(source, fx.Node) or source.target is not node.target:
                continue
            if node.target is aten.permute.default:
                inner, outer = source.args[1], node.args[1]
                node.args = (source.args[0], [inner[i] for i in outer])  # type: ignore[index, union-attr]
            else:
                node.args = (source.args[0], *node.args[1:])
            context.apply(node)
        return graph


def _canonical(graph: Graph, node: fx.Node) -> tuple[Any, tuple] | None:
    x: Any = node.args[0] if node.args else None
    match node.target:
        case aten.view.default | aten._unsafe_view.default | aten.reshape.default:
            return aten.reshape.default, (x, list(node.args[1]))  # type: ignore[arg-type]
        case aten.flatten.using_ints | aten.unflatten.int:
            return aten.reshape.default, (x, _sizes(graph, node))
        case aten.t.default | aten.numpy_T.default | aten.transpose.int:
            rank = x.meta["val"].dim()
            dims = list(range(rank))
            if node.target is aten.transpose.int:
                a, b = argument(node, "dim0") % rank, argument(node, "dim1") % rank
                dims[a], dims[b] = dims[b], dims[a]
            else:
                dims.reverse()
            return aten.permute.default, (x, dims)
        case aten.permute.default:
            rank = x.meta["val"].dim()
            return aten.permute.default, (x, [d % rank for d in node.args[1]])  # type: ignore[union-attr]
    return None


def _sizes(graph: Graph, node: fx.Node) -> list[Any]:
    """The result's shape as reshape arguments: ints, `sym_size` nodes of the source, and at most one -1."""
    source: Any = node.args[0]
    sizes: list[Any] = []
    for size in node.meta["val"].shape:
        if not isinstance(size, torch.SymInt):
            sizes.append(int(size))
            continue
        same = [i for i, s in enumerate(source.meta["val"].shape) if isinstance(s, torch.SymInt) and s.node.expr == size.node.expr]
        sizes.append(graph.insert(aten.sym_size.int, source, same[0], before=node) if same else -1)
    return sizes
