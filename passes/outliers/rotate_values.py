"""v -> v Q in every head, Q' into the rows of v's projection and Q into the columns of the output's: values without outlier channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from ...ir.blocks import attention_blocks
from ...ir.graph import Graph
from ..rewrite import Context, GraphPass
from .hadamard import Rotation
from .head_channels import ValueHeads, value_heads


@dataclass(frozen=True)
class RotateValues(GraphPass):
    """Rotate the values inside every head: the R2 of QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2025).

    Before:  y = linear(attention(q, k, linear(x, Wv, bv)), Wo)
    After:   y = linear(attention(q, k, linear(x, Q'Wv, Q'bv)), Wo Q)      Q for each head's rows and columns
    Attention mixes tokens and leaves a head's channels where they are, so Q passes it. Query heads that share a value head share its Q;
    v may be part of a fused projection.

    matrix: "hadamard" (randomised) or "random"; a head width no Hadamard matrix is known for gets blocks, which `Graph.notes` says.
    Refuses values that something besides the attention reads (a cache that is an output), an output projection that reads more than the
    heads in order, anything between the two (a gate, a norm), and weights that serve several calls.
    """

    matrix: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0

    name = "rotate-values"
    exact = True  # an orthogonal change of basis, folded in float64 and rounded once: within fp tolerance

    def run(self, graph: Graph, context: Context) -> Graph:
        remarks: dict[str, None] = {}
        for number, block in enumerate(attention_blocks(graph)):
            heads = value_heads(graph, block)
            if isinstance(heads, str):
                context.decline(block.attention, heads)
                continue
            rotation = Rotation(block.value_dim, self.matrix, self.seed + number)
            context.apply(block.attention)
            _rotate(graph, heads, rotation)
            if rotation.remark:
                remarks[f"{self.name}: {rotation.remark}"] = None
        graph.notes += remarks
        return graph


def _rotate(graph: Graph, heads: ValueHeads, rotation: Rotation) -> None:
    rows, columns = TurnGroups(rotation, heads.rows, 0), TurnGroups(rotation, heads.columns, 1)
    for node, position, recipe in ((heads.v, 1, rows), (heads.v, 2, rows), (heads.out, 1, columns)):
        old = node.args[position] if position < len(node.args) else None
        if isinstance(old, fx.Node):
            node.update_arg(position, graph.add_weight(f"{old.target}_rotated", recipe, str(old.target), like=node))


@dataclass(frozen=True, eq=False)
class TurnGroups:
    """w -> w with each group of places on one axis turned by Q.  groups: int64 [groups, width of Q]"""

    rotation: Rotation
    groups: Tensor
    axis: int

    def __call__(self, w: Tensor) -> Tensor:
        flat = self.groups.flatten().to(w.device)
        picked = w.index_select(self.axis, flat).movedim(self.axis, -1)
        turned = self.rotation.turn(picked.unflatten(-1, tuple(self.groups.shape))).flatten(-2).to(w.dtype)
        return w.index_copy(self.axis, flat, turned.movedim(-1, self.axis))
