"""attention(q, k, v) -> linear_attention(phi(q), phi(k), v), or hybrid_attention with softmax near by: a cost linear in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.crossover import crossover
from ...ir.errors import RecipeError, UsageError
from ...ir.evaluate import values_of
from ...ir.feature_maps import KINDS, initial, width
from ...ir.graph import Flat, Graph
from ...ir.nodes import argument, same_shape
from ...ir.verify import padding_mask
from ..rewrite import Context, GraphPass
from .sites import longest, longest_sizes, predicted_at, why_not_plain

aten, ours = torch.ops.aten, torch.ops.rewright

GAMMA = 0.1
"""What the near tokens weigh against the far at first (LoLCATs)."""

Kind = Literal["elu1", "relu", "exp", "taylor2", "performer", "t2r", "hedgehog_softmax", "hedgehog_exp", "focused", "nala"]


@dataclass(frozen=True)
class LinearAttention(GraphPass):
    """Replace softmax attention by linear attention over features, with softmax left for near tokens. Another function: it needs training.

    Before:  attention(q, k, v, key_mask)      After:  linear_attention(phi(q), phi(k), v, key_mask)                        (window = 0)
                                                       hybrid_attention(q, k, v, phi(q), phi(k), sigmoid(share), key_mask, window)
    Katharopoulos et al. 2020; maps and the hybrid: specs/attention_tokens.md 7.4 and 8.2 (LoLCATs, Zhang et al. 2024). phi sees q and k as attention
    does, behind RoPE. Train it in two steps (recipe decoder-hybrid-linear): finetune with loss = "attention" teaches each layer alone to give what
    its attention gave, finetune with lora and the usual loss teaches them to work together.
    The layers whose output moves least on calibration data are replaced; `keep` of all layers stay softmax. A causal model loses recall of far
    tokens: no map of a fixed size holds them all.
    Declines windows, biases and caps on the scores, packed heads (put it before pack-heads), for a window also two sequences and token sizes; then,
    unless force, attention with fewer tokens than the crossover predicted for the target; and, unless untrained = "allow", programs that no later
    pass trains. Lossy: benchmarks/linear_attention.txt.
    """

    feature_map: Kind = "hedgehog_softmax"
    features: int | None = None
    """Of a projected map; default: the head's width (performer: four times that)."""
    window: int = 64
    """Softmax within blocks of that many tokens: the own one and the one before (causal) or those beside; 0: none."""
    keep: float = 0.5
    """Share of the attention layers that stay softmax, those with the largest error."""
    max_layer_error: float | None = None
    """Largest relative error of a layer's output, |new - old| / |old| on calibration data, before any training."""
    tokens: int | None = None
    """The longest input, at which time is predicted; default: what the graph allows."""
    samples: int = 8
    """Inputs (texts, images) to measure errors on; whole batches are taken until there are so many."""
    untrained: Literal["refuse", "allow"] = "refuse"
    """allow: also where no pass after it in the recipe trains the program."""
    force: bool = False
    """Also where no gain is predicted."""
    only: tuple[str, ...] = ()
    """Module paths (prefixes) of attention to replace; none: all."""
    skip: tuple[str, ...] = ()
    """Module paths (prefixes) to leave as they are."""

    name = "linear-attention"
    exact = False

    def __post_init__(self) -> None:
        for option, low in (("window", 0), ("samples", 1), ("features", 1), ("tokens", 1)):
            if (given := getattr(self, option)) is not None and given < low:
                raise RecipeError(f"linear-attention: {option} is at least {low}, got {given}")
        if not 0 <= self.keep < 1:
            raise RecipeError(f"linear-attention: keep is a share of the layers, at least 0 and below 1; got {self.keep:g}")
        if self.max_layer_error is not None and self.max_layer_error <= 0:
            raise RecipeError(f"linear-attention: max_layer_error is above 0, got {self.max_layer_error:g}")
        if self.features is not None and not KINDS[self.feature_map].projected:
            raise RecipeError(f"linear-attention: {self.feature_map} has as many features as it has; features is for {', '.join(PROJECTED)}")

    def why_not(self, block: AttentionBlock) -> str | None:
        """One sentence why an attention can't be linear, or None."""
        if why := why_not_plain(block, self.name, self.only, self.skip):
            return why
        if block.kind == "pooling":
            return "its queries are learned and few: it is linear in tokens already"
        q, k = (a.meta["val"].shape[2] for a in block.attention.args[:2])  # type: ignore[union-attr]
        if not same_shape([q], [k]):
            if block.causal:
                return f"it is causal and has {q} queries and {k} keys; both need the same tokens"
            if self.window:
                return f"it has {q} queries and {k} keys, and a window needs one sequence; window = 0 replaces it"
        if self.window and argument(block.attention, "sizes") is not None:
            return "its tokens count by sizes (merged tokens), which a window does not; window = 0 replaces it"
        return None

    def run(self, graph: Graph, context: Context) -> Graph:
        blocks = attention_blocks(graph)
        sites = []
        untrained = None if context.trained_later or self.untrained == "allow" else NEEDS_TRAINING
        for block in blocks:
            if why := self.why_not(block) or self._too_short(graph, block, context) or untrained or context.ignored(block.attention):
                context.decline(block.attention, why)
            else:
                sites.append(block)
        if not sites:
            return graph
        forced = self.force and self.tokens is None  # then nothing hangs on the longest input, which the graph need not know
        sizes = longest_sizes(graph, sites, self.name, self.tokens) if context.predict is not None and not forced else {}
        before = context.predict(graph, sizes) if context.predict is not None else None
        made = {site: self._beside(graph, site, context.seed) for site in sites}
        errors = self._errors(graph, made, context)
        chosen = sorted(sites, key=lambda s: errors.get(s, 0.0))[: math.floor((1 - self.keep) * len(blocks) + 1e-9)]
        replaced = []
        for site in sites:
            if self.max_layer_error is not None and errors[site] > self.max_layer_error:
                context.decline(
                    site.attention, f"its output would move by {errors[site]:.2f} of its length, more than max_layer_error = {self.max_layer_error:g}"
                )
            elif site not in chosen:
                why = f"keep = {self.keep:g} leaves {len(blocks) - len(chosen)} of {len(blocks)} layers softmax"
                context.decline(site.attention, why + (f", and its output would move by {errors[site]:.2f} of its length" if site in errors else ""))
            else:
                context.apply(site.attention)
                replaced.append(f"{path_of(site.attention)} {errors[site]:.2f}" if site in errors else path_of(site.attention))
                site.attention.replace_all_uses_with(made[site], propagate_meta=False)
        graph.fx.eliminate_dead_code()
        if not replaced:
            return graph
        if errors:
            graph.notes.append(f"{self.name}: how far outputs moved before any training, as a share of their length: {', '.join(replaced)}")
        if not context.trained_later:
            graph.notes.append(f"{self.name}: the outputs of {len(replaced)} attentions are another function's; they need training to be of use")
        if before is not None and context.predict is not None:
            after = context.predict(graph, sizes)
            graph.notes.append(f"{self.name}: {predicted_at(sizes, before, after, context.target_name)}")
        return graph

    def _too_short(self, graph: Graph, block: AttentionBlock, context: Context) -> str | None:
        """The crossover in words, where the longest input is below it."""
        if context.predict is None or self.force:
            return None
        tokens = longest(graph, block, self.name, self.tokens)
        batch = block.attention.meta["val"].shape[0]
        least = crossover(
            context.predict,
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.head_dim,
            value_dim=block.value_dim,
            feature_map=self.feature_map,
            features=self.features,
            causal=block.causal,
            window=self.window,
            batch=graph.size(batch),
        )
        if least is not None and tokens >= least:
            return None
        what = f"linear attention ({self.feature_map}, {width(self.feature_map, block.head_dim, self.features)} features"
        what += f", window {self.window})" if self.window else ")"
        when = f"only from {least:,} tokens on" if least is not None else "at no length"
        return f"it has {tokens:,} tokens, and on {context.target_name} {what} is predicted to be faster {when}; force = true replaces it all the same"

    def _beside(self, graph: Graph, site: AttentionBlock, seed: int) -> fx.Node:
        """The replacement, with nobody who reads it yet."""
        node, path, (q, k, v) = site.attention, path_of(site.attention), site.attention.args[:3]
        mask, sizes = argument(node, "key_mask"), argument(node, "sizes")
        features = [self._features(graph, site, x, heads, seed, query) for x, heads, query in ((q, site.heads, True), (k, site.kv_heads, False))]
        if self.window:
            logit = torch.full((site.heads,), math.log(GAMMA / (1 - GAMMA)))
            share = graph.insert(aten.sigmoid.default, graph.add_constant(f"{path}.near_share", logit, like=node), before=node)
            return graph.insert(ours.hybrid_attention.default, q, k, v, *features, share, mask, self.window, site.causal, site.scale, before=node)
        weights = mask if sizes is None else sizes if mask is None else graph.insert(aten.mul.Tensor, sizes, mask, before=node)
        return graph.insert(ours.linear_attention.default, *features, v, weights, site.causal, before=node)

    def _features(self, graph: Graph, site: AttentionBlock, x: Any, heads: int, seed: int, query: bool) -> fx.Node:
        node = site.attention
        factor = 1.0 if site.scale is None else site.scale * site.head_dim**0.5
        if query and abs(factor - 1) > 1e-6:  # a temperature of its own: products stand for exp(q.k / sqrt d)
            x = graph.insert(aten.mul.Tensor, x, factor, before=node)
        first = initial(self.feature_map, heads, site.head_dim, seed, self.features)
        names = [f"{path_of(node)}.{'query' if query else 'key'}_map{'' if i == 0 else f'_{i}'}" for i in range(len(first))]
        parameters = [graph.add_constant(name, value, like=node) for name, value in zip(names, first)]
        return graph.insert(ours.feature_map.default, x, parameters, self.feature_map, query, before=node)

    def _errors(self, graph: Graph, made: dict[AttentionBlock, fx.Node], context: Context) -> dict[AttentionBlock, float]:
        """How far each layer's output would move. Nothing without data, which only keep = 0 can do without."""
        if context.calibration is None or graph.on_meta:
            if self.keep or self.max_layer_error is not None:
                raise UsageError(f"{self.name} chooses layers by their error on calibration data, and there is none; give some, or keep = 0 and `only`")
            return {}
        return layer_errors(graph, {site: (site.attention, new) for site, new in made.items()}, context.calibration.first(self.samples))


PROJECTED = [name for name, kind in KINDS.items() if kind.projected]

NEEDS_TRAINING = 'it becomes another function, and no pass after this one trains the program: add finetune passes, or untrained = "allow" to train it later'


def layer_errors(graph: Graph, pairs: dict[Any, tuple[fx.Node, fx.Node]], batches: Sequence[Flat]) -> dict[Any, float]:
    """|new - old| / |old| of pairs of values [b, h, n, dv] over all real tokens of the batches."""
    sums: dict[Any, Tensor] = {}  # [2] each: of the change, of the old
    program = values_of(graph, [n.name for pair in pairs.values() for n in pair])
    mask = padding_mask(graph)
    for flat in batches:
        with torch.no_grad():
            found = iter(program(*flat))
        real = mask(flat)
        for key in pairs:
            old, new = next(found).double(), next(found).double()
            rows = torch.stack([(new - old).square().sum((1, 3)), old.square().sum((1, 3))])  # [2, b, n]
            chosen = rows[:, real] if real is not None and real.shape == rows.shape[1:] else rows.flatten(1)
            sums[key] = sums.get(key, 0) + chosen.sum(1)
    return {key: float((both[0] / both[1].clamp(min=1e-30)).sqrt()) for key, both in sums.items()}
