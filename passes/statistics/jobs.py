"""What one run gathers of one value, and what each family of statistics is summed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.graph import Graph
from .accumulators import Channels, Gram, Histogram, Influence, Range, Reservoir, TokenAbsmax
from .gradients import WeightGradient
from .requests import Request
from .results import Results
from .rows import RowSelection, channels

GRADIENTS = ("gradient", "gradient_gram")
"""Families that need a loss and a backward pass."""
_ACCUMULATORS = {"channels": Channels, "present": Range, "token_absmax": TokenAbsmax, "histogram": Histogram, "gram": Gram}


def accumulator(family: str, width: int, reservoir: int, seed: int) -> Callable[[], Any]:
    """What makes the accumulator of a family that the forward pass fills."""
    if family == "rows":
        return lambda: Reservoir(width, reservoir, seed)
    return Influence if family == "influence" else lambda: _ACCUMULATORS[family](width)


def gradient_accumulator(graph: Graph, wanted: Wanted, family: str) -> Any:
    """The accumulator of a family that the backward pass fills."""
    if family == "gradient":
        return WeightGradient() if graph.is_weight(wanted.node) else Channels(wanted.width)
    return Gram(wanted.width)


class Wanted:
    """A request and the nodes it is about."""

    def __init__(self, request: Request, nodes: Mapping[str, fx.Node]) -> None:
        names = [request.value] + ([request.block_input] if request.block_input and "influence" in request.families else [])
        for name in names:
            if name not in nodes:
                raise UsageError(f"statistics of {name} were asked for, and the graph has no value of that name")
        self.request, self.families = request, request.families
        self.reads = tuple(nodes[name] for name in names)
        self.node = self.reads[0]
        self.width = channels(self.node, request.axis)


class Job:
    """All that is gathered of one value in one run."""

    def __init__(self, wanted: Wanted, selection: RowSelection) -> None:
        self.wanted, self.selection = wanted, selection
        self.reads: tuple[fx.Node, ...] = (wanted.node,)
        self.token_axes: tuple[int | None, ...] = (selection.token_axis(wanted.node, wanted.request.axis),)
        self.nbytes = 0
        self._new: dict[str, tuple[str, Callable[[], Any]]] = {}
        self._accumulators: dict[str, Any] = {}

    def take(self, family: str, key: str, new: Callable[[], Any]) -> None:
        """Gather this family too; `new` makes its accumulator when the first rows come."""
        self._new[family] = key, new
        self.nbytes += _nbytes(family, self.wanted.width)
        if family == "influence":
            self.reads = self.wanted.reads
            self.token_axes += (self.selection.token_axis(self.reads[1], self.wanted.request.axis),)

    def see(self, batch: int, values: tuple[Tensor, ...]) -> None:
        """Take in one batch's values of `reads`."""
        if not self._accumulators:
            self._accumulators = {family: new() for family, (_, new) in self._new.items()}
        axis = self.wanted.request.axis
        rows = [self.selection.rows(batch, v, t, axis) for v, t in zip(values, self.token_axes)]
        for family, accumulator in self._accumulators.items():
            if family == "influence":
                accumulator.add(rows[1], rows[0])
            elif family == "present":
                accumulator.add(batch, values[0].movedim(axis, -1).flatten(0, -2))
            else:
                accumulator.add(batch, rows[0])

    def finish(self, results: Results) -> None:
        """Put what was found where it stays, and let go of the accumulators."""
        for family, accumulator in self._accumulators.items():
            results.put(self._new[family][0], checked(self.wanted.node.name, accumulator.result()))
        self._accumulators = {}


def _nbytes(family: str, width: int) -> int:
    """Bytes an accumulator holds at most, an estimate for planning."""
    match family:
        case "gram":
            return 8 * width**2 + 4 * width * (1024 + 256)  # sums, waiting rows, a product
        case "rows":
            return 2 * 4 * width * 2048
        case "histogram" | "token_absmax":
            return 8 * (1 << 15)
    return 8 * 8 * width


def checked(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are. Raises UsageError when one is not finite."""
    if "count" in tensors and not int(tensors["count"]):
        raise UsageError(f"no row of {name} counted: every token of the calibration inputs is padding or excluded")
    if any(t.is_floating_point() and not t.isfinite().all() for t in tensors.values()):
        raise UsageError(f"{name} is infinite or NaN on the calibration inputs; no statistics can be taken of it")
    return tensors
