"""embedding(w, ids) -> embedding_int8 or embedding_nbits: the largest table of a small model, four to seven times smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.formats import WEIGHTS, Format
from ...ir.pattern import Match
from ..made import add_made
from ..rewrite import Builder, Rewrite
from .codes import as_nbits, as_rows
from .rtn import rtn
from .scheme import SMALLEST_GROUP, check_group_size
from .stored import Tied, note_copy, why_not_stored

FORMATS = {"int8-row": WEIGHTS["int8-channel"], "int8-group": WEIGHTS["int8-group"], "int4-group": WEIGHTS["int4-group"]}


@dataclass(frozen=True)
class QuantizeEmbedding(Rewrite):
    """Keep an embedding table in 8 or 4 bits.

    Before:  embedding(w, ids)      After:  embedding_int8(ids, codes, scale)                           int8-row: symmetric, one scale a row
                                            embedding_nbits(ids, codes, scale, zero_point, bits, group)   "-group": a scale and a zero point a group
    Only storage: each row that is read becomes float again, so nothing downstream changes. Lossy: MiniLM's mean embedding
    cosine falls by less than 1e-4 in int8-row. Declines tables other calls read too (tied output layers) unless tied = "copy", computed
    ones, half precision, rows that are no whole number of groups, and those below `min_weights`.
    """

    weights: Literal["int8-row", "int8-group", "int4-group"] = "int8-row"
    group_size: int = 128
    """Channels that share a scale in "-group" formats: a power of two from 16 on; halved until it divides a row."""
    min_weights: int = 1 << 20
    """Smaller tables (positions, token types) stay: they are no size to speak of."""
    tied: Tied = "decline"
    """A table another call reads too: "decline", or "copy" to give the embedding codes of its own."""

    name = "quantize-embedding"
    exact = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def pattern(self, op: Any, w: Any, ids: Any, padding_idx: Any) -> Any:
        return op.embedding(w, ids, padding_idx)

    def why_not(self, m: Match) -> str | None:
        if why := why_not_stored(m.graph, m.anchor, m.w, "table", self.min_weights, self.tied):
            return why
        table = m.w.meta["val"]
        if table.dtype != torch.float32:
            return f"its table is {table.dtype}; scales are kept in float32"
        if self.weights != "int8-row" and table.shape[1] % SMALLEST_GROUP:
            return f"its rows of {table.shape[1]} channels are no whole number of groups of {SMALLEST_GROUP} or more"
        return None

    def rewrite(self, op: Builder, m: Match) -> Any:
        note_copy(m.graph, m.anchor, m.w)
        name, form = str(m.w.target), FORMATS[self.weights]
        make = TableQuantizer(form, self._group(m.w.meta["val"].shape[1]))
        names = {"w": f"{name}_int{form.bits}", "scale": f"{name}_scale", "zero_point": f"{name}_zero_point"}
        made = add_made(m.graph, make, [name], names, m.anchor)
        if form.per == "row":
            return op.embedding_int8(m.ids, made["w"], made["scale"])
        return op.embedding_nbits(m.ids, made["w"], made["scale"], made["zero_point"], form.bits, make.group_size)

    def _group(self, width: int) -> int:
        size = self.group_size
        while width % size:
            size //= 2
        return size


@dataclass(frozen=True)
class TableQuantizer:
    """A table [rows, d] -> the tensors of embedding_int8 or embedding_nbits."""

    form: Format
    group_size: int

    def __call__(self, table: Tensor) -> dict[str, Tensor]:
        q = rtn(table, self.form, self.group_size)
        return as_rows(q, table.shape[1]) if self.form.per == "row" else as_nbits(q, self.form, table.shape[1], self.group_size)
