"""Second moments of what a layer reads, in the original program or behind layers that are already rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.graph import Graph
from ...ir.walk import load_weight
from ..linear_algebra import damped
from .accumulators import CrossGram, Gram
from .calibration import Calibration
from .results import Statistics
from .rows import RowSelection, channels

Order = Literal["oneshot", "sequential", "asymmetric"]
"""What a layer's moments are of. oneshot: the original program; sequential: the program with all layers before it rewritten;
asymmetric: that too, and the layer is to give what it gave in the original (specs/structured_ffn.md 1.4)."""

Source = Callable[[fx.Node, fx.Node], "Moments"]
"""(value, start) -> its moments. start: the value from which on the program may still be edited; layers come in graph order."""


@dataclass(frozen=True)
class Moments:
    """Moments of a value x [tokens, n]; x0 is the same value in the original program, where that is another one. All float64."""

    gram: Tensor
    """[n, n], E[x x^T]"""
    mean: Tensor
    """[n], E[x]"""
    cross: Tensor | None = None
    """[n, n], E[x0 x^T]; None: x0 is x."""
    mean_original: Tensor | None = None
    """[n], E[x0]"""

    def covariance(self) -> Tensor:
        """[n, n], E[(x - mean)(x - mean)^T]"""
        return self.gram - torch.outer(self.mean, self.mean)

    def target(self, w: Tensor, b: Tensor, affine: bool = True, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
        """The w~, b~ (float64) whose w~ x + b~ is nearest to w x0 + b in the mean square: what is to be compressed instead of w, b.

        The ridge, relative to the mean of the Gram's diagonal, pulls w~ to w. The error of any w' splits exactly:
        |w x0 - w' x|^2 = |w x0 - w~ x|^2 + |(w~ - w') x|^2 (without ridge).   affine: whether b~ may differ from b.
        """
        w, b = w.double(), b.double()
        if self.cross is None or self.mean_original is None:
            return w, b
        gram, cross = self.gram, self.cross
        if affine:
            gram = self.covariance()
            cross = cross - torch.outer(self.mean_original, self.mean)
        new = w + torch.linalg.solve(damped(gram, ridge), (w @ (cross - gram)).T).T
        return new, b + w @ self.mean_original - new @ self.mean if affine else b


def moments_in_order(graph: Graph, order: Order, statistics: Statistics | None, calibration: Calibration | None) -> Source:
    """Where a pass that rewrites layers one by one gets each one's moments from; called before the first edit of `graph`.

    Raises UsageError without calibration data.
    """
    if calibration is None or statistics is None:
        raise UsageError("moments of layers need calibration data and there is none; give some: calibration=Calibration(batches)")
    if order == "oneshot":
        return lambda value, start: Moments(statistics[value].gram, statistics[value].mean)
    edited, original = _Follower(graph, calibration), _Follower(graph.draft(), calibration) if order == "asymmetric" else None
    return lambda value, start: _gathered(edited, original, value, start)


def _gathered(edited: _Follower, original: _Follower | None, value: fx.Node, start: fx.Node) -> Moments:
    width = channels(value, -1)
    gram, cross = Gram(width), CrossGram(width, width)
    total, total_original, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), 0
    both: Iterator[tuple[Tensor, Tensor | None]] = (
        ((x, None) for x in edited.rows(value.name, start.name))
        if original is None
        else zip(edited.rows(value.name, start.name), original.rows(value.name, start.name), strict=True)
    )
    for i, (x, x0) in enumerate(both):
        gram.add(i, x)
        total, count = total + x.sum(0, dtype=torch.float64), count + len(x)
        if x0 is not None:
            cross.add(x0, x)
            total_original += x0.sum(0, dtype=torch.float64)
    found = gram.result()["gram"]
    if original is None:
        return Moments(found, total / count)
    return Moments(found, total / count, cross.result(), total_original / count)


class _Follower:
    """A graph run on all batches up to where its editing has come. Holds the values that calls to come will read, for all batches."""

    def __init__(self, graph: Graph, calibration: Calibration) -> None:
        self.graph, self.calibration = graph, calibration
        self.selection = RowSelection(graph, calibration.batches, calibration.exclude_positions)
        self.held: list[dict[fx.Node, Any]] = [dict(zip(graph.inputs, flat)) for flat in calibration.batches]
        self.done: set[fx.Node] = set()

    def rows(self, value: str, start: str) -> Iterator[Tensor]:
        """[tokens, channels] of a value, batch by batch. What lies behind `start` is computed and forgotten: it may still be edited."""
        nodes = {n.name: n for n in self.graph.fx.nodes}
        wanted = nodes[value]
        axis = self.selection.token_axis(wanted)
        firm, ahead = self._calls([nodes[start]]), self._calls([wanted])
        ahead = [n for n in ahead if n not in set(firm)]
        self.done.update(firm)
        for batch, env in enumerate(self.held):
            for node in firm:
                self._run(node, env)
            for operand in {n for node in firm for n in node.all_input_nodes if n in env}:
                if all(user in self.done for user in operand.users):
                    del env[operand]
            beyond = dict(env)
            for node in ahead:
                self._run(node, beyond)
            yield self.selection.rows(batch, beyond[wanted], axis)

    def _calls(self, wanted: Sequence[fx.Node]) -> list[fx.Node]:
        """What has to be computed for values and is not held, in graph order."""
        held = self.held[0].keys()
        needed, work = set(), [n for n in wanted if n not in held]
        while work:
            node = work.pop()
            if node in needed or node.op == "get_attr":
                continue
            needed.add(node)
            work += [n for n in node.all_input_nodes if n not in held]
        return sorted(needed)

    def _run(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        def value(n: fx.Node) -> Any:
            return env[n] if n in env else load_weight(self.graph, str(n.target), self.calibration.weights or {})

        with torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)  # type: ignore[misc]
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
