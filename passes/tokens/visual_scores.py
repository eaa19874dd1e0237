"""Which image tokens matter to a prompt: by the attention they receive, or spread evenly over the image."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch import fx

from ...ir.blocks import AttentionBlock
from ...ir.blocks.vocabulary import path_of
from ...ir.nodes import argument
from .following import Refused, Rows, Tokens
from .prompt import PromptSweep, PromptTokens, image_rows

aten = torch.ops.aten
ours = torch.ops.rewright

Criterion = Literal["last-token", "last-token-rope", "pagerank", "uniform"]
ScoredBy = Literal["layer-before", "layer-behind"]
TEMPERATURE, STEPS = 0.1, 5
"""Of pagerank, as AIM (ICCV 2025) has them."""
GRID = 2.0
"""More than any score: a token of the grid is kept before all others."""


def scores(
    sweep: PromptSweep, value: fx.Node, known: Rows | None, tokens: PromptTokens, block: AttentionBlock, criterion: Criterion, by: ScoredBy, before: fx.Node
) -> fx.Node:
    """float32 [B, image tokens] by the queries and keys of a layer, which reads `value` (layer-behind) or is over (layer-before).

    last-token: the attention an image token receives from the last token of the prompt, without RoPE and among image tokens (FEATHER, ICCV
    2025: with RoPE the bottom of an image, near the text, is favoured); the mean over heads.
    last-token-rope: as the layer itself attends, among all tokens (FastV, ECCV 2024; PyramidDrop, CVPR 2025).
    pagerank: five steps of a walk along softmax(scores / 0.1) from an even start; the root of the mean square over heads (AIM, ICCV 2025).
    """
    rope = criterion != "last-token"
    sides = {}
    for side, rows in (("q", "all" if criterion == "pagerank" else "last"), ("k", "all" if rope else "image")):
        make = _of_layer_before if by == "layer-before" else _of_layer_behind
        sides[side] = make(sweep, value, known, tokens, block, side, rows, rope, before)
    mask = argument(block.attention, "key_mask") if rope else None
    if mask is not None and by == "layer-behind" and known is not None:
        mask = sweep.insert(before, ours.token_take.default, mask, tokens.numbers)
    attend = _pagerank if criterion == "pagerank" else _received
    found = attend(sweep, block, sides["q"], sides["k"], mask, before)
    return image_rows(sweep, found, tokens.image, 1, before) if rope else found


def best(sweep: PromptSweep, found: fx.Node, k: int, grid: torch.Tensor | None, before: fx.Node) -> fx.Node:
    """int64 [B, k], ascending: the places of the highest scores, and of the grid (bool [image tokens]) first. Of equal ones the first."""
    if grid is not None:
        bonus = sweep.graph.add_constant("image_tokens.grid", grid.float()[None] * GRID, like=before)
        found = sweep.insert(before, aten.add.Tensor, found, bonus)
    order = sweep.insert(before, operator.getitem, sweep.insert(before, aten.sort.stable, found, stable=True, dim=1, descending=True), 1)
    chosen = sweep.insert(before, aten.slice.Tensor, order, 1, 0, k)
    return sweep.insert(before, operator.getitem, sweep.insert(before, aten.sort.default, chosen, 1), 0)


def grid_of(shape: tuple[int, int], stride: int) -> torch.Tensor:
    """bool [rows * columns]: every `stride`-th token of every `stride`-th row."""
    rows, columns = (torch.arange(n) % stride == 0 for n in shape)
    return (rows[:, None] & columns).flatten()


def _received(sweep: PromptSweep, block: AttentionBlock, q: fx.Node, k: fx.Node, mask: fx.Node | None, before: fx.Node) -> fx.Node:
    """[B, K]: what one query's heads give each key, on average. q: [B, H, 1, d]"""

    def insert(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return sweep.insert(before, target, *args, **kwargs)

    found = _logits(sweep, block, q, k, 1.0, before)  # [B, Hkv, H / Hkv, K]
    if mask is not None:
        found = insert(aten.masked_fill.Scalar, found, _hidden(sweep, mask, before), float("-inf"))
    return insert(aten.mean.dim, insert(aten.softmax.int, found, -1), [1, 2])


def _pagerank(sweep: PromptSweep, block: AttentionBlock, q: fx.Node, k: fx.Node, mask: fx.Node | None, before: fx.Node) -> fx.Node:
    """[B, N]: how much of a walk along attention ends at each token. q: [B, H, N, d]"""

    def insert(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return sweep.insert(before, target, *args, **kwargs)

    heads, count = (int(s) for s in q.meta["val"].shape[1:3])
    found = insert(aten.reshape.default, _logits(sweep, block, q, k, TEMPERATURE, before), [-1, heads, count, count])
    later = sweep.graph.add_constant("image_tokens.later", torch.ones(count, count, dtype=torch.bool).triu(1), like=before)
    found = insert(aten.masked_fill.Scalar, found, later, torch.finfo(torch.float32).min)  # finite: a padded query sees no key
    steps = STEPS
    if mask is None:
        moves = insert(aten.softmax.int, found, -1)
        walk, steps = insert(aten.mean.dim, moves, [2], True), STEPS - 1  # the first step of an even start
    else:
        moves = insert(aten.softmax.int, insert(aten.masked_fill.Scalar, found, _hidden(sweep, mask, before), torch.finfo(torch.float32).min), -1)
        real = insert(aten._to_copy.default, mask, dtype=torch.float32)
        even = insert(aten.div.Tensor, real, insert(aten.sum.dim_IntList, real, [1], True))
        walk = insert(aten.unsqueeze.default, insert(aten.unsqueeze.default, even, 1), 1)
    for _ in range(steps):
        walk = insert(aten.matmul.default, walk, moves)
    return insert(aten.sqrt.default, insert(aten.mean.dim, insert(aten.mul.Tensor, walk, walk), [1, 2]))


def _hidden(sweep: PromptSweep, mask: fx.Node, before: fx.Node) -> fx.Node:
    """bool [B, 1, 1, K]: the keys that a mask [B, K] does not show."""
    hidden = sweep.insert(before, aten.bitwise_not.default, mask)
    return sweep.insert(before, aten.unsqueeze.default, sweep.insert(before, aten.unsqueeze.default, hidden, 1), 1)


def _logits(sweep: PromptSweep, block: AttentionBlock, q: fx.Node, k: fx.Node, temperature: float, before: fx.Node) -> fx.Node:
    """float32 [B, Hkv, (H / Hkv) * Q, K]: the scores of a layer's attention, divided by a temperature. Query heads of one key head are neighbours."""
    heads, count, width = (int(s) for s in q.meta["val"].shape[1:])
    shared = int(k.meta["val"].shape[1])
    together = sweep.insert(before, aten.reshape.default, q, [-1, shared, heads // shared * count, width])
    found = sweep.insert(before, aten.matmul.default, together, sweep.insert(before, aten.permute.default, k, [0, 1, 3, 2]))
    if found.meta["val"].dtype != torch.float32:
        found = sweep.insert(before, aten._to_copy.default, found, dtype=torch.float32)
    scale = width**-0.5 if block.scale is None else block.scale
    if block.softcap is not None:
        found = sweep.insert(before, aten.tanh.default, sweep.insert(before, aten.mul.Tensor, found, scale / block.softcap))
        scale = block.softcap
    return sweep.insert(before, aten.mul.Tensor, found, scale / temperature)


# -- queries and keys ---------------------------------------------------------------------------------------------------


def _of_layer_before(
    sweep: PromptSweep, value: fx.Node, known: Rows | None, tokens: PromptTokens, block: AttentionBlock, side: str, rows: str, rope: bool, before: fx.Node
) -> fx.Node:
    """[B, heads, rows, d]: what the layer attended with, from the node that holds it."""
    found: Any = argument(block.attention, side)
    if not rope:
        turns = [n for n in _between(None, found) if n.target is ours.rope.default]
        _check_rope(block, turns)
        found = sweep.again(_between(turns[0], found)[1:], {turns[0]: turns[0].args[0]}, None, before)[found] if turns else found  # type: ignore[dict-item]
    if rows == "image":
        return image_rows(sweep, found, tokens.image, 2, before)
    return found if rows == "all" else sweep.insert(before, aten.slice.Tensor, found, 2, -1, torch.iinfo(torch.int64).max)


def _of_layer_behind(
    sweep: PromptSweep, value: fx.Node, known: Rows | None, tokens: PromptTokens, block: AttentionBlock, side: str, rows: str, rope: bool, before: fx.Node
) -> fx.Node:
    """[B, heads, rows, d]: what the layer would attend with, computed for these tokens alone."""
    end: Any = argument(block.attention, side)
    chain = _between(value, end)[1:]
    turns = [n for n in chain if n.target is ours.rope.default]
    if not rope:
        _check_rope(block, turns)
    some, left = value, known
    if rows != "all":
        if rows == "image":
            some = image_rows(sweep, value, tokens.image, 1, before)
            numbers = image_rows(sweep, tokens.positions or tokens.numbers, tokens.image, 1, before)
        else:
            last = (1, -1, torch.iinfo(torch.int64).max)
            some, numbers = (sweep.insert(before, aten.slice.Tensor, v, *last) for v in (value, tokens.positions or tokens.numbers))
        left = Rows(Tokens(int(some.meta["val"].shape[1]), tokens.original, 0, numbers, None, None), 1)
    return sweep.again(chain, {value: some}, left, before, () if rope else turns)[end]


def _check_rope(block: AttentionBlock, turns: list[fx.Node]) -> None:
    if block.rope and len(turns) != 1:
        why = f"{path_of(block.attention)} turns its queries and keys in more than one call, which can't be left out: criterion = last-token-rope keeps it"
        raise Refused(block.attention, why)


def _between(start: fx.Node | None, end: fx.Node) -> list[fx.Node]:
    """What computes `end` from `start`, both included, in order; from the nearest RoPE or layer on without a start."""
    found, work = {end}, [end]
    while work:
        node = work.pop()
        if node is start or (start is None and (node.target is ours.rope.default or node.target is aten.linear.default)):
            continue
        new = [n for n in node.all_input_nodes if n not in found and n.op == "call_function"]
        found.update(new)
        work += new
    if start is None:
        return sorted(found)
    depends = {start}
    for node in sorted(found):
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    return sorted(depends)
