"""linear(x, w, b) -> shift_linear: weights of 4 bits that are powers of two, so that products are shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ...ir.ops.shift_linear import LARGEST
from ...ir.pot import unpack_codes
from ..made import add_made
from ..quantization.layer import LayerQuantizer
from ..quantization.linear_options import Inserter, Linears
from ..quantization.scheme import Scheme, scheme
from ..quantization.stored import note_copy, other_reader
from ..rewrite import Context, predicted
from ..statistics import Request

ours = torch.ops.rewright
NO_FASTER = "no faster than int8 weights, which round less: against those the codes buy smaller weights and modelled energy, not time"
FLOATS = "not faster: onnxruntime and torch make float weights of the codes, which buy a smaller file and modelled energy, not time"


@dataclass(frozen=True, kw_only=True)
class ShiftLinear(Linears):
    """Power-of-two weights for linear layers, after training or to be trained on.

    Before:  linear(x, w, b)      After:  shift_linear(x, codes, scale, b)      w ~ scale_n S_nk 2^P_nk, S in {-1, 0, 1}, P in 0 .. 6
    DeepShift's format (Elhoushi et al. 2021) fitted after training: nearest codes in the linear domain, a scale a row from a search
    and least squares, errors weighed by E[x^2]; "gptq" chooses codes by the inputs' Gram. A second term of 4 bits codes what the first left.
    specs/quant_shiftadd.md 4.1. An outlier-migration before it (weights = "pot4-channel") evens out columns, for which rows have no scale.
    train: leave the layers in the form that `finetune` trains, float weights seen rounded ("q") or exponents and signs ("ps");
    freeze-shift ends it. No CPU or GPU shifts faster than it multiplies bytes: backends run the codes as the 8-bit integers they are,
    exactly, and the notes say what that buys. Declines what quantize-linear declines. Lossy, much more than uniform codes of 8 bits:
    14 dB of a Gaussian weight with one term, 30 dB with two, against 42 dB (README's table has real models).
    """

    terms: int = 1
    """1 (4 bits a weight) or 2 (8 bits)."""
    activations: Literal["int8-dynamic", "int8-token", "none"] = "int8-dynamic"
    algorithm: Literal["rtn", "gptq"] = "rtn"  # pyright: ignore[reportIncompatibleVariableOverride]
    calibrated: bool = True
    """Weigh each input channel's errors by its mean square; False: all alike, without calibration data."""
    train: Literal["none", "q", "ps"] = "none"

    name = "shift-linear"
    exact = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms not in (1, 2):
            raise RecipeError(f"terms is 1 (4 bits a weight) or 2 (8 bits), got {self.terms}")
        if self.train == "ps" and self.terms != 1:
            raise RecipeError('train = "ps" has one term, an exponent and a sign a weight; with two, take train = "q"')
        if self.train != "none" and self.affine_correction:
            raise RecipeError("affine_correction corrects finished codes; leave it out where the layers are to be trained")
        if self.algorithm == "gptq" and not self.calibrated:
            raise RecipeError("gptq reads the inputs' Gram; leave calibrated = true")
        if self.train == "q" and self.algorithm == "gptq":
            raise RecipeError('train = "q" starts from the float weights rounded to nearest; gptq would be lost')

    @property
    def scheme(self) -> Scheme:
        """The formats and the op."""
        return scheme(f"pot{4 * self.terms}-channel", self.activations)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # what the options need
        return self.kinds(self.scheme)

    def kinds(self, scheme: Scheme) -> frozenset[str]:
        return super().kinds(scheme) - (frozenset() if self.calibrated else {"mean_square"})

    def requests(self, graph: Graph) -> list[Request]:
        return self.requests_for(graph, [self.scheme])

    def run(self, graph: Graph, context: Context) -> Graph:
        before = None if context.predict is None else context.predict(graph)
        inserter, linears = Inserter(graph, context), self.linears(graph)
        whys = {node: self.why_not(graph, node, self.scheme) or context.ignored(node) for node in linears}
        self.note_too_wide(graph, [node for node, why in whys.items() if not why])
        stored = 0
        for node, why in whys.items():
            if why:
                context.decline(node, why)
                continue
            stored += node.args[1].meta["val"].numel()  # type: ignore[union-attr]
            quantizer = self.quantizer(node, self.scheme, context.statistics)
            if self.train == "none":
                inserter.insert(node, quantizer)
            else:
                context.apply(node)
                _insert_trainable(graph, node, quantizer, self.train)
        if stored and context.only is None:
            graph.notes.append(f"shift-linear: {stored:,} weights of {4 * self.terms} bits; {self._speed(before, graph, context)}")
        return graph

    def _speed(self, before: float | None, graph: Graph, context: Context) -> str:
        """What the codes buy in time, in words: on processors that multiply, never more than 8-bit integers do."""
        if self.train != "none":
            return "to be trained in float before freeze-shift makes them codes"
        if self.activations == "none":
            return FLOATS
        if before is None or context.predict is None:
            return "no target, so nothing is said of time; backends multiply the codes as 8-bit integers"
        after = context.predict(graph)
        times = f"{predicted(before, after)} before on {context.target_name}"
        if after >= before:
            return f"not faster: {times}; the codes buy smaller weights and additions for multiplications (modelled energy), not time"
        if self.terms == 1:
            return f"{times}; {NO_FASTER}"
        return f"{times}, slower than int8 weights, which round less and take one product, not two; the codes buy modelled energy, not time"


def _insert_trainable(graph: Graph, linear: fx.Node, quantizer: LayerQuantizer, how: Literal["q", "ps"]) -> None:
    """Put shift_linear_q or shift_linear_ps in the place of a linear, over parameters of the graph."""
    x, w, b = linear.args[0], linear.args[1], argument(linear, "bias")
    assert isinstance(w, fx.Node)
    stem, form = str(w.target), quantizer.scheme.activations_name
    if other_reader(linear, w) is not None:
        note_copy(graph, linear, w)
        w = graph.add_weight(f"{stem}_own", torch.clone, stem, like=linear)
    names = {"largest": f"{stem}_largest"} | ({"shift": f"{stem}_shift", "sign": f"{stem}_sign"} if how == "ps" else {})
    made = add_made(graph, _Trainable(quantizer), [stem], names, linear)
    weights, op = ((w,), ours.shift_linear_q) if how == "q" else ((made["shift"], made["sign"]), ours.shift_linear_ps)
    new = graph.insert(op.default, x, *weights, made["largest"], b, form, before=linear)
    linear.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(linear)


@dataclass(frozen=True)
class _Trainable:
    """What training starts from: fitted scales, and for shift_linear_ps exponents and signs of fitted codes, zeros at the exponent 0."""

    quantizer: LayerQuantizer

    def __call__(self, w: Tensor) -> dict[str, Tensor]:
        made: Any = self.quantizer(w)
        largest = made["scale"] * LARGEST
        if w.is_meta:
            return {"shift": torch.empty_like(w), "sign": torch.empty_like(w), "largest": largest}
        codes = unpack_codes(made["w"][0], w.shape[1]).to(w.dtype)
        return {"shift": codes.abs().clamp(min=1).log2(), "sign": codes.sign(), "largest": largest}
