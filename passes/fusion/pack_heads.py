"""join(attention(split(q), split(k), split(v))) -> multi_head_attention(q, k, v): no transposes around attention."""

from __future__ import annotations

from typing import Any

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite

HEADS_FIRST = [0, 2, 1, 3]


class PackHeads(Rewrite):
    """Let attention read its projections as they come.

    Before:  q, k, v = permute(reshape(., [B, T, heads, D]), [0, 2, 1, 3])      After:  multi_head_attention(q, k, v, heads, kv_heads, ...)
             y = reshape(permute(attention(q, k, v, ...), [0, 2, 1, 3]), [B, T, heads * D])
    Not found where q and k are rotated between the split and attention (RoPE needs the heads apart). Declines a split
    that is not [heads, D] in this order.
    """

    name = "pack-heads"
    exact = True  # the same attention; only layouts move

    def pattern(self, op: Any, q: Any, k: Any, v: Any, key_mask: Any, causal: Any, window: Any, scale: Any, softcap: Any, bias: Any, sizes: Any) -> Any:
        heads = [op.permute(op.reshape(x, op.anything), HEADS_FIRST) for x in (q, k, v)]
        y = op.attention(*heads, key_mask, causal, window, scale, softcap, bias, sizes)
        return op.reshape(op.permute(y, HEADS_FIRST), op.anything)

    def why_not(self, m: Match) -> str | None:
        for name in ("q", "k", "v"):
            x = m.values[name].meta["val"]
            if x.dim() != 3:
                return f"{name} is split from {x.dim()} axes, not from [batch, tokens, heads * width]"
        out, q, v = m.anchor.meta["val"], _by_head(m, 0), _by_head(m, 2)
        if out.dim() != 3 or out.shape[-1] != q.shape[1] * v.shape[-1]:
            return f"the heads are joined to {list(out.shape)}, not to [batch, tokens, heads * width]"
        return None

    def rewrite(self, op: Builder, m: Match) -> Any:
        return op.multi_head_attention(
            m.q, m.k, m.v, _by_head(m, 0).shape[1], _by_head(m, 1).shape[1], m.key_mask, m.causal, m.window, m.scale, m.softcap, m.bias, m.sizes
        )


def _by_head(m: Match, operand: int) -> Any:
    """The fake value of attention's q (0), k (1) or v (2): [B, heads, tokens, width]."""
    attention = next(n for n in m.nodes if n.target._schema.name == "rewright::attention")  # type: ignore[union-attr]
    return attention.args[operand].meta["val"]  # type: ignore[union-attr]
