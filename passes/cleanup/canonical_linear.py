"""addmm, mm, matmul with a weight -> linear(x, w[out, in], b), without the reshapes around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...ir.graph import Graph
from ...ir.nodes import argument, same_shape
from ..rewrite import Builder, Context, GraphPass

aten = torch.ops.aten


class CanonicalLinear(GraphPass):
    """One spelling of a linear layer.

    1. addmm(b, x, w), mm(x, w), matmul(x, w) with a 2-d weight [in, out] -> linear(x, w^T, b); the new weight is a recipe
    2. the same with permute(w, [1, 0]): the weight is taken as it is
    3. linear(x, w) + b with a vector weight b -> linear(x, w, b)
    4. reshape(linear(reshape(x, [-1, in]), w, b), [..., out]) -> linear(reshape(x, [..., in]), w, b)   (GPT-2's Conv1D)
    Declines addmm with beta or alpha other than 1.
    """

    name = "canonical-linear"

    def run(self, graph: Graph, context: Context) -> Graph:
        for node in graph.find(aten.addmm.default, aten.mm.default, aten.matmul.default):
            _products(graph, node, context)
        for node in graph.find(aten.add.Tensor):
            _bias(graph, node, context)
        for node in graph.find(aten.reshape.default):
            _lift(graph, node, context)
        return graph


def _transpose(w: Tensor) -> Tensor:
    return w.t().contiguous()


def _products(graph: Graph, node: fx.Node, context: Context) -> None:  # 1, 2
    *bias, x, w = node.args[:3]
    w_is_transposed = isinstance(w, fx.Node) and w.target is aten.permute.default and list(argument(w, "dims")) == [1, 0]
    source: Any = w.args[0] if w_is_transposed else w  # type: ignore[union-attr]
    if not graph.is_weight(source) or source.meta["val"].dim() != 2 or not isinstance(x, fx.Node) or x.meta["val"].dim() < 2:
        return
    if bias and not (graph.is_weight(bias[0]) and bias[0].meta["val"].dim() == 1):  # type: ignore[union-attr]
        return context.decline(node, "the added term is not a bias vector")
    if bias and (argument(node, "beta") != 1 or argument(node, "alpha") != 1):
        return context.decline(node, f"addmm scales its terms (beta {argument(node, 'beta')}, alpha {argument(node, 'alpha')})")
    op = Builder(graph, node, node)
    weight = source if w_is_transposed else op.weight(f"{source.target}_t", _transpose, source)
    _swap(graph, node, op.linear(x, weight, *bias), context)


def _bias(graph: Graph, node: fx.Node, context: Context) -> None:  # 3
    a, b = node.args[:2]
    linear, bias = (a, b) if graph.is_weight(b) else (b, a)
    if not (isinstance(linear, fx.Node) and linear.target is aten.linear.default and graph.is_weight(bias)):
        return
    if argument(linear, "bias") is not None or bias.meta["val"].shape != linear.args[1].meta["val"].shape[:1]:  # type: ignore[union-attr]
        return
    if len(linear.users) > 1:
        return context.decline(node, f"{linear.name} is also read without the bias")
    if argument(node, "alpha") != 1:
        return context.decline(node, "the add scales its second term")
    _swap(graph, node, Builder(graph, node, linear).linear(linear.args[0], linear.args[1], bias), context)


def _lift(graph: Graph, node: fx.Node, context: Context) -> None:  # 4
    linear: Any = node.args[0]
    if not (isinstance(linear, fx.Node) and linear.target is aten.linear.default and len(linear.users) == 1):
        return
    inner: Any = linear.args[0]
    if not (isinstance(inner, fx.Node) and inner.target is aten.reshape.default):
        return
    x: Any = inner.args[0]
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if not same_shape(after[-1:], linear.meta["val"].shape[-1:]):
        return
    op = Builder(graph, node, linear)
    if not same_shape((*after[:-1], inner.meta["val"].shape[-1]), before):
        x = op.reshape(x, [*argument(node, "shape")[:-1], int(inner.meta["val"].shape[-1])])  # the heads are still to be merged
    _swap(graph, node, op.linear(x, *linear.args[1:]), context)


def _swap(graph: Graph, old: fx.Node, new: fx.Node, context: Context) -> None:
    context.apply(old)
    old.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(old)
