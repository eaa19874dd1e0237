"""embedding(w, ids) -> embedding_int8(ids, int8 w, scale): the largest table of a small model, four times smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite
from .quantize_linear import channel_codes, channel_scales


@dataclass(frozen=True)
class QuantizeEmbedding(Rewrite):
    """Keep an embedding table in 8 bits, symmetric with one scale a row.

    Before:  embedding(w, ids)      After:  embedding_int8(ids, round(w / scale), scale)
    Only storage: each row that is read becomes float again, so nothing downstream changes. Lossy: MiniLM's mean embedding
    cosine falls by less than 1e-4. Declines tables other calls read too (tied output layers), computed ones, half
    precision, and those below `min_weights`.
    """

    min_weights: int = 1 << 20
    """Smaller tables (positions, token types) stay: they are no size to speak of."""

    name = "quantize-embedding"
    exact = False

    def pattern(self, op: Any, w: Any, ids: Any, padding_idx: Any) -> Any:
        return op.embedding(w, ids, padding_idx)

    def why_not(self, m: Match) -> str | None:
        if not m.graph.is_weight(m.w):
            return "its table is computed, not stored"
        table = m.w.meta["val"]
        if table.dtype != torch.float32:
            return f"its table is {table.dtype}; scales are kept in float32"
        if len(m.w.users) > 1:
            return f"its table {m.w.target} is also read by {next(u.name for u in m.w.users if u is not m.anchor)}"
        if table.numel() < self.min_weights:
            return f"its {table.numel():,} weights are fewer than min_weights = {self.min_weights:,}"
        return None

    def rewrite(self, op: Builder, m: Match) -> Any:
        return op.embedding_int8(m.ids, op.weight(f"{m.w.target}_int8", channel_codes, m.w), op.weight(f"{m.w.target}_scale", channel_scales, m.w))
