"""Which rows of a projection make which channels of which head, where nothing but the attention sees them, so that they may be mixed or reordered."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks import AttentionBlock, Projection, channel_map
from ...ir.blocks.channel_tracer import ChannelTracer, Step
from ...ir.blocks.vocabulary import MOVES, path_of, shared_weights
from ...ir.evaluate import is_size
from ...ir.graph import Graph
from ...ir.nodes import is_looked_through, number

aten, ours = torch.ops.aten, torch.ops.rewright


@dataclass(frozen=True)
class ValueHeads:
    """v -> attention -> out.  rows: int64 [kv heads, dim], the rows of `v` of each head; columns: int64 [heads, dim], the columns of `out`."""

    v: fx.Node
    out: fx.Node
    rows: Tensor
    columns: Tensor


def value_heads(graph: Graph, block: AttentionBlock) -> ValueHeads | str:
    """The weights around an attention's values, or why they can't be changed together."""
    v, out = block.v, block.out
    if v is None or block.to_v.rows is None:
        return block.to_v.why or "v is made of several linears"
    if out is None or block.other_outs:
        return "no linear alone reads the attention's output"
    if why := why_not_stored(graph, v, out):
        return why
    found = channel_map(graph, v, out.args[0])  # type: ignore[arg-type]
    if isinstance(found, str):
        return found
    steps = [*ChannelTracer(graph, v).trace(block.attention.args[2]).steps, *(s for s in found.steps if s.node > block.attention)]  # type: ignore[arg-type]
    if strange := next((s for s in steps if not is_number_scale(graph, s)), None):
        return f"{path_of(strange.node)} stands between v and {path_of(out)} ({strange.kind})"
    rows = block.to_v.rows
    expected = rows.repeat_interleave(block.heads // block.kv_heads, 0)
    if found.index.numel() != expected.numel() or not torch.equal(found.index, expected.flatten()):
        return f"{path_of(out)} reads more than the heads of this attention in order"
    if why := why_read_elsewhere(graph, v, rows, block.attention, 2):
        return why
    return ValueHeads(v, out, rows, torch.arange(expected.numel()).view_as(expected))


def why_not_stored(graph: Graph, *linears: fx.Node) -> str | None:
    """Why the weights of these linears can't be changed for this place alone."""
    for node in linears:
        if node.target is not aten.linear.default or not graph.is_weight(node.args[1]):
            return f"{path_of(node)} is no linear layer with stored weights of floats"
    return next(iter(shared_weights(*linears)), None)


def why_read_elsewhere(graph: Graph, linear: fx.Node, rows: Tensor, attention: fx.Node, position: int) -> str | None:
    """Who reads these rows of a projection besides one operand of the attention (a cache, another layer), in a sentence."""
    work, seen = [linear], {linear}
    for value in work:
        for user in value.users:
            if is_size(user) or user in seen or user is attention and [i for i, a in enumerate(user.args) if a is value] == [position]:
                continue
            if user.op == "call_function" and (user.target in (*MOVES, operator.getitem, ours.rope.default) or is_looked_through(user)):
                seen.add(user)
                work.append(user)
                continue
            codes: Any = ChannelTracer(graph, linear).trace(value).codes
            if not isinstance(codes, Tensor) or bool(torch.isin(codes, rows).any()):
                other = "an output of the model" if user.op == "output" else f"read by {user.name} of {path_of(user)}"
                return f"what {path_of(linear)} makes is also {other}"
    return None


def is_number_scale(graph: Graph, step: Step) -> bool:
    """Whether a step multiplies all channels by one number."""
    return step.kind == "scale" and any(number(graph, a) is not None for a in step.node.args[:2])


def rows_of(projection: Projection) -> Tensor | str:
    """int64 [heads, dim], or why one linear does not make them."""
    if projection.linear is None or projection.rows is None:
        return projection.why or "it is made of several linears"
    return projection.rows
