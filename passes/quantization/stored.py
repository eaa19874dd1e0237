"""Whether a weight can be replaced by codes: stored, large enough, and read by nobody else."""

from __future__ import annotations

from typing import Literal

from torch import fx

from ...ir.graph import Graph

Tied = Literal["decline", "copy"]
"""What to do with a weight that another call reads too, such as a tied embedding: leave it, or give this reader codes of its own."""


def why_not_stored(graph: Graph, reader: fx.Node, weight: fx.Node, what: str, min_weights: int, tied: Tied) -> str | None:
    """One sentence why `reader` must keep its `weight`, which the sentence calls `what`, or None."""
    if not graph.is_weight(weight):
        return f"its {what} is computed, not stored"
    if tied == "decline" and (other := other_reader(reader, weight)) is not None:
        return f'its {what} {weight.target} is also read by {other.name}; tied = "copy" gives it codes of its own'
    if (count := weight.meta["val"].numel()) < min_weights:
        return f"its {count:,} weights are fewer than min_weights = {min_weights:,}"
    return None


def other_reader(reader: fx.Node, weight: fx.Node) -> fx.Node | None:
    """A call that reads the weight too, if there is one."""
    return next((user for user in weight.users if user is not reader), None)


def note_copy(graph: Graph, reader: fx.Node, weight: fx.Node) -> None:
    """Say in the graph's notes that a tied weight is tied no more."""
    other = other_reader(reader, weight)
    if other is not None:
        graph.notes.append(f"{reader.meta.get('path') or reader.name} has quantized codes of its own; {weight.target} stays as it is for {other.name}")
