"""Graph -> ExportedProgram: torch.export again, with the graph's own bounds on its dims."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from .call import named_in_signature
from .graph import Graph, quiet


def re_export(graph: Graph, flat: tuple[Tensor, ...]) -> ExportedProgram:
    """The graph's module as torch.export sees it, traced on the flat inputs.

    torch concludes from one trace that batch 1 or fewer tokens than a chunk "violate" what it saw, which we verified to
    run: the bounds of the graph's dims replace its own.
    """
    shapes = [{axis: torch.export.Dim.AUTO for axis, size in enumerate(n.meta["val"].shape) if isinstance(size, torch.SymInt)} for n in graph.inputs]
    names = graph.call.names
    unnamed = [name for name in names if all(p.name != name for p in graph.call.parameters)]
    with quiet(), torch.no_grad(), named_in_signature(graph.module, unnamed):
        exported = torch.export.export(graph.module, (), dict(zip(names, flat)), dynamic_shapes=dict(zip(names, shapes)), strict=False)
    dims = {symbol.node.expr: graph.dims[name] for name, symbol in graph.symbols.items()}
    placeholders = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    for node, traced in zip(graph.inputs, exported.graph_signature.user_inputs, strict=True):
        for ours, theirs in zip(node.meta["val"].shape, placeholders[str(traced)].meta["val"].shape):
            if isinstance(ours, torch.SymInt) and isinstance(theirs, torch.SymInt) and theirs.node.expr.is_Symbol:
                dim = dims[ours.node.expr]
                exported.range_constraints[theirs.node.expr] = ValueRanges(dim.low, int_oo if dim.high is None else dim.high)
    return exported
