"""Layers cut out of a program, each with the rewrites it could have: what they take and what they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ...ir.blocks import ffn_blocks
from ...ir.blocks.vocabulary import path_of, reads
from ...ir.cost import cost
from ...ir.graph import Graph
from ..rewrite import Context, Pass
from ..scope import linears_in
from ..statistics import Request, Statistics


@dataclass
class Option:
    """A choice for one layer at one ratio; no step: the layer as it is."""

    label: str
    step: Pass | None
    price: float
    error: float


@dataclass
class Layer:
    """A part of the program between one value and what is made of it. price: in the unit of the budget; seconds: predicted."""

    name: str
    start: fx.Node
    outputs: list[fx.Node]
    stream: tuple[fx.Node, fx.Node, fx.Node] | None
    """What the layer's result is added to, the result, their sum."""
    part: Graph
    price: float
    seconds: float | None
    options: list[Option] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def names(self) -> frozenset[str]:
        """Of the nodes in it."""
        return frozenset(n.name for n in self.part.nodes)

    def run(self, part: Graph, x: Tensor) -> list[Tensor]:
        """The layer, or what stands for it, on rows [rows, channels]: its outputs as rows."""
        lead = self.start.meta["val"].dim() - 2
        return [y.flatten(0, -2) for y in part.run((x.reshape(*[1] * lead, *x.shape),))]


Place = tuple[str, fx.Node, list[fx.Node], tuple[fx.Node, fx.Node, fx.Node] | None]
"""(name, the value a layer starts from, the values it ends in, `stream` as Layer has it)."""


def places(graph: Graph, scope: str) -> Iterator[Place]:
    """All layers of a scope, in graph order."""
    blocks = [b for b in ffn_blocks(graph) if b.gate is None or reads(b.gate) is reads(b.up)]
    found: list[Place] = [(b.layer or path_of(b.down), reads(b.up), [b.down], b.residual_terms) for b in blocks]
    if scope == "all":
        sharing: dict[fx.Node, list[fx.Node]] = {}
        for linear in linears_in(graph, "attention"):
            sharing.setdefault(reads(linear), []).append(linear)
        found += [(path_of(linears[-1]), x, linears, None) for x, linears in sharing.items()]
    yield from sorted(found, key=lambda place: place[2][0])


def weights_of_influence(layers: Sequence[Layer], statistics: Statistics) -> list[float]:
    """1 to 2 from the layer whose block changes the residual stream least to that which changes it most; 1 where it has no stream."""
    found = {layer.name: statistics[layer.stream[2]].influence for layer in layers if layer.stream is not None}
    low, high = min(found.values(), default=0.0), max(found.values(), default=0.0)
    return [1 + (found.get(layer.name, low) - low) / ((high - low) or 1.0) for layer in layers]


def requests_of(graph: Graph, step: Pass, layers: Sequence[Layer]) -> list[Request]:
    """What a pass asks for in some layers."""
    inside = {name for layer in layers for name in layer.names | {layer.start.name}}
    weights = {n.name for layer in layers for n in layer.part.fx.find_nodes(op="get_attr")}
    return [r for r in (step.requests(graph) if step.requires else []) if r.value in inside | weights]


def all_requests(graph: Graph, steps: Sequence[Pass], layers: Sequence[Layer]) -> list[Request]:
    return [r for step in steps for r in requests_of(graph, step, layers)]


def label_of(choice: str, ratio: float | None) -> str:
    return choice if ratio is None else f"{choice} {ratio:.2g}"


def has_option(step: Pass, option: str) -> bool:
    return option in {f.name for f in dataclasses.fields(step)}  # type: ignore[arg-type]


def price_of(part: Graph, budget: str, context: Context) -> float:
    if budget == "bytes":
        return float(part.weight_bytes())
    if budget == "flops":
        return float(cost(part).flops)
    assert context.predict is not None
    return context.predict(part)


def seconds_of(part: Graph, context: Context) -> float | None:
    return None if context.predict is None else context.predict(part)


def relative_error(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Squared error relative to the variance, the mean over outputs."""
    errors = []
    for y, z in zip(before, after, strict=True):
        y, z = y.double(), z.double()
        errors.append(float((y - z).square().sum() / (y - y.mean(0)).square().sum().clamp(min=torch.finfo(torch.float64).tiny)))
    return sum(errors) / len(errors)
