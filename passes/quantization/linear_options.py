"""What quantize-linear, mixed-precision and shift-linear share: the options, which linears they may touch, and how one is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from ..scope import Scope, linears_in, why_not_chosen
from ..statistics import Request, Statistics
from . import reduced_range
from .gptq import DAMP
from .layer import Algorithm, LayerQuantizer, insert_quantized, x_tensors
from .scheme import SMALLEST_GROUP, Scheme, check_group_size
from .static_range import range_kinds, static_grid
from .stored import Tied, note_copy, why_not_stored


@dataclass(frozen=True, kw_only=True)
class Linears(GraphPass):
    """A pass that gives linears with stored weights others. Raises RecipeError for options that do not go together."""

    scope: Scope = "all"
    """"ffn": up, gate and down projections; "attention": q, k, v and output projections; "all"."""
    algorithm: Algorithm = "rtn"
    affine_correction: bool = False
    """Fit a scale and an offset per output channel on sampled inputs; they cost nothing at run time."""
    act_order: bool = True
    """gptq: channels with the largest inputs first."""
    damp: float = DAMP
    """gptq: added to the Gram's diagonal, as a share of its mean."""
    max_k: int = 16384
    """gptq: layers with more inputs are rounded to nearest; the work grows with the cube."""
    min_weights: int = 4096
    """Layers with fewer weights stay: quantizing their input costs more than their product."""
    only: tuple[str, ...] = ()
    """Module paths (prefixes) to quantize; none: all."""
    skip: tuple[str, ...] = ()
    """Module paths (prefixes) to leave as they are."""
    tied: Tied = "decline"
    """A weight another call reads too: "decline", or "copy" to give the linear codes of its own."""

    def __post_init__(self) -> None:
        if self.damp < 0:
            raise RecipeError(f"damp must not be negative, got {self.damp:g}")

    def kinds(self, scheme: Scheme) -> frozenset[str]:
        """Statistics of a layer's input that quantizing it by this scheme needs."""
        found = {"gram"} if self.algorithm == "gptq" else {"mean_square"} if scheme.op == "shift_linear" else set()
        return frozenset(found | ({"rows"} if self.affine_correction else set()))

    def linears(self, graph: Graph) -> list[fx.Node]:
        """Those of the scope, in graph order."""
        return linears_in(graph, self.scope)

    def requests_for(self, graph: Graph, schemes: Iterable[Scheme]) -> list[Request]:
        """What to gather for all linears that may be quantized by one of these schemes."""
        found = []
        for scheme in schemes:
            for node in self.linears(graph) if self.kinds(scheme) else []:
                if self.why_not(graph, node, scheme) is None and (kinds := self.kinds(scheme) - self._too_wide(node)):
                    found.append(Request(node.args[0].name, kinds))  # type: ignore[union-attr]
        return found

    def why_not(self, graph: Graph, node: fx.Node, scheme: Scheme) -> str | None:
        """One sentence why a linear can't be quantized by a scheme, or None."""
        w: Any = node.args[1]
        b: Any = argument(node, "bias")
        path = node.meta.get("path", "")
        if why := why_not_chosen(path, self.only, self.skip):
            return why
        if why := why_not_stored(graph, node, w, "weight", self.min_weights, self.tied):
            return why
        if b is not None and not graph.is_weight(b):
            return "its bias is computed, not stored"
        value = w.meta["val"]
        if value.dim() != 2:
            return f"its weight has {value.dim()} axes, a matrix has 2"
        return scheme.why_not(value.dtype, value.shape[1])

    def quantizer(self, node: fx.Node, scheme: Scheme, statistics: Statistics | None) -> LayerQuantizer:
        """How one linear is quantized, by the options and what is known of its input."""
        known = statistics[node.args[0]] if statistics is not None and self.kinds(scheme) - self._too_wide(node) else None  # type: ignore[index]
        algorithm = "rtn" if self._too_wide(node) else self.algorithm
        return LayerQuantizer(scheme, algorithm=algorithm, affine=self.affine_correction, act_order=self.act_order, damp=self.damp, known=known)

    def _too_wide(self, node: fx.Node) -> frozenset[str]:
        """{"gram"} for a layer that is rounded to nearest because of its size, else nothing."""
        return frozenset({"gram"}) if self.algorithm == "gptq" and inputs_of(node) > self.max_k else frozenset()

    def note_too_wide(self, graph: Graph, nodes: Iterable[fx.Node]) -> None:
        """Say in the graph's notes which layers were rounded to nearest because of their size."""
        if wide := [n.meta.get("path") or n.name for n in nodes if self._too_wide(n)]:
            graph.notes.append(f"rounded to nearest instead of gptq, with more than max_k = {self.max_k:,} inputs: {', '.join(wide)}")


@dataclass(frozen=True, kw_only=True)
class LinearOptions(Linears):
    """The same with the options of uniform codes."""

    clip: bool = False
    """Shrink each range as far as it lowers the error on sampled inputs (AWQ's clip search); not with hqq, which has a search of its own."""
    group_size: int = 128
    """Channels that share a scale in "-group" formats: a power of two from 16 on; halved for layers with fewer inputs."""
    range: str = "minmax"
    """Of int8-static: "minmax", "percentile:99.99" or "mse"."""
    real_zero_point: bool = False
    """hqq: zero points between two codes. onnxruntime then computes in float."""

    def __post_init__(self) -> None:
        super().__post_init__()
        range_kinds(self.range)
        check_group_size(self.group_size)
        if self.clip and self.algorithm == "hqq":
            raise RecipeError("clip and hqq both choose the grid; leave one of them out")

    def kinds(self, scheme: Scheme) -> frozenset[str]:
        found = super().kinds(scheme) | (range_kinds(self.range) if scheme.static else frozenset())
        return found | ({"rows"} if self.clip else frozenset())

    def quantizer(self, node: fx.Node, scheme: Scheme, statistics: Statistics | None) -> LayerQuantizer:
        found = super().quantizer(node, scheme, statistics)
        group = self.group_size
        while group > max(inputs_of(node), SMALLEST_GROUP):
            group //= 2
        grid = static_grid(found.known, scheme.activations, self.range) if scheme.static and found.known and scheme.activations else None
        return replace(found, group_size=group, clip=self.clip, real_zero_point=self.real_zero_point, x_grid=grid)


class Inserter:
    """Puts quantized ops into a graph; layers that read one value share its static grid."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self._grids: dict[fx.Node, dict[str, fx.Node]] = {}

    def insert(self, node: fx.Node, quantizer: LayerQuantizer, make: Any = None) -> None:
        """Replace one linear. make: what makes its tensors, if they are there already."""
        graph, x = self.graph, node.args[0]
        assert isinstance(x, fx.Node)
        self.context.apply(node)
        note_copy(graph, node, node.args[1])  # type: ignore[arg-type]
        if quantizer.scheme.weights.bits == reduced_range.BITS and reduced_range.SAYS not in graph.notes:
            graph.notes.append(reduced_range.SAYS)
        if quantizer.x_grid is not None and x not in self._grids:
            made = x_tensors(quantizer.x_grid)
            self._grids[x] = {key: graph.add_constant(f"{x.name}_{key.removeprefix('x_')}", t, like=x) for key, t in made.items()}
        path = node.meta.get("path") or node.name
        insert_quantized(graph, node, quantizer, self._grids.get(x, {}), lambda sentence: graph.notes.append(f"{path}: {sentence}"), make)


def inputs_of(node: fx.Node) -> int:
    """The number of input channels of a linear."""
    return int(node.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]
