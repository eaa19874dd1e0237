"""Several new weights from one run of one function, or a recipe for each where the old weights have no data yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..ir.graph import Graph

Make = Callable[..., dict[str, Tensor]]


def add_made(graph: Graph, make: Make, sources: Sequence[str], names: Mapping[str, str], like: fx.Node) -> dict[str, fx.Node]:
    """`make(*sources)` as new weights: {key: node}. names: keys of what it makes -> the weights' names; other keys are left out."""
    found = {}
    for key, value in make(*(graph.weight(s).detach() for s in sources)).items():
        if key not in names:
            continue
        if value.is_meta:
            found[key] = graph.add_weight(names[key], Part(make, key), *sources, like=like)
        else:
            found[key] = graph.add_constant(names[key], value, like=like)
    return found


@dataclass(frozen=True)
class Part:
    """One of the tensors a function makes: the recipe of a weight that has no data yet."""

    make: Make
    key: str

    def __call__(self, *sources: Tensor) -> Tensor:
        return self.make(*sources)[self.key]
