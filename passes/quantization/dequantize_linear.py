"""quantized linear(x, codes, scale) -> linear(x, codes * scale): what needs weights of floats may work on a model that came quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import DEQUANTIZABLE, SCALED_CODES
from ...ir.graph import Graph
from ...ir.nodes import arguments
from ...ir.ops.linear_nbits import group_values
from ..rewrite import Context, GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class DequantizeLinear(GraphPass):
    """Linear layers with weights of floats again, and activations that are not rounded: the way back of quantize-linear.

    For an ONNX file that somebody quantized, in front of passes that fit or factorize weights, or quantize them better. The weights are what the codes
    stand for, so what their rounding lost stays lost; the file grows until they are quantized again.
    Declines codes that are computed. Not exact: activations keep what their 8 bits cut off.
    """

    name = "dequantize-linear"
    exact = False

    def run(self, graph: Graph, context: Context) -> Graph:
        for node in graph.find(*DEQUANTIZABLE):
            a = arguments(node)
            codes = [a[name] for name in ("w", "scale", "zero_point") if a.get(name) is not None]
            if why := context.ignored(node):
                context.decline(node, why)
            elif computed := next((c for c in codes if not graph.is_weight(c)), None):
                context.decline(node, f"its codes are computed ({computed.name})")
            else:
                self._replace(graph, node, a, codes)
                context.apply(node)
        return graph

    @staticmethod
    def _replace(graph: Graph, node: fx.Node, a: dict[str, Any], codes: list[fx.Node]) -> None:
        width, dtype = int(a["x"].meta["val"].shape[-1]), a["x"].meta["val"].dtype

        def by_channel(w: Tensor, scale: Tensor) -> Tensor:
            return w.to(dtype) * scale.to(dtype)[:, None]

        def in_groups(w: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
            return group_values(w, scale, zero, a["bits"], a["group_size"]).flatten(-2)[:, :width].to(dtype)

        stem = str(codes[0].target)
        weight = graph.add_weight(f"{stem}_float", by_channel if node.target in SCALED_CODES else in_groups, *(str(c.target) for c in codes), like=node)
        node.replace_all_uses_with(graph.insert(aten.linear.default, a["x"], weight, a["b"], before=node, like=node))
        graph.fx.erase_node(node)
