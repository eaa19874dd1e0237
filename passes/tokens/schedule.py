"""How many tokens go at each layer, and what that leaves of a program's FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from ...ir.cost import node_costs
from ...ir.graph import Graph
from .fewer_tokens import Sweep
from .following import Tokens

_QUADRATIC = ("attention", "multi_head_attention")


def clamped(wanted: Sequence[int], tokens: int, prefix: int) -> list[int]:
    """What can really go at each layer: half of what is left behind the prefix at most."""
    found = []
    for r in wanted:
        found.append(min(r, (tokens - prefix) // 2))
        tokens -= found[-1]
    return found


def ramp(r: float, inflection: float, layers: int) -> list[int]:
    """r at each layer on average: from r (1 - inflection) at the first to r (1 + inflection) at the last (Bolya et al. 2023, appendix).

    Fractions are carried on: 2.5 gives 2, 3, 2, 3.
    """
    low, step = r * (1 - inflection), 2 * r * inflection / max(layers - 1, 1)
    sums = [math.floor(i * low + step * i * (i - 1) / 2 + 1e-9) for i in range(layers + 1)]
    return [b - a for a, b in pairwise(sums)]


@dataclass
class TokenFlops:
    """FLOPs of a program by the number of tokens behind each cut: fixed + sum of linear * n + quadratic * n^2, stage 0 before the first cut.

    For a transformer layer of width C with an MLP of 4 C that is 8 n C^2 + 4 n^2 C + 16 n' C^2 (specs/attention_tokens.md 3.4) and what its
    norms and activations take.
    """

    tokens: int
    fixed: float = 0.0
    linear: list[float] = field(default_factory=list)
    quadratic: list[float] = field(default_factory=list)

    @staticmethod
    def of(before: Graph, swept: Sweep, tokens: int, cuts: Sequence[str]) -> TokenFlops:
        """From a program and a sweep over a draft of it that cut at these values."""
        found = TokenFlops(tokens, 0.0, [0.0] * (len(cuts) + 1), [0.0] * (len(cuts) + 1))
        counts: dict[Tokens, int] = {}  # behind which cut
        stages = {node.name: rows for node, rows in swept.rows.items()}
        first = next(n for n in before.nodes if n.name == cuts[0])
        upstream = _upstream(first, tokens)
        for rows in swept.rows.values():
            counts.setdefault(rows.tokens, len(counts) + 1)
        for cost in node_costs(before):
            flops = cost.cost.flops
            if cost.node in stages:
                stage = counts[stages[cost.node].tokens]
            elif cost.node in upstream:
                stage = 0
            else:
                found.fixed += flops
                continue
            (found.quadratic if cost.op in _QUADRATIC else found.linear)[stage] += flops
        return found

    def flops(self, gone: Sequence[int]) -> float:
        """With so many tokens gone at each cut."""
        total, n = self.fixed, self.tokens
        for stage in range(len(self.linear)):
            if stage:
                n -= gone[stage - 1]
            share = n / self.tokens
            total += self.linear[stage] * share + self.quadratic[stage] * share**2
        return total

    def ratio(self, gone: Sequence[int]) -> float:
        """FLOPs without over FLOPs with it."""
        return self.flops([0] * len(gone)) / self.flops(gone)


def _upstream(node: fx.Node, tokens: int) -> set[str]:
    """What a value is made of, as far as it has one row a token."""
    found, work = {node}, [node]
    while work:
        for n in work.pop().all_input_nodes:
            value = n.meta.get("val")
            if n not in found and n.op == "call_function" and tokens in getattr(value, "shape", ()):
                found.add(n)
                work.append(n)
    return {n.name for n in found}


def solved(flops: TokenFlops, ratio: float, inflection: float, prefix: int) -> list[int]:
    """The smallest schedule of this shape whose FLOPs are `ratio` times less; if none is, the largest."""
    layers, most = len(flops.linear) - 1, flops.tokens
    tries = (clamped(ramp(total / layers, inflection, layers), flops.tokens, prefix) for total in range(1, most * layers))
    found: list[int] = [0] * layers
    for found in tries:
        if flops.ratio(found) >= ratio:
            break
    return found


def allocated(flops: TokenFlops, drift: Sequence[Sequence[tuple[int, float]]], ratio: float, prefix: int) -> list[int]:
    """A schedule that reaches a ratio with the least sum of drifts, greedily: always the layer whose next step saves most FLOPs for its drift.

    drift: for each layer (tokens gone, drift of the outputs with only that) in rising order.
    """
    level = [0] * len(drift)
    gone = [0] * len(drift)

    def at(steps: Sequence[int]) -> list[int]:
        return [drift[i][s - 1][0] if s else 0 for i, s in enumerate(steps)]

    while flops.ratio(gone) < ratio:
        now, best = flops.flops(gone), (0.0, -1)
        for i, steps in enumerate(drift):
            if level[i] == len(steps):
                continue
            wanted = clamped(at([s + (j == i) for j, s in enumerate(level)]), flops.tokens, prefix)
            if wanted[i] <= gone[i]:
                continue
            cost = steps[level[i]][1] - (steps[level[i] - 1][1] if level[i] else 0.0)
            best = max(best, ((now - flops.flops(wanted)) / max(cost, 1e-12), i))
        if best[1] < 0:
            break
        level[best[1]] += 1
        gone = clamped(at(level), flops.tokens, prefix)
    return gone
