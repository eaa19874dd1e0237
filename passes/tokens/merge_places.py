"""Where tokens may go: behind or inside the attentions of a program, sequence by sequence, and which tokens in front stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.vocabulary import FUSED_NORMS, is_norm, is_sum, path_of
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context
from .fewer_tokens import Sweep
from .following import Refused

if TYPE_CHECKING:
    from .token_merging import TokenMerging

aten = torch.ops.aten
ours = torch.ops.rewright


@dataclass(frozen=True)
class Place:
    """Where tokens may go: `value` [B, tokens, C] behind the attention of `block`, or what `readers` in it read."""

    value: fx.Node
    block: AttentionBlock
    readers: frozenset[str] | None = None


def places_of(options: TokenMerging, graph: Graph, context: Context) -> list[Place]:
    """The attentions over one sequence that were asked for, in graph order; those where nothing can go are declined."""
    blocks = []
    for block in attention_blocks(graph):
        if block.kind == "self":
            blocks.append(block)
        elif block.kind == "joint":
            context.decline(block.attention, "it joins several sequences, and which of them a token is of would be lost")
    wanted = options.layers if options.layers is not None else range(len(blocks))
    if options.depths is not None:
        wanted = [min(int(d * len(blocks)), len(blocks) - 1) for d in options.depths]
    found = []
    for block in (blocks[i] for i in sorted({*wanted}) if i < len(blocks)):
        place = _place(options, context, block)
        if isinstance(place, str):
            context.decline(block.attention, place)
        else:
            found.append(place)
    return found


def _place(options: TokenMerging, context: Context, block: AttentionBlock) -> Place | str:
    """Where tokens may go at an attention, or why not."""
    if why := context.ignored(block.attention):
        return why
    if block.causal:
        return "it is causal: a token merged into an earlier one would be seen before its time"
    readers = None
    if options.where == "in-block":
        linears = [p.linear for p in (block.to_q, block.to_k, block.to_v) if p.linear is not None]
        value: Any = linears[0].args[0] if len(linears) == 3 else None
        if value is None or any(linear.args[0] is not value for linear in linears):
            return "its queries, keys and values are not made of one value"
        readers = frozenset(linear.name for linear in linears)
    else:
        value = _behind(block)
    if not isinstance(value, fx.Node):
        return "its result is not added to a residual stream, as far as can be seen; run token-merging before sums are fused with norms"
    shape, keys = value.meta["val"].shape, argument(block.attention, "k").meta["val"].shape[-2]
    if len(shape) == 3 and not isinstance(shape[1], int):
        return "the number of tokens is dynamic, and each step has to know it; capture the model with a fixed number (dynamic_shapes), padded if need be"
    if len(shape) != 3 or shape[1] != keys:
        return f"its tokens stand in {list(shape)}, not in [batch, tokens, channels], or others are its keys"
    return Place(value, block, readers)


def sequences(places: Sequence[Place]) -> list[list[Place]]:
    """Places grouped by the tokens they are about: of as many, and one computed from the other other than through keys and values."""
    group: dict[fx.Node, list[Place]] = {}
    for place in places:
        work, seen, found = [place.value], {place.value}, None
        while work and found is None:
            node = work.pop()
            inputs = node.args[:1] if node.target in (ours.attention.default, ours.multi_head_attention.default) else node.all_input_nodes
            for n in inputs:
                if n in group and n.meta["val"].shape[1] == place.value.meta["val"].shape[1]:  # type: ignore[union-attr]
                    found = group[n]  # type: ignore[index]
                elif n not in seen:
                    seen.add(n)  # type: ignore[arg-type]
                    work.append(n)  # type: ignore[arg-type]
        group[place.value] = found if found is not None else []
        group[place.value].append(place)
    return list({id(g): g for g in group.values()}.values())


def _behind(block: AttentionBlock) -> fx.Node | None:
    """The value of the residual stream behind an attention: the sum, with its norm where that comes after, and with what a parallel FFN adds."""
    value: Any = block.residual
    if value is None or value.target in FUSED_NORMS:
        return None
    while len(value.users) == 1 and is_sum(user := next(iter(value.users))):
        if user.target in FUSED_NORMS:
            return None
        value = user
    if len(value.users) == 1 and is_norm(user := next(iter(value.users))) and block.norm == "post-norm":
        return user
    return value


def prefix_of(graph: Graph, tokens: int) -> int:
    """How many tokens in front are no content (class, distillation, register tokens), or are read one by one. Raises Refused for learned ones at the end."""
    probe, found = Sweep(graph, {}), 0
    for node in graph.find(aten.cat.default):
        value = node.meta["val"]
        if value.dim() != 3 or value.shape[1] != tokens or argument(node, "dim") % 3 != 1:
            continue
        parts: Any = node.args[0]
        learned = [not probe.is_content(p) for p in parts]
        if learned[-1] and not all(learned):
            raise Refused(node, f"{path_of(node) or node.name} puts learned tokens behind the others, and only those in front can be left alone")
        if True in learned:
            last = len(learned) - learned[::-1].index(True)
            found = max(found, sum(int(p.meta["val"].shape[1]) for p in parts[:last]))
    for node in graph.find(aten.select.int, aten.slice.Tensor):
        source: Any = node.args[0]
        value = source.meta["val"]
        if value.dim() != 3 or value.shape[1] != tokens or argument(node, "dim") % 3 != 1 or not value.is_floating_point():
            continue
        if node.target is aten.select.int:
            found = max(found, argument(node, "index") + 1)
        else:
            start, end = argument(node, "start") or 0, argument(node, "end")
            edge = start if start else end if end is not None and end < tokens else 0
            found = max(found, edge if 0 < edge <= tokens // 4 else 0)
    return found
