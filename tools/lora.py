"""Low-rank updates of weights while they are trained: w + 2 b a, merged into w in the end (LoRA, Hu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from ..ir.blocks.vocabulary import is_linear
from ..ir.errors import UsageError
from ..ir.graph import Graph

aten = torch.ops.aten

SCALE = 2.0
"""alpha / rank."""


class LowRankUpdates:
    """The matrices among `chosen` that the original has too and only linears read get a [out, rank] and b [rank, in] to be trained in their place.

    trained: what is to be trained now: two factors a matrix (b starts at zero: nothing changes at first), the vectors of `chosen` and what the original
    lacks; other matrices, such as embeddings, rest.
    merge: adds the products to the matrices and takes the factors out of the graph again.
    """

    def __init__(self, graph: Graph, original: Graph, chosen: Mapping[str, nn.Parameter], rank: int, seed: int = 0) -> None:
        self.graph = graph
        self._made: list[tuple[fx.Node, fx.Node, fx.Node, fx.Node]] = []
        rest: dict[str, nn.Parameter] = {}
        factors: dict[str, nn.Parameter] = {}
        theirs, held, generator = original.weights(), list(graph.weights().values()), torch.Generator().manual_seed(seed)
        for name, p in chosen.items():
            places = graph.fx.find_nodes(op="get_attr", target=name)
            users = [u for place in places for u in place.users]
            added = name not in theirs
            shared = sum(w is p for w in held) > 1
            if p.dim() != 2 or shared or added or theirs[name].shape != p.shape or not all(is_linear(u) and u.args[1] in places for u in users):
                if p.dim() < 2 or added:
                    rest[name] = p
                continue
            out, width = p.shape
            first = (torch.rand(rank, width, generator=generator, dtype=torch.float32) * 2 - 1) * (3 / width) ** 0.5
            a = graph.add_constant(f"{name}_a", first.to(p), like=users[0])
            b = graph.add_constant(f"{name}_b", p.new_zeros(out, rank), like=users[0])
            for place in places:
                update = graph.insert(aten.mm.default, b, a, before=min(place.users))
                new = graph.insert(aten.add.Tensor, place, update, alpha=SCALE, before=min(u for u in place.users if u is not update))
                place.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new, propagate_meta=False)
                self._made.append((place, a, b, new))
            for x in (a, b):
                factor = graph.weight(x)
                assert isinstance(factor, nn.Parameter)  # add_constant makes one of a float tensor
                factors[str(x.target)] = factor
        for name, p in chosen.items():
            p.requires_grad_(name in rest)
        self.trained = rest | factors
        if not self._made:
            raise UsageError("nothing to update by low rank: none of the weights chosen is a matrix of the original that linears read; lora = 0 trains them")
        graph.recompile()

    def merge(self) -> None:
        """Factors into their matrices."""
        merged: set[str] = set()
        for place, a, b, new in self._made:
            if str(place.target) not in merged:
                merged.add(str(place.target))
                with torch.no_grad():
                    self.graph.weight(place).add_(self.graph.weight(b) @ self.graph.weight(a), alpha=SCALE)
            new.replace_all_uses_with(place, propagate_meta=False)
        self.graph.clean()
