"""linear(x, w, b) -> a linear on codes of 8 bits and fewer: smaller weights and, where x is quantized too, integer products."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ..rewrite import Context
from ..statistics import Request
from .linear_options import Inserter, LinearOptions
from .reduced_range import reduced_range
from .scheme import Activations, Scheme, Weights, scheme


@dataclass(frozen=True)
class QuantizeLinear(LinearOptions):
    """Quantize linear layers: weights once; activations as they come, in a calibrated range, or not at all.

    Before:  linear(x, w, b)      After:  linear_int8_dynamic(x, codes, scale, b), or the op of another pair of formats:
      int8-channel / int8-dynamic             linear_int8_dynamic    one range for all of x, as it comes
      int8-channel / int8-static              linear_int8_static     one range for all of x, from calibration
      int{8,6,4}-channel / int{8,6,4}-token   linear_token           a range a token, as it comes
      int{8,4}-group / none                   linear_nbits           weights only, a scale and a zero point a group
      int{8,4}-channel / none                 linear_nbits           weights only, a scale a row
      fp8-channel / fp8-token                 linear_fp8             float8 E4M3, a scale a row and a token
    Algorithms: "rtn" rounds to nearest; "hqq" moves the grid to lower a p-norm of the error (no data); "gptq" lets later
    channels make up for the rounding of earlier ones (calibration's Gram). specs/quant_shiftadd.md 1, 3.13, 3.14, 3.17.
    Declines computed weights, weights other calls read too unless tied = "copy", half precision where activations have one 8-bit
    range, sums that could overflow 32 bits, layers below `min_weights`, and what `only` and `skip` leave out.
    On an x86 CPU without VNNI, 8-bit weights with quantized activations get 7 bits, and the graph's notes say so.
    Lossy: on MiniLM all 37 linears in int8-channel / int8-dynamic cost the mean embedding cosine about 0.004 (README's table).
    """

    weights: Weights = "int8-channel"
    activations: Activations = "int8-dynamic"

    name = "quantize-linear"
    exact = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme.op == "shift_linear":
            raise RecipeError(f"{self.weights} are shift-linear's weights; use that pass, or a choice of mixed-precision")

    @property
    def scheme(self) -> Scheme:
        """The formats and the op."""
        return scheme(self.weights, self.activations)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # what the options need: nothing for rtn and hqq with activations as they come
        return self.kinds(self.scheme)

    def requests(self, graph: Graph) -> list[Request]:
        return self.requests_for(graph, [self.scheme])

    def run(self, graph: Graph, context: Context) -> Graph:
        inserter, linears = Inserter(graph, context), self.linears(graph)
        there = reduced_range(self.scheme, context.target)
        whys = {node: self.why_not(graph, node, there) or context.ignored(node) for node in linears}
        self.note_too_wide(graph, [node for node, why in whys.items() if not why])
        for node, why in whys.items():
            if why:
                context.decline(node, why)
            else:
                inserter.insert(node, self.quantizer(node, there, context.statistics))
        return graph
