"""layer_norm(x + r) -> add_layer_norm(x, r): the residual stream crosses memory once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ...ir.nodes import same_shape
from ...ir.pattern import Match
from ...ir.show import dim_names, kind
from ..rewrite import Builder, Rewrite


class FuseAddLayerNorm(Rewrite):
    """Fuse a residual add with the LayerNorm that reads it.

    Before:  h = x + r                            After:  y, h = add_layer_norm(x, r, w, b, eps)
             y = layer_norm(h, [d], w, b, eps)
    """

    name = "fuse-add-layer-norm"
    exact = True  # the same two operations in the same order

    def pattern(self, op: Any, x: Any, r: Any, d: Any, w: Any, b: Any, eps: Any) -> Any:
        h = op.add(x, r)
        y = op.layer_norm(h, [d], w, b, eps)
        return y, h  # h stays visible: in a pre-norm model the next residual add reads it

    def why_not(self, m: Match) -> str | None:
        return why_not_residual(m) or ("the norm has no weight and bias" if m.w is None or m.b is None else None)

    def rewrite(self, op: Builder, m: Match) -> Any:
        return op.add_layer_norm(m.x, m.r, m.w, m.b, m.eps)


def why_not_residual(m: Match) -> str | None:
    """Why x + r is no residual add of two equal tensors, or None."""
    x, r = (v.meta["val"] if isinstance(v, fx.Node) else v for v in (m.x, m.r))
    if not isinstance(x, Tensor) or not isinstance(r, Tensor):
        return f"the add has the number {x if isinstance(r, Tensor) else r}"
    if not same_shape(x.shape, r.shape):
        return f"the add broadcasts {kind(r, dim_names(m.graph))} to {kind(m.anchor.meta['val'], dim_names(m.graph))}"
    if x.dtype != r.dtype:
        return f"the add promotes {kind(r)} and {kind(x)}"
    return None
