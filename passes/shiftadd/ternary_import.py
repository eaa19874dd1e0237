"""linear(x, w, b) with w of -g, 0 and g -> ternary_linear(x, codes, g, b): two bits a weight, sums that only add and subtract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.evaluate import Evaluator
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..quantization.stored import Tied
from ..rewrite import Context, GraphPass
from .ternary_weight import Ternary, ternary
from .token_rounding import Place, place, rounds

aten = torch.ops.aten
ours = torch.ops.rewright


@dataclass(frozen=True)
class TernaryImport(GraphPass):
    """Import the layers of models trained ternary: BitNet b1.58 (Ma et al. 2024), MatMul-free LM (Zhu et al. 2024), ternary weight networks.

    Before:  linear(round(x s) / s, clamp(round(w / g), -1, 1) g, b), s = 127 / max(|x_t|, 1e-5)
    After:   ternary_linear(x, packed, g, b, "int8-token")
    The weight is stored, or computed from stored ones: a fake quantization, transformers' BitLinear, which unpacks bytes. A g a
    tensor or a row. The input may be rounded a token, in its straight-through form too (`token_rounding`); any other input goes in
    as it is, with "none". A norm before it stays a node: in BitNet several layers read one norm.
    Declines a weight of more than three values or not of -g, 0 and g, one computed from activations, one that others read unless
    tied = "copy", layers below `min_weights`. It never makes a weight ternary that is not: rounding one loses all but 5.8 dB
    (specs/quant_shiftadd.md 1).
    Exact: the same integers are added, and scaled once; what remains is the rounding of the scales' products, 1e-12 in float64.
    """

    min_weights: int = 4096
    """Layers with fewer weights stay."""
    tied: Tied = "decline"

    name = "ternary-import"
    exact = True

    def run(self, graph: Graph, context: Context) -> Graph:
        for linear in graph.find(aten.linear.default):
            w: Any = linear.args[1]
            cone = _cone(graph, w)
            found = self.why_not(graph, linear, cone) or ternary(_value(graph, w))
            if isinstance(found, str):
                context.decline(linear, found)
                continue
            context.apply(linear)
            if (elsewhere := _read_elsewhere(graph, linear, cone or set())) is not None:
                graph.notes.append(f"{linear.meta.get('path') or linear.name} has ternary codes of its own; {elsewhere[0]} stays as it is for {elsewhere[1]}")
            _insert(graph, linear, place(graph, linear), found)
        return graph

    def why_not(self, graph: Graph, linear: fx.Node, cone: set[fx.Node] | None) -> str | None:
        """One sentence why a linear stays whatever its weight holds, or None. cone: what its weight is computed from."""
        w: Any = linear.args[1]
        if cone is None:
            return "its weight is computed from activations, not stored"
        if w.meta["val"].dim() != 2:
            return f"its weight has {w.meta['val'].dim()} axes, a matrix has 2"
        if (count := w.meta["val"].numel()) < self.min_weights:
            return f"its {count:,} weights are fewer than min_weights = {self.min_weights:,}"
        leaves = [n for n in cone if graph.is_weight(n)]
        if any(graph.weight(n).is_meta for n in leaves):
            return "the graph has no weights, and only their values say whether they are ternary; Graph.materialize gives it some"
        if self.tied == "decline" and (elsewhere := _read_elsewhere(graph, linear, cone)) is not None:
            return f'its weight {elsewhere[0]} is also read by {elsewhere[1]}; tied = "copy" gives it codes of its own'
        return None


def _cone(graph: Graph, w: fx.Node) -> set[fx.Node] | None:
    """All nodes a weight is computed from, itself among them; None if one of them is an input of the model."""
    found: set[fx.Node] = set()
    work = [w]
    while work:
        node = work.pop()
        if node in found:
            continue
        if not graph.is_weight(node) and (node.op != "call_function" or node.is_impure()):
            return None
        found.add(node)
        work += node.all_input_nodes
    return found


def _read_elsewhere(graph: Graph, linear: fx.Node, cone: set[fx.Node]) -> tuple[str, str] | None:
    """The weight, or the stored matrix of its size it is computed from, that a call beside the linear and the computation reads; and that call."""
    w: Any = linear.args[1]
    count = w.meta["val"].numel()
    matrices = [w, *(n for n in sorted(cone) if graph.is_weight(n) and n.meta["val"].is_floating_point() and n.meta["val"].numel() == count)]
    for node in matrices:
        if (other := next((u for u in node.users if u is not linear and u not in cone), None)) is not None:
            return str(node.target) if graph.is_weight(node) else node.name, other.name
    return None


def _value(graph: Graph, w: fx.Node) -> Tensor:
    """The weight itself, computed here where folding it beforehand would have held a second copy of all weights."""
    return graph.weight(w).detach() if graph.is_weight(w) else Evaluator(graph, {}, {}).run(w)


def _insert(graph: Graph, linear: fx.Node, at: Place, found: Ternary) -> None:
    bias, path = argument(linear, "bias"), linear.meta.get("path") or linear.name
    if at.activations == "none" and rounds(at.x):
        graph.notes.append(f"{path}: its input is rounded in another way than ternary_linear rounds a token, so the rounding stays a step of its own")
    packed = graph.add_constant(f"{path}.weight_ternary", found.packed, like=linear)
    scale = found.scale.double()
    scale = scale if at.factor is None else scale * graph.weight(at.factor).detach().double().flatten()
    scale = scale if at.divisor is None else scale / graph.weight(at.divisor).detach().double().flatten()
    dtype = torch.promote_types(found.scale.dtype, torch.float32)
    stored = graph.add_constant(f"{path}.weight_scale", scale.to(dtype), like=linear)
    new = graph.insert(ours.ternary_linear.default, at.x, packed, stored, bias, at.activations, before=at.out, like=linear)
    at.out.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(at.out)
    if at.out is not linear:
        graph.fx.erase_node(linear)
