"""x * cos + cat([-x2, x1]) * sin -> rope(x, cos, sin)."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite


class RaiseRope(Rewrite):
    """One node for rotary position embedding in the half-split layout (Llama, Qwen, Gemma, Phi, GPT-NeoX).

    The halves may come from slices, chunk or split. A partial rotation (GPT-NeoX) is raised on the part it turns.
    Declines halves that are not the two halves of the last axis. Does not match GPT-J's interleaved layout.
    """

    name = "raise-rope"

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, axis: Any, low: Any, middle: Any, middle2: Any, high: Any, size: Any) -> Any:
        chunks, parts = op.chunk(x, 2, axis), op.split(x, size, axis)
        first = op.either(op.slice(x, axis, low, middle), chunks[0], parts[0])
        second = op.either(op.slice(x, axis, middle2, high), chunks[1], parts[1])
        turned = op.cat([op.neg(second), first], op.anything)
        return op.add(op.mul(x, cos), op.mul(turned, sin))

    def why_not(self, m: Match) -> str | None:
        val = m.x.meta["val"]
        half, odd = divmod(val.shape[-1], 2)
        cat = next(n for n in m.nodes if "cat" in str(n.target))
        axes = {m.axis % val.dim(), (cat.args[1] if len(cat.args) > 1 else 0) % val.dim()}
        if axes != {val.dim() - 1}:
            return f"it turns along axis {m.axis}, not along the last one"
        bounds = [
            (m.values.get("low") or 0, 0),
            (m.values.get("middle", half), half),
            (m.values.get("middle2", half), half),
            (m.values.get("size", half), half),
        ]
        end = m.values.get("high")
        if odd or any(a != b for a, b in bounds) or end is not None and end < val.shape[-1]:
            return f"the parts are not the two halves of {val.shape[-1]} channels"
        return None

    def rewrite(self, op: Builder, m: Match) -> fx.Node:
        return op.rope(m.x, m.cos, m.sin)
