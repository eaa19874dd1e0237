"""Which attentions can lose their scores or part of them, and at which input length it is judged: shared by the passes of this folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...ir.blocks import AttentionBlock
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import UsageError
from ...ir.graph import Graph
from ..rewrite import predicted
from ..scope import why_not_chosen

ours = torch.ops.rewright


def why_not_plain(block: AttentionBlock, name: str, only: tuple[str, ...], skip: tuple[str, ...]) -> str | None:
    """One sentence why an attention of any mask class stays as it is: left out by the user, or scores that are more than q.k under a mask."""
    if why := why_not_chosen(path_of(block.attention), only, skip):
        return why
    if block.attention.target is not ours.attention.default:
        return f"its heads are packed; put {name} before pack-heads"
    if block.window is not None:
        return f"it looks at a window of {block.window} tokens already"
    if block.bias is not None:
        return f"its scores have a bias, which {name} has no place for"
    if block.softcap is not None:
        return f"its scores are capped at {block.softcap:g}, which {name} has no place for"
    return None


def longest(graph: Graph, site: AttentionBlock, name: str, tokens: int | None) -> int:
    """Queries of an attention at the longest input. Raises UsageError when neither the graph nor `tokens` says."""
    size = site.attention.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
    if isinstance(size, int):
        return size
    if tokens is not None:
        return tokens
    highs = [graph.dims[dim].high for dim, symbol in graph.symbols.items() if symbol.node.expr == size.node.expr]
    if not highs or highs[0] is None:
        raise UsageError(f"{name} is judged at the longest input, and the graph sets no limit; give tokens")
    return highs[0]


def longest_sizes(graph: Graph, sites: Iterable[AttentionBlock], name: str, tokens: int | None) -> dict[str, int]:
    """Dynamic dims of tokens at the longest input."""
    names = {str(symbol.node.expr): dim for dim, symbol in graph.symbols.items()}
    found = {}
    for site in sites:
        size = site.attention.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
        if not isinstance(size, int) and (dim := names.get(str(size.node.expr))):
            found[dim] = longest(graph, site, name, tokens)
    return found


def predicted_at(sizes: dict[str, int], before: float, after: float, target: str) -> str:
    """Both predictions of a program in words, and for which sizes they are."""
    return f"{predicted(before, after)} before on {target}" + "".join(f", {dim} {size}" for dim, size in sizes.items())
