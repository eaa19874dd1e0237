"""Calls and weights nobody reads: gone."""

from __future__ import annotations

from ...ir.graph import Graph
from ..rewrite import Context, GraphPass


class RemoveDeadCode(GraphPass):
    """Drop calls whose value is not read and weights no call reads (also from the state_dict)."""

    name = "remove-dead-code"

    def run(self, graph: Graph, context: Context) -> Graph:
        read = {graph.output}
        for node in reversed(graph.fx.nodes):
            if node in read or node.op == "call_function" and node.is_impure():
                read.update(node.all_input_nodes)
            elif node.op == "call_function":
                context.apply(node)
        graph.clean()
        return graph
