"""How much attention blocks of queries pay blocks of keys on calibration inputs, and how much of it a pattern drops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...ir.graph import Flat, Graph
from ...ir.nodes import argument
from ...ir.ops.attention import seen

See = Callable[[fx.Node, Tensor, Tensor], None]
"""(attention, its weights [heads, queries, keys] for one input, which queries are real [queries])"""


def mean_mass(graph: Graph, batches: Sequence[Flat], counts: Mapping[fx.Node, int], block: int) -> dict[fx.Node, Tensor]:
    """[heads, blocks, blocks] for each attention: what a query of a block pays a block of keys, on average over its real queries; 0 where none was seen.

    counts: attention -> how many blocks. One input's weights are held at a time.
    """
    sums: dict[fx.Node, Tensor] = {}
    queries: dict[fx.Node, Tensor] = {}

    def see(node: fx.Node, weights: Tensor, real: Tensor) -> None:
        n = counts[node]
        size = n * block
        padded = F.pad(weights * real[:, None], (0, size - weights.shape[2], 0, size - weights.shape[1])).double()
        blocks = padded.unflatten(2, (n, block)).unflatten(1, (n, block)).sum((2, 4))
        rows = F.pad(real.double(), (0, size - len(real))).view(n, block).sum(1)
        sums[node] = sums.get(node, 0) + blocks
        queries[node] = queries.get(node, 0) + rows

    for flat in batches:
        _Looking(graph, set(counts), see).run(*flat, enable_io_processing=False)
    return {node: (total / queries[node].clamp(min=1)[:, None]).float() for node, total in sums.items()}


def dropped_mass(graph: Graph, batches: Sequence[Flat], patterns: Mapping[fx.Node, Tensor], block: int, dense: int) -> dict[fx.Node, tuple[float, float]]:
    """Mean and largest share of a query's attention that its pattern leaves out; the first `dense` queries lose nothing."""
    lost: dict[fx.Node, list[Tensor]] = {}

    def see(node: fx.Node, weights: Tensor, real: Tensor) -> None:
        pattern = patterns[node]
        n = pattern.shape[1]
        listed = torch.zeros(len(pattern), n, n + 1).scatter_(2, torch.where(pattern < 0, n, pattern), 1.0)[..., :n]
        shown = listed.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : weights.shape[1], : weights.shape[2]]
        missing = (weights * (1 - shown)).sum(-1)
        missing[:, :dense] = 0
        lost.setdefault(node, []).append(missing[:, real])

    for flat in batches:
        _Looking(graph, set(patterns), see).run(*flat, enable_io_processing=False)
    return {node: (float(torch.cat(found, 1).mean()), float(torch.cat(found, 1).max())) for node, found in lost.items()}


class _Looking(fx.Interpreter):
    """Runs a graph and shows the weights of some attentions, input by input."""

    def __init__(self, graph: Graph, nodes: set[fx.Node], see: See) -> None:
        super().__init__(graph.module)
        self.places, self.see = {n.name: n for n in nodes}, see

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            if n.name in self.places:
                self._look(self.places[n.name], n)
            return super().run_node(n)

    def _look(self, place: fx.Node, n: fx.Node) -> None:
        q, k, mask, causal, scale = (self._value(argument(n, name)) for name in ("q", "k", "key_mask", "causal", "scale"))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        for i in range(len(q)):
            one, other = q[i : i + 1], k[i : i + 1]
            hidden = seen(one, other, None if mask is None else mask[i : i + 1], causal, None)
            scores = (one @ other.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if hidden is not None:
                scores = scores.masked_fill(~hidden, -torch.inf)
            real = torch.ones(q.shape[2], dtype=torch.bool) if mask is None else mask[i]
            self.see(place, scores.softmax(-1).nan_to_num(0)[0].float(), real)

    def _value(self, argument: Any) -> Any:
        return self.env[argument] if isinstance(argument, fx.Node) else argument
