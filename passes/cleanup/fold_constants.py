"""f(weights) -> one weight, while it costs no more than a byte budget."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.evaluate import op_name
from ...ir.graph import Graph
from ..rewrite import Context, GraphPass

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Compute once what depends on weights alone.

    The new weight is a recipe of the old ones, so it also works on graphs without weights. Declines a result that
    would grow the weights by more than `budget_bytes` (an expand of two numbers can ask for gigabytes), and never
    touches random ops.
    """

    budget_bytes: int = 1 << 20
    """Most bytes one folded value may have beyond the weights it replaces."""

    name = "fold-constants"

    def run(self, graph: Graph, context: Context) -> Graph:
        for node in graph.nodes:
            value = node.meta.get("val")
            call: Any = node.args[0] if node.target is operator.getitem else node  # a part of a split weight (nn.MultiheadAttention)
            if not isinstance(value, Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape) or not _pure(call):
                continue
            sources = call.all_input_nodes
            if not all(graph.is_weight(s) for s in sources):
                continue
            freed = sum(graph.weight(s).nbytes for s in sources if len(s.users) == 1)
            if value.nbytes - freed > self.budget_bytes:
                context.decline(node, f"the folded value needs {value.nbytes:,} bytes, {freed:,} are freed, and the budget is {self.budget_bytes:,}")
                continue
            context.apply(node)
            base = str(sources[0].target) if len(sources) == 1 else f"{node.meta.get('path') or 'constants'}.{node.name}".lstrip(".")
            folded = graph.add_weight(
                f"{base}_{op_name(call)}" if len(sources) == 1 else base,
                _Replay(call, node.args[1] if call is not node else None),
                *(str(s.target) for s in sources),
                like=node,
            )
            node.replace_all_uses_with(folded, propagate_meta=False)
            graph.fx.erase_node(node)
        return graph


class _Replay:
    """The folded call as a function of its weights, in the order of `all_input_nodes`."""

    def __init__(self, node: fx.Node, item: Any = None) -> None:
        self.item = item
        position = {n: i for i, n in enumerate(node.all_input_nodes)}
        self.target: Any = node.target
        self.args, self.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Slot(position[n]))  # type: ignore[misc, arg-type, return-value]

    def __call__(self, *weights: Tensor) -> Tensor:
        if any(w.is_meta for w in weights):  # of a graph without weights some constants have data all the same: positions
            weights = tuple(w.to("meta") for w in weights)

        def fill(value: Any) -> Any:
            if isinstance(value, _Slot):
                return weights[value.index]
            if isinstance(value, list | tuple):
                return [fill(v) for v in value]
            return value

        made = self.target(*(fill(a) for a in self.args), **{k: fill(v) for k, v in self.kwargs.items()})
        return (made if self.item is None else made[self.item]).contiguous()


class _Slot:
    def __init__(self, index: int) -> None:
        self.index = index


def _pure(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not node.is_impure()
        and not target._schema.is_mutable
    )
