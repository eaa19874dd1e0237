"""Which linears a pass is asked for, and which of them can have other weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx

from ..ir.blocks import attention_blocks, ffn_blocks
from ..ir.blocks.channel_constants import why_not_edited
from ..ir.blocks.vocabulary import path_of
from ..ir.graph import Graph
from ..ir.nodes import argument

aten = torch.ops.aten

Scope = Literal["ffn", "attention", "all"]
"""ffn: up, gate and down projections; attention: q, k, v and output projections; all: every linear."""


def linears_in(graph: Graph, scope: Scope) -> list[fx.Node]:
    """The dense linears of a scope, in graph order."""
    linears = graph.find(aten.linear.default)
    if scope == "all":
        return linears
    if scope == "ffn":
        inside = {n for b in ffn_blocks(graph) for n in (b.up, b.gate, b.down)}
    else:
        inside = {n for a in attention_blocks(graph) for n in (a.q, a.k, a.v, a.out, *a.other_outs)}
    return [n for n in linears if n in inside]


def why_not_chosen(path: str, only: Sequence[str], skip: Sequence[str]) -> str | None:
    """Why the options `only` and `skip`, prefixes of module paths, leave a layer out, or None."""
    if only and not any(_within(path, p) for p in only):
        return f"it is not within only = {', '.join(only)}"
    hit = next((p for p in skip if _within(path, p)), None)
    return f"skip names {hit}" if hit else None


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def why_not_stored(linear: fx.Node) -> str | None:
    """Why the weight and bias of a linear can't be replaced: they are computed, or shared with another layer."""
    bias = argument(linear, "bias")
    if bias is not None and bias.op != "get_attr":
        return f"the bias of {path_of(linear)} is computed, not stored"
    return why_not_edited(linear.args[1], linear)
