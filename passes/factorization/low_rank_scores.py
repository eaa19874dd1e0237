"""What a score says of linears, from their weights and statistics: which errors cost, and how much each rank takes off them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks import ffn_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import UsageError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context
from ..statistics import Moments
from .allocation import Layer, Method
from .low_rank_factors import Data
from .whitening import Inputs, Outputs, errors, spectrum

if TYPE_CHECKING:
    from .low_rank import LowRank

Score = Literal["plain", "asvd", "whitened", "fisher", "two-sided"]
Side = Literal["out", "in", "both"]


class Scores:
    """The score of one run of low-rank."""

    def __init__(self, options: LowRank, graph: Graph, context: Context) -> None:
        self.options, self.graph, self.context = options, graph, context

    def of(self, linears: Sequence[fx.Node], moments: Moments | None) -> list[Data]:
        """What is known of linears that read one value, each by itself."""
        inputs = [self._inputs(node, moments) for node in linears]
        tall = any(node.args[1].meta["val"].shape[0] > node.args[1].meta["val"].shape[1] for node in linears)  # type: ignore[union-attr]
        if len(linears) > 1 and tall and self.options.score in ("whitened", "two-sided") and not self.graph.on_meta:
            inputs = [inputs[0].rooted()] * len(linears)  # one decomposition for all; a recipe would keep it
        return [Data(moments, i, (self._outputs(node),)) for node, i in zip(linears, inputs)]

    def target(self, node: fx.Node, moments: Moments | None) -> Tensor:
        """The matrix to be factorised in place of a linear's, float64."""
        w, b = self.context.weight(self.graph, node.args[1]), argument(node, "bias")
        if moments is None:
            return w.double()
        return moments.target(w, w.new_zeros(len(w)) if b is None else self.context.weight(self.graph, b), self.options.affine, self.options.ridge)[0]

    def layers(self, linears: Mapping[fx.Node, tuple[int, int]], method: Method) -> list[Layer]:
        """What linears of [m, n] lose with every rank: in the original program, ranks are shared out before anything is rewritten."""
        influences = self._influences() if method.endswith("influence") else {}
        found, most = [], 0.0
        for i, (node, (m, n)) in enumerate(linears.items()):
            left, singular = torch.linspace(1, 0, min(m, n) + 1, dtype=torch.float64), None
            if method.startswith("waterfill") or method == "welore":
                self.context.progress(f"{self.options.name}: spectrum of {path_of(node)}", i, len(linears))
                values = self._spectrum(node)
                left, singular = errors(values), _scaled(values.sqrt())
                if self.options.score in ("fisher", "two-sided"):  # in units of the loss, which are those of every layer
                    left, most = left * values.sum(), max(most, float(values.sum()))
            found.append(Layer(left, m + n, m * n, influence=influences.get(node), spectrum=singular))
        return [replace(layer, errors=layer.errors / most) for layer in found] if most else found

    def _spectrum(self, node: fx.Node) -> Tensor:
        moments = None
        if self.options.needs_moments:
            seen = self._statistics(node.args[0])
            moments = Moments(seen.gram, seen.mean)
        return spectrum(self._outputs(node).weigh(self.context.weight(self.graph, node.args[1]).double()), self._inputs(node, moments))

    def _inputs(self, node: fx.Node, moments: Moments | None) -> Inputs:
        options = self.options
        if options.score == "asvd":
            return Inputs(self._statistics(node.args[0]).mean_abs)  # S = diag(mean |x|^(1/2))
        if options.score == "fisher" and options.side in ("in", "both"):
            columns = self._statistics(node.args[1]).gradient_square[1]
            return Inputs(columns if options.side == "in" else columns / columns.mean().clamp(min=torch.finfo(columns.dtype).tiny))
        if options.score in ("whitened", "two-sided"):
            assert moments is not None
            return Inputs(moments.gram, moments.mean if options.affine else None, options.shrink)
        return Inputs()

    def _outputs(self, node: fx.Node) -> Outputs:
        if self.options.score == "fisher" and self.options.side in ("out", "both"):
            return Outputs.of_channels(self._statistics(node.args[1]).gradient_square[0])
        if self.options.score == "two-sided":
            return Outputs.of_gram(self._statistics(node).gradient_gram)
        return Outputs()

    def _influences(self) -> dict[fx.Node, float]:
        found = {}
        for up, gate, down, terms in ((b.up, b.gate, b.down, b.residual_terms) for b in ffn_blocks(self.graph)):
            if terms is not None:
                found |= dict.fromkeys(_nodes(up, gate, down), self._statistics(terms[2]).influence)
        return found

    def _statistics(self, value: Any) -> Any:
        if self.context.statistics is None:
            raise UsageError("low-rank reads statistics of the layers and there are none; give calibration data, or score = plain and affine = false")
        return self.context.statistics[value]


def _scaled(singular: Tensor) -> Tensor:
    """Least to largest as 0 to 1."""
    spread = singular[0] - singular[-1]
    return (singular - singular[-1]) / spread if spread > 0 else torch.ones_like(singular)


def _nodes(*maybe: fx.Node | None) -> Iterable[fx.Node]:
    return (n for n in maybe if n is not None)
