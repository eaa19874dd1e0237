"""Second moments of what each expert's down projection reads, over the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import aten, reads
from ...ir.graph import Graph
from ...ir.walk import Visit, Walk
from ..statistics import Calibration


class ExpertMoments:
    """gram: float64 [experts, channels, channels], E[h h^T] over each expert's tokens.   tokens: int64 [experts]."""

    def __init__(self, experts: int, channels: int) -> None:
        self.gram = torch.zeros(experts, channels, channels, dtype=torch.float64)
        self.tokens = torch.zeros(experts, dtype=torch.int64)

    def add(self, expert: int, rows: Tensor) -> None:
        """Take in rows [rows, channels] of one expert; a row of zeros is a token that was routed elsewhere."""
        rows = rows[rows.any(1)].double()
        before, now = int(self.tokens[expert]), len(rows)
        if now:
            self.gram[expert] *= before / (before + now)
            self.gram[expert] += rows.T @ rows / (before + now)
            self.tokens[expert] += now


class ExpertSource:
    """Where a pass that rewrites layers of experts one by one gets their moments from; to be made before its first edit.

    live: of the program as it is when asked, behind what is already rewritten; else of the program as it was.
    Padded tokens count too: routing has shuffled them among the others.
    """

    def __init__(self, graph: Graph, calibration: Calibration, downs: Sequence[fx.Node], live: bool) -> None:
        self.graph, self.calibration = graph if live else graph.draft(), calibration
        self._names = [down.name for down in downs]
        self._known: dict[str, ExpertMoments] | None = None if live or calibration.memory_limit is not None else {}

    def __call__(self, down: fx.Node) -> ExpertMoments:
        """The moments of one layer. Without a memory limit all layers are gathered, and held, in one run; else each in a run up to it."""
        if self._known is None:
            return self._gathered([down.name])[down.name]
        if not self._known:
            self._known = self._gathered(self._names)
        return self._known[down.name]

    def _gathered(self, names: Sequence[str]) -> dict[str, ExpertMoments]:
        nodes = {n.name: n for n in self.graph.nodes if n.name in set(names)}
        found = {name: ExpertMoments(int(down.args[1].meta["val"].shape[0]), int(reads(down).meta["val"].shape[-1])) for name, down in nodes.items()}  # type: ignore[union-attr]
        visits = [Visit(tuple(n for n in (reads(down), _ends(down)) if n is not None), _seer(found[name])) for name, down in nodes.items()]
        Walk(self.graph, self.calibration.batches, visits).run(self.calibration.weights)
        self.calibration.runs += 1
        return found


def _ends(down: fx.Node) -> Any:
    """Where each expert's rows end, for rows sorted by expert; None where the experts are an axis of their own."""
    return None if down.target is aten.bmm.default else down.args[2]


def _seer(moments: ExpertMoments) -> Callable[[int, tuple[Any, ...]], None]:
    def see(batch: int, values: tuple[Any, ...]) -> None:
        if len(values) == 1:
            for expert, rows in enumerate(values[0]):
                moments.add(expert, rows)
            return
        rows, ends = values
        for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
            moments.add(expert, rows[begin:end])

    return see
