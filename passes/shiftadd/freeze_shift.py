"""shift_linear_q or shift_linear_ps -> shift_linear: trained power-of-two weights as the packed codes they are seen as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.graph import Graph
from ...ir.ops.shift_linear import LARGEST
from ...ir.ops.shift_linear_ps import ps_codes
from ...ir.ops.shift_linear_q import q_terms
from ...ir.pot import pack_codes
from ..made import add_made
from ..rewrite import Context, GraphPass
from .shift_linear import FLOATS, NO_FASTER

ours = torch.ops.rewright


@dataclass(frozen=True)
class FreezeShift(GraphPass):
    """Pack what shift-linear left to be trained. Before: 32 bits a weight (64 for exponents and signs), after: 4 a term.

    Before:  shift_linear_q(x, w, largest, b)              After:  shift_linear(x, codes, largest / 64, b)
             shift_linear_ps(x, shift, sign, largest, b)
    Exact: both forms compute with the same codes. Declines layers whose weights are computed.
    """

    name = "freeze-shift"

    def run(self, graph: Graph, context: Context) -> Graph:
        stored = 0
        for node in graph.find(ours.shift_linear_q.default, ours.shift_linear_ps.default):
            x, *sources, largest, b, activations = node.args
            if not all(graph.is_weight(s) for s in (*sources, largest)):
                context.decline(node, "its weights are computed, not stored")
                continue
            if why := context.ignored(node):
                context.decline(node, why)
                continue
            context.apply(node)
            stored += sources[0].meta["val"].numel()  # type: ignore[union-attr]
            made: Callable[..., dict[str, Tensor]] = _from_weights if len(sources) == 1 else _from_shift_and_sign
            stem = str(sources[0].target).removesuffix("_shift")  # type: ignore[union-attr]
            names = {"w": f"{stem}_pot{4 * int(largest.meta['val'].shape[0])}", "scale": f"{stem}_scale"}  # type: ignore[union-attr]
            found = add_made(graph, made, [str(s.target) for s in (*sources, largest)], names, node)  # type: ignore[union-attr]
            new = graph.insert(ours.shift_linear.default, x, found["w"], found["scale"], b, activations, before=node)
            node.replace_all_uses_with(new, propagate_meta=False)
            graph.fx.erase_node(node)
        if stored:
            floats = all(n.args[-1] == "none" for n in graph.find(ours.shift_linear.default))
            graph.notes.append(f"freeze-shift: {stored:,} weights of 4 bits a term; {FLOATS if floats else NO_FASTER}")
        return graph


def _from_weights(w: Tensor, largest: Tensor) -> dict[str, Tensor]:
    scale = largest / LARGEST
    return {"w": _packed_like(w, len(scale)) if w.is_meta else pack_codes(torch.stack(q_terms(w, scale))), "scale": scale}


def _from_shift_and_sign(shift: Tensor, sign: Tensor, largest: Tensor) -> dict[str, Tensor]:
    return {"w": _packed_like(shift, 1) if shift.is_meta else pack_codes(ps_codes(shift, sign)[None]), "scale": largest / LARGEST}


def _packed_like(w: Tensor, terms: int) -> Tensor:
    return w.new_empty(terms, len(w), (w.shape[1] + 1) // 2, dtype=torch.uint8)
