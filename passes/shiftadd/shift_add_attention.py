"""attention(q, k, v) -> shift_add_attention(q, k, v, conv, gain): linear attention on binary codes; its two products only add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ...ir.nodes import argument, same_shape
from ..rewrite import Context, GraphPass, predicted
from ..scope import why_not_chosen
from ..statistics import Request

aten, ours = torch.ops.aten, torch.ops.rewright
HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class ShiftAddAttention(GraphPass):
    """Replace softmax attention by linear angular attention on binary codes. Another function: it needs fine-tuning.

    Before:  attention(q, k, v, key_mask)      After:  shift_add_attention(q, k, v, conv, gain, key_mask)
    You et al. 2023 ("ShiftAddViT"; specs/quant_shiftadd.md 4.2). The filter over tokens starts at zero; a head's gain starts at the length that the
    rows of its old output had on calibration data, so that the out projection reads what it knows the size of.
    It buys additions in place of multiplications and work linear in tokens; the notes say what that is predicted to be in time.
    Declines attention that is causal, windowed, biased, capped or between two sequences, grouped key heads, token sizes, what `only` and `skip` leave
    out, and, unless untrained = "allow", programs that no later pass trains. Lossy: benchmarks/shiftadd_vit.txt.
    """

    kernel: int = 9
    """Tokens a channel's filter spans; odd."""
    untrained: Literal["refuse", "allow"] = "refuse"
    """allow: also where no pass after it in the recipe trains the program."""
    only: tuple[str, ...] = ()
    """Module paths (prefixes) of attention to replace; none: all."""
    skip: tuple[str, ...] = ()
    """Module paths (prefixes) to leave as they are."""

    name = "shift-add-attention"
    exact = False
    requires = frozenset({"mean_square"})

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"shift-add-attention: kernel is an odd number of tokens, got {self.kernel}")

    def requests(self, graph: Graph) -> list[Request]:
        return [Request(b.attention.name, self.requires, axis=-1 if _packed(b) else 1) for b in attention_blocks(graph) if self.why_not(b) is None]

    def why_not(self, block: AttentionBlock) -> str | None:
        """One sentence why an attention can't be replaced, or None."""
        path, node = path_of(block.attention), block.attention
        if why := why_not_chosen(path, self.only, self.skip):
            return why
        if block.causal:
            return "it is causal; the sums over codes are over all tokens"
        if block.window is not None:
            return f"it looks at a window of {block.window} tokens; the sums over codes are over all tokens"
        if block.bias is not None:
            return "its scores have a bias, and there are no scores to add it to"
        if block.softcap is not None:
            return f"its scores are capped at {block.softcap:g}, and there are no scores to cap"
        if argument(node, "sizes") is not None:
            return "its tokens count by sizes (merged tokens), which the sums over codes do not"
        if block.kv_heads != block.heads:
            return f"{block.kv_heads} key heads serve {block.heads} query heads; every head needs keys of its own"
        if block.kind not in ("self", "latent"):
            return f"it is {block.kind} attention: its queries and keys are not of the same tokens"
        q, k = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
        tokens = 1 if _packed(block) else 2
        if not same_shape([q.shape[tokens]], [k.shape[tokens]]):
            return f"it has {q.shape[tokens]} queries and {k.shape[tokens]} keys; the filter and the token's own value need one sequence"
        return None

    def run(self, graph: Graph, context: Context) -> Graph:
        before = context.predict(graph) if context.predict is not None else None
        untrained = None if context.trained_later or self.untrained == "allow" else NEEDS_TRAINING
        for block in attention_blocks(graph):
            node = block.attention
            if why := self.why_not(block) or untrained or context.ignored(node):
                context.decline(node, why)
            else:
                context.apply(node)
                _replace(graph, block, self.kernel, _lengths(block, context))
        if not context.applied:
            return graph
        if not context.trained_later:
            graph.notes.append(f"{self.name}: the outputs of {len(context.applied)} attentions are another function's; they need fine-tuning to be of use")
        if before is not None and context.predict is not None:
            graph.notes.append(f"{self.name}: {in_time(before, context.predict(graph), context.target_name)}")
        return graph


NEEDS_TRAINING = 'it becomes another function, and no pass after this one trains the program: add a finetune pass, or untrained = "allow" to train it later'


def in_time(before: float, after: float, target: str) -> str:
    """What is predicted to be bought, in one sentence."""
    times = predicted(before, after)
    if after < before:
        return f"{before / after:.2f} x as fast on {target}: {times} for the program"
    return f"not faster on {target}: {times}; it buys additions instead of multiplications (modelled energy), not time"


def _packed(block: AttentionBlock) -> bool:
    return block.attention.target is ours.multi_head_attention.default


def _lengths(block: AttentionBlock, context: Context) -> Tensor:
    """[heads]: the root mean square length of the rows each head gives on calibration data."""
    assert context.statistics is not None  # the pass requires them
    square = context.statistics.of(block.attention, -1 if _packed(block) else 1).mean_square
    mean = square.view(block.heads, -1).mean(-1)
    return (mean * block.value_dim).sqrt()


def _replace(graph: Graph, block: AttentionBlock, kernel: int, lengths: Tensor) -> None:
    node, path = block.attention, path_of(block.attention)
    dtype = node.meta["val"].dtype
    conv = graph.add_constant(f"{path}.conv", torch.zeros(block.heads, block.value_dim, kernel, dtype=dtype), like=node)
    gain = graph.add_constant(f"{path}.gain", lengths.to(dtype), like=node)
    q, k, v = node.args[:3]
    if not _packed(block):
        new = graph.insert(ours.shift_add_attention.default, q, k, v, conv, gain, block.key_mask, before=node)
    else:
        batch, tokens = _size(graph, node, 0), _size(graph, node, 1)
        q, k, v = (_split(graph, x, [batch, tokens, block.heads, -1], node) for x in (q, k, v))
        heads = graph.insert(ours.shift_add_attention.default, q, k, v, conv, gain, block.key_mask, before=node)
        joined = graph.insert(aten.permute.default, heads, HEADS_FIRST, before=node)
        new = graph.insert(aten.reshape.default, joined, [batch, tokens, block.heads * block.value_dim], before=node)
    node.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(node)


def _size(graph: Graph, node: fx.Node, axis: int) -> Any:
    """A size of attention's q: an int, or the node that reads it."""
    q: Any = node.args[0]
    size = q.meta["val"].shape[axis]
    return size if isinstance(size, int) else graph.insert(aten.sym_size.int, q, axis, before=node)


def _split(graph: Graph, x: Any, shape: list[Any], before: fx.Node) -> fx.Node:
    """[B, N, heads * D] -> [B, heads, N, D]"""
    return graph.insert(aten.permute.default, graph.insert(aten.reshape.default, x, shape, before=before), HEADS_FIRST, before=before)
