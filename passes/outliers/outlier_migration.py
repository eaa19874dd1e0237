"""X -> (X - z) / s on the inputs of linears, undone in their weights: outlier channels move out of what will be quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ir.blocks.edges import Edge, edges
from ...ir.errors import UsageError
from ...ir.formats import ACTIVATIONS
from ...ir.graph import Graph
from ..quantization.scheme import Activations, Powers, Weights
from ..rewrite import Context, GraphPass
from ..statistics import Request
from .awq import awq
from .fp_preshift import fp_preshift
from .migrate import Explicit, Road, migrate, road
from .objective import Candidate, Objective
from .observed import Observed, observe
from .osplus import osplus
from .reparam import Statistic, reparam
from .smoothquant import smoothquant, smoothquant_bias, smoothquant_search

Method = Literal["osplus", "smoothquant", "smoothquant-search", "smoothquant-bias", "reparam", "awq", "fp-preshift"]
Site = Literal["norm-linear", "value-output", "up-down", "linear-relu-linear", "hidden"]

_SEARCHES = ("osplus", "smoothquant-search", "awq")
_SHIFTS = ("osplus", "smoothquant-bias", "reparam")


@dataclass(frozen=True)
class OutlierMigration(GraphPass):
    """Scale and shift the channels of activations so that the quantizer to come loses less; the function stays.

    Before:  y = linear(x, W, b)      After:  y = linear((x - z) / s, W s, b + W z), with 1/s and -z in what makes x
    What makes x: a norm's weight and bias, the rows of a linear or convolution (through ReLU, pooling, attention, the ungated side of a
    gate), the columns of an embedding, the constants of a LayerScale, a sum or a batch norm (ir.blocks.absorbers).
    method, how s and z are chosen:
      osplus              z centres each channel, s shrinks those wider than a threshold, searched     Wei et al. 2023
      smoothquant         s = max|x|^alpha / max|w|^(1 - alpha)                                        Xiao et al. 2023
      smoothquant-search  the same, alpha searched
      smoothquant-bias    smoothquant's s, z centres                                                   MPTQ-ViT, 2024
      reparam             every channel gets the `stat` of all channels' quantizers                    RepQ-ViT 2023, DopQ-ViT 2024
      awq                 s = E|x|^r, r searched                                                       Lin et al. 2024
      fp-preshift         powers of two, for fp8                                                       LLM-FP4, Liu et al. 2023
    Ranges count padding: a quantizer that finds its range at run time sees it too, and padded tokens can be the widest of all
    (on MiniLM three times as wide as any other in one channel).
    Searches minimise the error of the consumers' outputs on sampled rows with X~ in `activations` and W~ in `weights`.
    shift: "auto" wherever z can be absorbed (or stand as an op, see explicit), or "never".
    explicit, for x that can't change for its linears alone (a post-norm feeds the next residual sum, GELU lets no factor pass):
    "never" leaves it; "linear" puts a subtraction and a multiplication by constants on the linear edges, an op each at run time;
    "restore" changes x and gives s x~ + z to its other readers.
    pot_scales: s rounded to powers of two, with which s alone is bit-exact.
    Declines matrices that other calls read too (tied embeddings, ALBERT's layers), computed weights, values another op reads
    (explicit = "never"), a shift through RMS norms, gates, ReLU, zero padding, experts without bias, and attention in which a query
    may see no key; and says "scaled only" where s went without the z the method wants.
    """

    method: Method = "osplus"
    alpha: float = 0.5
    stat: Statistic = "mean"
    shift: Literal["auto", "never"] = "auto"
    sites: tuple[Site, ...] = ("norm-linear", "value-output", "up-down", "linear-relu-linear", "hidden")
    explicit: Explicit = "never"
    pot_scales: bool = False
    weights: Weights | Powers = "int8-channel"
    activations: Activations = "int8-dynamic"
    group_size: int = 128
    grid: int = 32
    max_rows: int = 512

    name = "outlier-migration"
    exact = True
    requires: ClassVar[frozenset[str]] = frozenset({"present_min", "present_max", "mean_abs", "rows"})

    def requests(self, graph: Graph) -> Sequence[Request]:
        """Of the values on the edges of `sites` that can be migrated, what the method reads."""
        return [Request(e.value.name, self._kinds, _axis(e)) for e in self._edges(graph) if not isinstance(road(e, self.explicit).scale, str)]

    @property
    def _kinds(self) -> frozenset[str]:
        return frozenset({"present_min", "present_max"} | ({"rows"} if self.method in _SEARCHES else set()) | ({"mean_abs"} if self.method == "awq" else set()))

    def _edges(self, graph: Graph) -> list[Edge]:
        return [e for e in edges(graph) if e.site in self.sites]

    def run(self, graph: Graph, context: Context) -> Graph:
        # Statistics are of the graph as it came and hold throughout: migrating one edge changes its own X alone, what its linears and
        # other readers compute stays. Weights are read when an edge's turn comes, for one's consumer may be the next one's producer.
        statistics, stored = context.statistics, context.calibration.weights if context.calibration is not None else None
        if statistics is None:
            raise UsageError(f"{self.name} chooses scales from statistics; run it in a Pipeline with calibration=Calibration(batches)")
        for edge in self._edges(graph):
            consumer, way = edge.linears[0], road(edge, self.explicit)
            if isinstance(way.scale, str):
                context.decline(consumer, way.scale)
                continue
            seen = observe(graph, edge, statistics.of(edge.value, _axis(edge)), stored, ties=way.tied, pot=self._pot, kinds=self._kinds)
            s, z = self._choose(seen, way)
            if bool((s == 1).all()) and z is None:
                context.decline(consumer, f"{self.method} found nothing to gain: s = 1 is best")
            elif why := _overflows(graph, edge, seen.weight_absmax, s, stored):
                context.decline(consumer, why)
            else:
                migrate(graph, edge, s, z, self.explicit)
                context.apply(consumer)
                if z is None and self.method in _SHIFTS and self.shift == "auto" and isinstance(way.shift, str):
                    context.decline(consumer, f"scaled only: {way.shift}")
        return graph

    @property
    def _pot(self) -> bool:
        return self.pot_scales or self.method == "fp-preshift"

    def _choose(self, seen: Observed, way: Road) -> Candidate:
        shift = self.shift == "auto" and not isinstance(way.shift, str)
        if self.method in _SEARCHES:
            objective = Objective(seen, self.weights, self.activations, self.group_size, self.max_rows)
            if self.method == "osplus":
                return osplus(objective, self.grid, shift)
            return awq(objective, self.grid) if self.method == "awq" else smoothquant_search(objective, self.grid)
        if self.method == "reparam":
            form = ACTIVATIONS[self.activations]
            return reparam(seen, self.stat, 8 if form is None else form.bits, shift)
        if self.method == "fp-preshift":
            return fp_preshift(seen), None
        if self.method == "smoothquant-bias" and shift:
            return smoothquant_bias(seen, self.alpha)
        return smoothquant(seen, self.alpha), None


def _axis(edge: Edge) -> int:
    """The channel axis as requests name it: -1 for the last, so that quantizers share the answer."""
    return -1 if edge.axis == edge.value.meta["val"].dim() - 1 else edge.axis


def _overflows(graph: Graph, edge: Edge, weight_absmax: Tensor, s: Tensor, stored: Mapping[str, Tensor] | None) -> str | None:
    for node in edge.linears:
        dtype = node.args[1].meta["val"].dtype  # type: ignore[union-attr]
        if float((weight_absmax * s).max()) > torch.finfo(dtype).max:
            return f"its scaled weights would reach {float((weight_absmax * s).max()):.3g}, more than {dtype} holds"
    return None
