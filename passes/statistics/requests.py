"""What a pass asks to know about values of the program: plain data, keyed by the value, so that its readers share one answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.errors import UsageError, near
from ...ir.graph import Graph

aten = torch.ops.aten

# kind a pass may ask for -> the family it is gathered with
KINDS = {
    "min": "channels",
    "max": "channels",
    "absmax": "channels",
    "mean": "channels",
    "mean_abs": "channels",
    "mean_square": "channels",
    "present_min": "present",
    "present_max": "present",
    "token_absmax": "token_absmax",
    "histogram": "histogram",
    "gram": "gram",
    "rows": "rows",
    "influence": "influence",
    "gradient": "gradient",
    "gradient_gram": "gradient_gram",
}


@dataclass(frozen=True)
class Request:
    """Statistics of one value.

    value: the name of its node (a weight's for "gradient").
    kinds: keys of KINDS. "influence" needs `block_input`, the value the block started from.
    axis: the channels; all other axes count as rows.
    """

    value: str
    kinds: frozenset[str]
    axis: int = -1
    block_input: str | None = None

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"no statistic named {kind!r}.{near(kind, tuple(KINDS))} There are {', '.join(KINDS)}")
        if "influence" in self.kinds and self.block_input is None:
            raise UsageError(f"the influence of {self.value} needs block_input, the value its block starts from")

    @property
    def families(self) -> tuple[str, ...]:
        """What has to be gathered, in the order of KINDS; a Gram comes with its mean."""
        wanted = {KINDS[k] for k in self.kinds} | ({"channels"} if "gram" in self.kinds else set())
        return tuple(f for f in dict.fromkeys(KINDS.values()) if f in wanted)


def linear_inputs(graph: Graph, kinds: Iterable[str]) -> list[Request]:
    """The same request for the input of every linear with a stored weight; linears that share their input share it."""
    inputs: dict[Any, None] = dict.fromkeys(n.args[0] for n in graph.find(aten.linear.default) if graph.is_weight(n.args[1]))
    return [Request(node.name, frozenset(kinds)) for node in inputs]


def merged(requests: Iterable[Request]) -> list[Request]:
    """One request for each value and axis. Raises UsageError for the influence of one value from two block inputs."""
    kinds: dict[tuple[str, int], frozenset[str]] = {}
    starts: dict[tuple[str, int], str | None] = {}
    for r in requests:
        place = r.value, r.axis
        kinds[place] = kinds.get(place, frozenset()) | r.kinds
        if "influence" in r.kinds and (start := starts.setdefault(place, r.block_input)) != r.block_input:
            raise UsageError(f"the influence of {r.value} was asked for from {start} and from {r.block_input}; gather them one after the other")
    return [Request(value, k, axis, starts.get((value, axis))) for (value, axis), k in kinds.items()]
