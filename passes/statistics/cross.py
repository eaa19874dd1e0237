"""Two versions of a program on the same inputs: E[x_dense x_compressed^T], for asymmetric calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...ir.errors import UsageError
from ...ir.graph import Graph
from ...ir.walk import Visit, Walk
from .accumulators import CrossGram
from .calibration import Calibration
from .rows import RowSelection, channels


def cross_grams(dense: Graph, compressed: Graph, pairs: Mapping[str, str], calibration: Calibration) -> dict[str, Tensor]:
    """The mean outer product of what two graphs compute at paired values, token by token.

    pairs: value of `dense` -> value of `compressed` (specs/structured_ffn.md 1.4: the two inputs of one layer).
    Returns value of `dense` -> [channels there, channels in compressed], float64. The Gram of the compressed side is an ordinary request.
    Both graphs run batch by batch, so a batch's values at the pairs are held once; above `calibration.memory_limit` the
    pairs are done in groups, each with a run of its own.
    Raises UsageError when a value is missing or the graphs take different inputs.
    """
    if dense.call.names != compressed.call.names:
        raise UsageError(f"the graphs take different inputs: {', '.join(dense.call.names)} and {', '.join(compressed.call.names)}")
    found: dict[str, Tensor] = {}
    for group in _groups(dense, compressed, pairs, calibration.memory_limit):
        found.update(_gather(dense, compressed, group, calibration))
    return found


def _gather(dense: Graph, compressed: Graph, pairs: dict[str, str], calibration: Calibration) -> dict[str, Tensor]:
    sums = {a: CrossGram(_width(dense, a), _width(compressed, b)) for a, b in pairs.items()}
    left, right = (RowSelection(g, calibration.batches, calibration.exclude_positions) for g in (dense, compressed))
    calibration.runs += 1
    for batch, flat in enumerate(calibration.batches):
        rows: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor, batch: int = batch, rows: dict[str, Tensor] = rows) -> None:
            rows[name] = left.rows(batch, value, left.token_axis(_node(dense, name)))

        def pair(name: str, value: Tensor, batch: int = batch, rows: dict[str, Tensor] = rows) -> None:
            sums[name].add(rows.pop(name), right.rows(batch, value, right.token_axis(_node(compressed, pairs[name]))))

        for graph, visits in (
            (dense, [_visit(dense, a, a, keep) for a in pairs]),
            (compressed, [_visit(compressed, b, a, pair) for a, b in pairs.items()]),
        ):
            Walk(graph, [flat], visits).run(calibration.weights)
    return {name: total.result() for name, total in sums.items()}


def _visit(graph: Graph, value: str, name: str, see: Any) -> Visit:
    return Visit((_node(graph, value),), lambda _, values: see(name, values[0]))


def _groups(dense: Graph, compressed: Graph, pairs: Mapping[str, str], limit: int | None) -> list[dict[str, str]]:
    groups: list[dict[str, str]] = [{}]
    used = 0
    for a, b in pairs.items():
        nbytes = 8 * _width(dense, a) * _width(compressed, b)
        if limit is not None and groups[-1] and used + nbytes > limit:
            groups.append({})
            used = 0
        groups[-1][a] = b
        used += nbytes
    return groups


def _node(graph: Graph, name: str) -> Any:
    found = next((n for n in graph.fx.nodes if n.name == name), None)
    if found is None:
        raise UsageError(f"cross Grams of {name} were asked for, and the graph has no value of that name")
    return found


def _width(graph: Graph, name: str) -> int:
    return channels(_node(graph, name), -1)
