"""rms_norm(x + r) -> add_rms_norm(x, r): the residual stream crosses memory once."""

from __future__ import annotations

from typing import Any

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite
from .add_layer_norm import why_not_residual


class FuseAddRMSNorm(Rewrite):
    """Fuse a residual add with the RMS norm that reads it.

    Before:  h = x + r               After:  y, h = add_rms_norm(x, r, w, eps)
             y = rms_norm(h, w, eps)
    """

    name = "fuse-add-rms-norm"
    exact = True  # same arithmetic; both versions round h once, to the input dtype

    def pattern(self, op: Any, x: Any, r: Any, w: Any, eps: Any) -> Any:
        h = op.add(x, r)
        y = op.rms_norm(h, w, eps)
        return y, h  # h stays visible: the next residual add reads it

    def why_not(self, m: Match) -> str | None:
        return why_not_residual(m)

    def rewrite(self, op: Builder, m: Match) -> Any:
        return op.add_rms_norm(m.x, m.r, m.w, m.eps)
