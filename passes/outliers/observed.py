"""What a choice of (s, z) for one edge is made from: ranges and sampled rows of X, and the weights that read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.edges import Edge
from ...ir.errors import UsageError
from ...ir.graph import Graph
from ..statistics import ValueStatistics
from .migrate import HIGHEST, LOWEST, tied

_MOST_OUTPUTS = 2048  # rows of the weights a search multiplies with: all but a vocabulary's


@dataclass(frozen=True)
class Observed:
    """One edge as calibration saw it; numbers of tied channels are already their class's.

    low, high, mean_abs, weight_absmax: [channels], float64. weight_absmax is over the rows of all consumers.
    rows: [n, channels] float32, sampled.   weights: [outputs, channels] float32, of all consumers, at most 2048 rows, evenly taken.
    pot: whether s is rounded to powers of two.
    """

    low: Tensor
    high: Tensor
    weight_absmax: Tensor
    mean_abs: Tensor | None = None
    rows: Tensor | None = None
    weights: Tensor | None = None
    pot: bool = False

    @property
    def absmax(self) -> Tensor:
        """[channels]: max |x|"""
        return torch.maximum(self.high, -self.low)

    @property
    def center(self) -> Tensor:
        """[channels]: the middle of each channel's range."""
        return (self.high + self.low) / 2

    def settled(self, s: Tensor) -> Tensor:
        """s as an edge can take it: 1 for dead channels, within 1e-4 .. 1e4, a power of two where asked for."""
        s = torch.where((self.absmax > 0) & s.isfinite() & (s > 0), s, 1.0)
        if not self.pot:
            return s.clamp(LOWEST, HIGHEST)
        return torch.exp2(torch.round(torch.log2(s)).clamp(math.ceil(math.log2(LOWEST)), math.floor(math.log2(HIGHEST))))


def observe(graph: Graph, edge: Edge, seen: ValueStatistics, stored: Mapping[str, Tensor] | None, *, ties: bool, pot: bool, kinds: frozenset[str]) -> Observed:
    """What is known of an edge. Its weights are read as they are now, so that edits of other edges count.

    stored: the data of a graph without; ties: whether tied channels get common numbers; kinds: statistics there are beside the range.
    Raises UsageError when a weight has no data.
    """
    weights = [_matrix(graph, node, stored or {}) for node in edge.linears]
    absmax = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()
    low, high, mean_abs = seen.present_min, seen.present_max, seen.mean_abs if "mean_abs" in kinds else None
    if ties:
        low, high, absmax = tied(low, edge.ties, "amin"), tied(high, edge.ties, "amax"), tied(absmax, edge.ties, "amax")
        mean_abs = None if mean_abs is None else tied(mean_abs, edge.ties, "sum")
    if "rows" not in kinds:
        return Observed(low, high, absmax, mean_abs, pot=pot)
    step = math.ceil(sum(map(len, weights)) / _MOST_OUTPUTS)
    return Observed(low, high, absmax, mean_abs, seen.rows.float(), torch.cat([w[::step].float() for w in weights]), pot)


def _matrix(graph: Graph, node: fx.Node, stored: Mapping[str, Tensor]) -> Tensor:
    """[outputs, channels]: a linear's weight; a convolution's, every place of its kernel an output; all experts'."""
    weight: Any = node.args[1]
    try:
        w = graph.weight_from(str(weight.target), stored).detach()
    except KeyError as error:
        raise UsageError(f"{error.args[0]} has no data; give calibration a WeightStore of the weights") from error
    if node.target is torch.ops.rewright.grouped_linear.default:
        return w.transpose(1, 2).flatten(0, 1)
    return w.movedim(1, -1).flatten(0, -2)
