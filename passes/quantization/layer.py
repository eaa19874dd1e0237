"""One linear layer's weights as the tensors of a quantized op, by any of the algorithms; run at once, or later as recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.formats import Grid, grid
from ...ir.graph import Graph
from ...ir.nodes import argument
from ...ir.pot import BITS
from ..made import Make, add_made
from ..shiftadd.shift_codes import shift_tensors
from ..statistics import ValueStatistics
from .affine_correction import affine_correction
from .clip import clipped_grid
from .codes import Quantized, as_nbits, as_rows, blocks, rounded
from .gptq import DAMP, gptq_codes
from .hqq import hqq_grid
from .scheme import Scheme

Algorithm = Literal["rtn", "hqq", "gptq"]
Say = Callable[[str], None]


def _silent(sentence: str) -> None:
    pass


@dataclass(frozen=True)
class LayerQuantizer:
    """How a linear becomes `scheme.op`: first a grid for each row or group, then codes on it.

    known: statistics of its input, for "gptq" (gram), `clip` and `affine` (rows). They are read when it is called.
    x_grid: the calibrated grid of a static scheme's activations. say: hears what a user should know.
    """

    scheme: Scheme
    group_size: int = 128
    algorithm: Algorithm = "rtn"
    clip: bool = False
    affine: bool = False
    real_zero_point: bool = False
    act_order: bool = True
    damp: float = DAMP
    known: ValueStatistics | None = None
    x_grid: Grid | None = None
    say: Say = field(default=_silent, repr=False)

    def __call__(self, w: Tensor, b: Tensor | None = None) -> dict[str, Tensor]:
        """w [out, in], b [out] -> the op's "w", "scale" and, where it has them, "zero_point" and "b". Shapes only on the meta device."""
        full = w if w.dtype == torch.float32 else w.float()
        tensors = self._powers(full) if self.scheme.op == "shift_linear" else self._uniform(full, w.dtype)
        tensors = {name: t.to(w.dtype) if t.dtype == torch.float32 else t for name, t in tensors.items()}
        if b is not None:
            tensors["b"] = b
        return self._corrected(w, tensors) if self.affine else tensors

    def _uniform(self, w: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        on = _stored_in(self._grid(w), dtype)
        q = Quantized(self._codes(w, on), on)
        grouped = self.scheme.op == "linear_nbits"
        return as_nbits(q, self.scheme.weights, w.shape[1], self.group_size, self._real_zero_point) if grouped else as_rows(q, w.shape[1])

    def _powers(self, w: Tensor) -> dict[str, Tensor]:
        known = None if w.is_meta else self.known
        gram = known.gram if known is not None and self.algorithm == "gptq" else None
        importance = known.mean_square if known is not None and gram is None else None
        return shift_tensors(w, self.scheme.weights.bits // BITS, importance, gram, self.damp, self.act_order, self.say)

    @property
    def _real_zero_point(self) -> bool:
        return self.algorithm == "hqq" and self.real_zero_point

    def _grid(self, w: Tensor) -> Grid:
        form = self.scheme.weights
        if self.algorithm == "hqq":
            return hqq_grid(w, form, self.group_size, self._real_zero_point)
        if self.clip and not w.is_meta:
            assert self.known is not None
            return clipped_grid(w, form, self.group_size, self.known.rows)
        return grid(blocks(w, form, self.group_size), form)

    def _codes(self, w: Tensor, on: Grid) -> Tensor:
        form = self.scheme.weights
        if self.algorithm == "gptq" and not w.is_meta:
            assert self.known is not None
            return gptq_codes(w, on, form, self.group_size, self.known.gram, self.damp, self.act_order, self.say)
        return rounded(blocks(w, form, self.group_size), on, form)

    def _corrected(self, w: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale and bias after affine correction on the sampled rows."""
        b = tensors.get("b")
        if w.is_meta:
            return {**tensors, "b": w.new_empty(len(w)) if b is None else b}
        assert self.known is not None
        x = self.known.rows.to(w.dtype)
        without = {name: t for name, t in tensors.items() if name != "b"}
        a, c = affine_correction(torch.nn.functional.linear(x, w), self.run(x, without))
        scale = tensors["scale"].double()
        corrected = c if b is None else b.double() + c
        rows = a if self.scheme.op == "shift_linear" else a.view(-1, *[1] * (scale.dim() - 1))
        return {**tensors, "scale": (scale * rows).to(w.dtype), "b": corrected.to(w.dtype)}

    def run(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """What the layer computes with these tensors."""
        static = {} if self.x_grid is None else x_tensors(self.x_grid)
        return getattr(torch.ops.rewright, self.scheme.op)(*self.arguments(x, {**static, **tensors}))

    def arguments(self, x: Any, t: dict[str, Any]) -> tuple[Any, ...]:
        """The op's arguments from tensors, or nodes, by name."""
        match self.scheme.op:
            case "linear_int8_static":
                return x, t["x_scale"], t["x_zero_point"], t["w"], t["scale"], t.get("b")
            case "linear_token":
                assert self.scheme.activations is not None
                return x, t["w"], t["scale"], t.get("b"), self.scheme.activations.bits
            case "linear_nbits":
                return x, t["w"], t["scale"], t.get("zero_point"), t.get("b"), self.scheme.weights.bits, self.group_size
            case "shift_linear":
                return x, t["w"], t["scale"], t.get("b"), self.scheme.activations_name
        return x, t["w"], t["scale"], t.get("b")


def x_tensors(on: Grid) -> dict[str, Tensor]:
    """A static grid as the op takes it."""
    return {"x_scale": on.scale.float(), "x_zero_point": on.zero_point.to(torch.uint8)}


def _stored_in(on: Grid, dtype: torch.dtype) -> Grid:
    """The grid its stored scales stand for: codes are chosen for these."""
    return on if dtype == torch.float32 else Grid(on.scale.to(dtype).float(), on.zero_point)


def insert_quantized(
    graph: Graph, linear: fx.Node, quantizer: LayerQuantizer, x_grid: Mapping[str, fx.Node], say: Say = _silent, make: Make | None = None
) -> None:
    """Put the quantized op in the place of a linear.

    x_grid: the nodes of `x_tensors`, for a static scheme. make: what makes the tensors; by default the quantizer, which tells `say`.
    """
    x, w, b = linear.args[0], linear.args[1], argument(linear, "bias")
    assert isinstance(w, fx.Node)
    stem, path = str(w.target), linear.meta.get("path") or linear.name
    names = {"w": f"{stem}_{quantizer.scheme.weights.kind}{quantizer.scheme.weights.bits}", "scale": f"{stem}_scale", "zero_point": f"{stem}_zero_point"}
    sources = [stem]
    if quantizer.affine:
        names["b"] = f"{path}.corrected_bias"
        sources += [] if b is None else [str(b.target)]
    if make is None:
        make = quantizer if graph.weight(w).is_meta else replace(quantizer, say=say)  # a recipe runs when nobody listens
    nodes = {"b": b, **x_grid, **add_made(graph, make, sources, names, linear)}
    target = getattr(torch.ops.rewright, quantizer.scheme.op).default
    new = graph.insert(target, *quantizer.arguments(x, nodes), before=linear)
    linear.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(linear)
