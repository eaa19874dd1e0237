"""What an attention mask means: run the nodes that make it at a few sizes and compare with what masks usually are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .evaluate import LARGE, WIDTHS, Evaluator, op_name, operands, width_of
from .graph import Graph
from .nodes import same_shape

aten = torch.ops.aten

MASKED = -1e4
"""A term at or below this hides a key: exp(-10000) is 0 in every dtype. BERT wrote -10000, others the dtype's minimum or -inf."""

_MOST_NODES = 400
_ACTIVATIONS = {"linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "layer_norm", "rms_norm", "scaled_dot_product_attention", "attention"}


@dataclass(frozen=True)
class Mask:
    """A proven mask: query i sees key j if all of these allow it. `key` is [B, K]: a bool node, or an input that hides where it is 0."""

    causal: bool = False
    window: int | None = None
    key: fx.Node | None = None

    def __str__(self) -> str:
        parts = ["causal" if self.causal else "bidirectional"]
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += ["with a key mask"] if self.key is not None else []
        return " ".join(parts)


@dataclass(frozen=True)
class Unproven:
    """Why a mask could not be named; `additive` says it is a float term that may simply be added."""

    why: str
    additive: bool


def name_mask(graph: Graph, mask: fx.Node, scores: tuple[Any, Any, Any], hides: bool = False) -> Mask | Unproven:
    """What a mask over scores of sizes (batch, queries, keys) means, or why that is not known.

    mask: a bool node (True = seen; with `hides`, True = hidden) or a float term added to the scores.
    A name is given when it explains the mask at every size tried (batch 1 and others; one, few and many tokens) for random
    paddings right, left and with holes. Queries that see no key under the name are not compared: some models let such
    rows see everything (transformers' "unmask fully masked rows") or give them a uniform softmax, and no valid output
    depends on them.
    """
    is_bool = mask.meta["val"].dtype == torch.bool
    nodes = _slice_to_leaves(mask)
    if why := _unreadable(graph, mask, nodes):
        return Unproven(why, not is_bool)
    inputs = [n for n in nodes if n.op == "placeholder"]
    widths = sorted({w for n in nodes for w in _widths_in(graph, n)})
    guesses = [_Guess(key, causal, window) for key in [None, *_key_candidates(nodes, scores)] for causal in (False, True) for window in _windows(widths)]
    why = f"the mask {mask.name} is no mix of causal, window and key mask at the sizes tried"
    for any_integers in (True, False):  # an input of 0 and 1 only is a weaker proof: not for an input that is token ids too
        if not any_integers and (not inputs or any(u.target is aten.embedding.default for n in inputs for u in n.users)):
            break
        left, tried = guesses, 0
        for trial in _trials(graph, inputs, widths, any_integers):
            try:
                value = trial.run(mask)
            except (RuntimeError, IndexError):
                continue  # the model can't run at these sizes either: a table of positions is too short
            seen = value if is_bool else _seen(value)
            if seen is None:
                left, why = [], f"the mask {mask.name} also weighs the keys it shows"
                break
            left = [g for g in left if g.explains(~seen if hides and is_bool else seen, trial, scores)]
            tried += 1
        if left and tried >= 3:
            return Mask(left[0].causal, left[0].width({}), left[0].key)
    return Unproven(why, not is_bool)


@dataclass(frozen=True)
class _Guess:
    """`window` is (a large number in the graph or 0, an offset): the width is their sum."""

    key: fx.Node | None
    causal: bool
    window: tuple[int, int] | None

    def width(self, widths: dict[int, int]) -> int | None:
        return None if self.window is None else widths.get(self.window[0], self.window[0]) + self.window[1]

    def explains(self, seen: Tensor, trial: Evaluator, scores: tuple[Any, Any, Any]) -> bool:
        batch, rows, columns = (trial.size(s) for s in scores)
        distance = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
        guess = torch.ones(1, 1, rows, columns, dtype=torch.bool)
        if self.causal:
            guess = guess & (distance >= 0)
        if (width := self.width(trial.widths)) is not None:
            guess = guess & (distance.abs() < width)
        if self.key is not None:
            key = trial.run(self.key)
            guess = guess & (key if key.dtype == torch.bool else key != 0)[:, None, None, :]
        try:
            wrong = (seen != guess) & guess.any(-1, keepdim=True)
        except RuntimeError:  # shapes that don't broadcast
            return False
        return wrong.dim() == 4 and wrong.shape[0] in (1, batch) and wrong.shape[2:] == (rows, columns) and not bool(wrong.any())


def _unreadable(graph: Graph, mask: fx.Node, nodes: list[fx.Node]) -> str | None:
    """Why the nodes that make a mask should not or can't be run."""
    if len(nodes) > _MOST_NODES:
        return f"the mask {mask.name} depends on more than {_MOST_NODES} nodes"
    for n in nodes:
        if op_name(n) in _ACTIVATIONS:
            return f"the mask {mask.name} depends on activations ({n.name})"
        if n.op == "placeholder" and n.meta["val"].dim() != 2:
            return f"the mask {mask.name} depends on the values of the input {n.target}"
        if n.op == "get_attr" and graph.weight(n).is_meta:
            return f"the mask {mask.name} depends on the weight {n.target}, which has no data"
        if isinstance(n.meta["val"], torch.SymInt) and any(abs(int(c)) >= LARGE for c in n.meta["val"].node.expr.atoms() if c.is_Integer):
            return f"the mask {mask.name} depends on the size {n.meta['val']}"
    return None


def _slice_to_leaves(mask: fx.Node) -> list[fx.Node]:
    """All nodes the mask is computed from, in graph order; stops when they are too many."""
    found, stack = {mask}, [mask]
    while stack and len(found) <= _MOST_NODES:
        for n in operands(stack.pop()):
            if n not in found:
                found.add(n)
                stack.append(n)
    return sorted(found)


def _widths_in(graph: Graph, node: fx.Node) -> list[int]:
    values: list[Any] = (
        [width_of(graph, node)] if node.op == "get_attr" else [a for a in node.args if type(a) in (int, float)] if op_name(node) in WIDTHS else []
    )
    return [int(abs(v)) for v in values if v is not None and LARGE <= abs(v) < 1e7 and v == int(v)]


def _key_candidates(nodes: list[fx.Node], scores: tuple[Any, Any, Any]) -> list[fx.Node]:
    """Values of shape [batch, keys] in the mask's making: the inputs first, then bool nodes such as `ids != pad`."""
    fits = [n for n in nodes if isinstance(n.meta["val"], Tensor) and same_shape(n.meta["val"].shape, (scores[0], scores[2]))]
    return [n for n in fits if n.op == "placeholder"] + [n for n in fits if n.op == "call_function" and n.meta["val"].dtype == torch.bool]


def _windows(widths: list[int]) -> list[tuple[int, int] | None]:
    return [None, *((0, width) for width in range(1, LARGE + 3)), *((w, offset) for w in widths for offset in (-1, 0, 1, 2))]


def _trials(graph: Graph, inputs: list[fx.Node], widths: list[int], any_integers: bool) -> Iterator[Evaluator]:
    """Sizes and paddings to try: batch 1 and more; one token, few, more than any width; each dim a size of its own."""
    generator = torch.Generator().manual_seed(0)
    firsts = [n.meta["val"].shape[:1] for n in graph.inputs]
    batches = {name for name, symbol in graph.symbols.items() if any(same_shape(f, (symbol,)) for f in firsts)}
    for t, (batch, tokens) in enumerate([(3, 23), (1, 29), (2, 1), (1, 6), (2, 13), (4, 31)]):
        sizes = {}
        for i, (name, dim) in enumerate(graph.dims.items()):
            size = batch if name in batches else tokens + 2 * i
            sizes[name] = max(dim.low, size if dim.high is None else min(size, dim.high))
        trial = Evaluator(graph, sizes, {}, {w: 3 + t % 3 + 4 * i for i, w in enumerate(widths)})
        for node in inputs:
            trial.given[node] = _padding(trial.shape(node), t, any_integers, generator).to(node.meta["val"].dtype)
        yield trial


def _padding(shape: list[int], t: int, any_integers: bool, generator: torch.Generator) -> Tensor:
    """Rows padded right, left, or with holes; non-zero where a key may be seen."""
    rows, columns = shape
    length = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    position = torch.arange(columns)
    mask = [position < length, position >= columns - length, torch.rand(rows, columns, generator=generator) < 0.6][t % 3]
    return mask * (torch.randint(1, 4, (rows, columns), generator=generator) if any_integers else 1)


def _seen(term: Tensor) -> Tensor | None:
    """Which keys an added term leaves seen; None when it also takes values between."""
    hidden = term <= MASKED
    return None if bool(((term != 0) & ~hidden).any()) else ~hidden
