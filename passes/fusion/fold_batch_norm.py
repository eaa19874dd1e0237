"""batch_norm(conv(x, w, b)) -> conv(x, w', b'): what a norm in eval mode multiplies and adds goes into the layer in front."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import CONVOLUTIONS, path_of
from ...ir.graph import Graph
from ...ir.nodes import argument, arguments, set_argument
from ..rewrite import Context, GraphPass

aten = torch.ops.aten

NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default)


class FoldBatchNorm(GraphPass):
    """Fold the batch norm behind a convolution or linear layer into its weights.

    Before:  y = (conv(x, w, b) - mean) / sqrt(variance + eps) * gain + shift      (Ioffe & Szegedy 2015, at inference)
    After:   y = conv(x, w * s, (b - mean) * s + shift), s = gain / sqrt(variance + eps), computed in float64
    Declines a layer that others read too, whose weights are computed or shared, or whose output has its channels on another axis than 1.
    """

    name = "fold-batch-norm"
    exact = True  # the same sums in another order: within fp tolerance

    def run(self, graph: Graph, context: Context) -> Graph:
        for norm in graph.find(*NORMS):
            layer: Any = norm.args[0]
            if layer.target not in LAYERS:
                continue
            if why := _why_not(graph, norm, layer):
                context.decline(norm, why)
                continue
            context.apply(norm)
            _fold(graph, norm, layer)
        return graph


def _why_not(graph: Graph, norm: fx.Node, layer: fx.Node) -> str | None:
    if norm.target is aten.batch_norm.default and argument(norm, "training"):
        return "it normalises by each batch's own statistics"
    if other := next((u for u in layer.users if u is not norm), None):
        return f"{path_of(layer)} is also read by {other.name}"
    if norm.target is not aten.batch_norm.default and any(u.target is not operator.getitem or u.args[1] != 0 for u in norm.users):
        return "its saved statistics are read"
    if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
        return f"it normalises axis 1 of {layer.meta['val'].dim()}, and the channels of {path_of(layer)} are the last"
    for weight in _weights(norm, layer):
        if not graph.is_weight(weight):
            return f"{weight} is computed, not stored"
        if len(weight.users) > 1 and weight in layer.all_input_nodes:
            return f"its weight {weight.target} is also read by {next(u.name for u in weight.users if u is not layer)}"
    return None


def _weights(norm: fx.Node, layer: fx.Node) -> Iterator[fx.Node]:
    """All that goes into the new weights."""
    for node, names in ((layer, ("weight", "bias")), (norm, ("running_mean", "running_var", "weight", "bias"))):
        yield from (value for name in names if (value := argument(node, name)) is not None)


def _fold(graph: Graph, norm: fx.Node, layer: fx.Node) -> None:
    of_norm, (w, b) = arguments(norm), (argument(layer, name) for name in ("weight", "bias"))
    gain, shift, eps = of_norm["weight"], of_norm["bias"], float(of_norm["eps"])

    def scale(variance: Tensor, *gain: Tensor) -> Tensor:
        return (variance.double() + eps).rsqrt() * (gain[0].double() if gain else 1.0)

    def scaled(w: Tensor, *rest: Tensor) -> Tensor:
        return (w.double() * scale(*rest).view(-1, *[1] * (w.dim() - 1))).to(w.dtype)

    def shifted(mean: Tensor, variance: Tensor, *rest: Tensor) -> Tensor:
        more = iter(rest)
        by = scale(variance, *([next(more)] if gain is not None else []))
        bias = next(more).double() if b is not None else 0.0
        return ((bias - mean.double()) * by + (next(more).double() if shift is not None else 0.0)).to(mean.dtype)

    mean, variance = of_norm["running_mean"], of_norm["running_var"]
    stem = str(w.target).rpartition(".")[0]
    weight = graph.add_weight(f"{stem}.weight", scaled, *_names(w, variance, gain), like=layer)
    bias = graph.add_weight(f"{stem}.bias", shifted, *_names(mean, variance, gain, b, shift), like=layer)
    set_argument(layer, "weight", weight)
    set_argument(layer, "bias", bias)
    for user in list(norm.users) if norm.target is not aten.batch_norm.default else [norm]:
        user.replace_all_uses_with(layer, propagate_meta=False)
        graph.fx.erase_node(user)
    if norm.target is not aten.batch_norm.default:
        graph.fx.erase_node(norm)


def _names(*weights: fx.Node | None) -> list[str]:
    return [str(w.target) for w in weights if w is not None]
