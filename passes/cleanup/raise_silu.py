"""x * sigmoid(x) -> silu(x)."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite


class RaiseSiLU(Rewrite):
    """One node for SiLU / Swish (Elfwing et al. 2017), where a model spells it out or an ONNX file has it in parts."""

    name = "raise-silu"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.mul(x, op.sigmoid(x))

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.silu(m.x)
