"""What a graph's arithmetic and memory traffic would cost in energy on an ASIC, from a published table: modelled, never measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .cost import NodeCost, node_costs, numel, sizer, terms_of
from .graph import Graph
from .nodes import arguments

PICOJOULES = {
    "fp32 mul": 3.7,
    "fp32 add": 0.9,
    "int8 mul": 0.2,
    "int8 add": 0.03,
    "int32 add": 0.1,
    "int32 shift": 0.13,
    "int8 shift": 0.024,
    "DRAM byte": 100.0,  # 200 for 16 bits
}
"""Of one operation, and of one byte from or to DRAM. Arithmetic and DRAM: M. Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm. Shifts:
as H. You et al., "ShiftAddViT", NeurIPS 2023, take them."""

SOURCE = "Horowitz, ISSCC 2014, 45 nm; shifts as in ShiftAddViT"

CAPTION = f"modelled, not measured: arithmetic and DRAM traffic on an ASIC ({SOURCE}), every operand read once and every result written once"
"""Stands beside every figure of this file that people see."""


@dataclass(frozen=True)
class Energy:
    """Modelled picojoules of one call or a sum."""

    node: str
    op: str
    layer: str
    multiplications: float = 0.0
    additions: float = 0.0
    shifts: float = 0.0
    memory: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.multiplications + self.additions + self.shifts + self.memory


def energy(graph: Graph, sizes: Mapping[str, int] | None = None) -> list[Energy]:
    """The modelled energy of every call in order; `CAPTION` says what it is. `sizes`: dim name -> size, default the example's.

    A multiply-add of a product (linear, convolution, attention, match) counts, by the op:
    - floats of any width (fp8 too: the table has none narrower): an fp32 multiplication and an fp32 addition
    - linear_int8_*, linear_token: an int8 multiplication, an int32 addition
    - shift_linear, _q, _ps: for every term a 32-bit shift (a code shifted left takes 14 bits) and an int32 addition, fp32 of float activations
    - ternary_linear: an int32 addition, fp32 of float activations; weights of 0 count as any other
    - shift_add_attention: an fp32 addition in its two products with codes 0 and 1, a multiply-add in its filter
    Quantized linears add an fp32 multiplication for every value that is rounded and for every sum and term that is scaled. All other
    calls: half of ir/cost's FLOPs are multiplications, half additions, in fp32. Memory: ir/cost's bytes, packed weights as they are packed.
    """
    nodes, size = {n.name: n for n in graph.nodes}, sizer(graph, sizes)
    return [_of(c, nodes[c.node], size) for c in node_costs(graph, sizes)]


def total(rows: Iterable[Energy]) -> Energy:
    """The sum."""
    rows = list(rows)
    return Energy("total", "", "", *(sum(getattr(r, part) for r in rows) for part in PARTS))


PARTS = ("multiplications", "additions", "shifts", "memory")


def _of(c: NodeCost, node: fx.Node, size: Callable[[Any], int]) -> Energy:
    pj = {"mul": 0.0, "add": 0.0, "shift": 0.0}
    for operation, count in _operations(c, node, size).items():
        pj[operation.split()[1]] += count * PICOJOULES[operation]
    return Energy(c.node, c.op, c.layer, pj["mul"], pj["add"], pj["shift"], c.cost.bytes * PICOJOULES["DRAM byte"])


def _operations(c: NodeCost, node: fx.Node, size: Callable[[Any], int]) -> Mapping[str, int]:
    """How many of each of the table's operations one call does."""
    half = c.cost.flops // 2  # of a product: its multiply-adds
    if c.op == "shift_add_attention":
        a = arguments(node)
        out, width, taps = numel(node.meta["val"], size), size(a["q"].meta["val"].shape[-1]), size(a["conv"].meta["val"].shape[-1])
        return {"fp32 add": 2 * out * width + out * taps + 4 * out, "fp32 mul": out * taps + 4 * out}
    if c.op not in (*QUANTIZED, *SHIFTS, "ternary_linear"):
        return {"fp32 mul": half, "fp32 add": c.cost.flops - half}
    x, integers = arguments(node)["x"].meta["val"], c.dtype == torch.int8
    rounded, sums = (numel(x, size) if integers else 0), numel(node.meta["val"], size)
    added = "int32 add" if integers else "fp32 add"
    if c.op in SHIFTS:
        terms = terms_of(node)
        products = sums * size(x.shape[-1]) * terms
        return {"int32 shift": products, added: products, "fp32 mul": rounded + sums * terms}
    if c.op == "ternary_linear":
        return {added: half, "fp32 mul": rounded + sums}
    return {"int8 mul": half, "int32 add": half, "fp32 mul": rounded + sums}


QUANTIZED = ("linear_int8_dynamic", "linear_int8_static", "linear_token")
SHIFTS = ("shift_linear", "shift_linear_q", "shift_linear_ps")
