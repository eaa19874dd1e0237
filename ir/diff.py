"""What changed between two graphs: ops, weights, and the program text line by line."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass

from .cost import cost, op_name
from .graph import Graph
from .show import lines


@dataclass(frozen=True)
class Diff:
    """`ops`: op -> (count in a, count in b) where they differ; `weights`: names gone and new; `text`: unified diff of the calls."""

    ops: dict[str, tuple[int, int]]
    removed_weights: tuple[str, ...]
    added_weights: tuple[str, ...]
    bytes: tuple[int, int]
    flops: tuple[int, int]
    calls: tuple[int, int]
    weight_bytes: tuple[int, int]
    text: str

    @property
    def equal(self) -> bool:
        """Whether the two programs read the same."""
        return not self.text and not self.removed_weights and not self.added_weights


def diff(a: Graph, b: Graph) -> Diff:
    """Compare two graphs; node names survive rewrites, so untouched lines align by themselves."""
    count_a, count_b = (Counter(op_name(n) for n in g.nodes) for g in (a, b))
    weights_a, weights_b = a.weights(), b.weights()
    cost_a, cost_b = cost(a), cost(b)
    text_a, text_b = (["  ".join(filter(None, (code, f"# {kind}", path))) for code, kind, path in lines(g)] for g in (a, b))  # unaligned
    changes = difflib.unified_diff(text_a, text_b, "before", "after", lineterm="", n=1)
    return Diff(
        ops={op: (count_a[op], count_b[op]) for op in sorted(count_a | count_b) if count_a[op] != count_b[op]},
        removed_weights=tuple(n for n in weights_a if n not in weights_b),
        added_weights=tuple(n for n in weights_b if n not in weights_a),
        bytes=(cost_a.bytes, cost_b.bytes),
        flops=(cost_a.flops, cost_b.flops),
        calls=(len(a.nodes), len(b.nodes)),
        weight_bytes=(a.weight_bytes(), b.weight_bytes()),
        text="\n".join(changes),
    )
