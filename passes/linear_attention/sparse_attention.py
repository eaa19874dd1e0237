"""attention(q, k, v) -> block_attention(q, k, v, blocks): each block of queries sees a few blocks of keys, the same for every input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.block_patterns import density, heaviest, kept, window
from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import RecipeError, UsageError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from .block_mass import dropped_mass, mean_mass
from .sites import longest, longest_sizes, predicted_at, why_not_plain

ours = torch.ops.rewright

Pattern = Literal["calibrated", "window", "diagonal"]


@dataclass(frozen=True)
class SparseAttention(GraphPass):
    """Block-sparse attention for long inputs: a static pattern of blocks of `block` tokens (specs/attention_tokens.md 9.3).

    Before:  attention(q, k, v, key_mask)      After:  block_attention(q, k, v, blocks, block, key_mask)
    calibrated: of each head and block of queries the blocks of keys with the most attention on calibration data, as many for all heads
    of a layer as keep `mass` of it on average; patterns are found once and serve every input (as SparseD's, Wang et al. 2025, serve
    every denoising step). window: `window` tokens to each side, in whole blocks; diagonal: the block itself (TransNormer, Qin et al. 2022).
    The block itself and `sinks` first blocks are always among them; the first `global_tokens` see all, and all see their block.
    What is dropped bounds the error: |y - y'| <= 2 (dropped mass) max |v|; the notes have both densities and dropped mass on held-out data.
    Declines attention over two sequences, windowed, biased, capped or with token sizes, packed heads (put it before pack-heads), layers whose
    density is above `most_density`, and, unless force, programs that are not predicted to get faster on the target.
    Lossy: on MiniLM with 512 tokens, keeping 0.8 of the attention takes half to three quarters of the blocks of 64 tokens, cosine 0.982, and takes
    as long in onnxruntime as dense attention: it pays where attention is far sparser, or texts far longer (benchmarks/sparse_attention.txt).
    """

    pattern: Pattern = "calibrated"
    block: int = 64
    """Tokens a block."""
    window: int = 128
    """Tokens to each side, of the pattern window."""
    sinks: int = 1
    """Blocks at the start that everybody sees."""
    global_tokens: int = 0
    """Tokens at the start that see everybody, such as a class token."""
    mass: float = 0.95
    """calibrated: the share of attention to keep, on average over heads and queries of a layer."""
    most_density: float = 0.5
    """Layers that need more of their blocks stay dense."""
    tokens: int | None = None
    """The longest input the pattern is made for; default: what the graph allows."""
    samples: int = 8
    """calibrated: inputs (texts, images) to look at; whole batches are taken until there are so many."""
    force: bool = False
    """Also where no gain is predicted."""
    only: tuple[str, ...] = ()
    """Module paths (prefixes) of attention to make sparse; none: all."""
    skip: tuple[str, ...] = ()
    """Module paths (prefixes) to leave dense."""

    name = "sparse-attention"
    exact = False

    def __post_init__(self) -> None:
        for option, low in (("block", 1), ("window", 0), ("sinks", 0), ("global_tokens", 0), ("samples", 1)):
            if getattr(self, option) < low:
                raise RecipeError(f"sparse-attention: {option} is at least {low}, got {getattr(self, option)}")
        for option in ("mass", "most_density"):
            if not 0 < getattr(self, option) <= 1:
                raise RecipeError(f"sparse-attention: {option} is a share above 0, at most 1; got {getattr(self, option):g}")

    def why_not(self, block: AttentionBlock) -> str | None:
        """One sentence why an attention stays dense whatever its pattern, or None."""
        if why := why_not_plain(block, self.name, self.only, self.skip):
            return why
        if argument(block.attention, "sizes") is not None:
            return "its tokens count by sizes (merged tokens), which sparse-attention has no place for"
        if block.kind not in ("self", "latent"):
            return f"it is {block.kind} attention: its queries and keys are not of the same tokens"
        return None

    def run(self, graph: Graph, context: Context) -> Graph:
        sites: list[AttentionBlock] = []
        for block in attention_blocks(graph):
            if why := self.why_not(block) or context.ignored(block.attention):
                context.decline(block.attention, why)
            else:
                sites.append(block)
        chosen: dict[AttentionBlock, Tensor] = {}
        for site, blocks in self._patterns(graph, context, sites).items():
            if (share := density(blocks, site.causal)) > self.most_density:
                context.decline(site.attention, self._too_dense(share))
            else:
                chosen[site] = blocks
        if not chosen:
            return graph
        sparse = graph.draft()
        _replace(sparse, chosen, self.block, self.global_tokens)
        if context.predict is not None:
            sizes = longest_sizes(graph, chosen, self.name, self.tokens)
            before, after = (context.predict(g, sizes) for g in (graph, sparse))
            times = predicted_at(sizes, before, after, context.target_name)
            if after >= before and not self.force:
                for site in chosen:
                    context.decline(site.attention, f"the program would not get faster: {times}; force = true does it all the same")
                return graph
            sparse.notes.append(f"sparse-attention: {times}")
        for site in chosen:
            context.apply(site.attention)
        sparse.notes += self._dropped(graph, context, chosen)
        return sparse

    def _patterns(self, graph: Graph, context: Context, sites: list[AttentionBlock]) -> dict[AttentionBlock, Tensor]:
        counts = {site: -(-longest(graph, site, self.name, self.tokens) // self.block) for site in sites}
        if self.pattern != "calibrated":
            reach = 0 if self.pattern == "diagonal" else -(-self.window // self.block)
            sinks = 0 if self.pattern == "diagonal" else max(self.sinks, bool(self.global_tokens))
            return {site: window(count, reach, site.causal, sinks) for site, count in counts.items()}
        if context.calibration is None:
            raise UsageError('sparse-attention looks for patterns on calibration data and there is none; give some, or pattern = "window"')
        found = mean_mass(graph, context.calibration.first(self.samples), {site.attention: n for site, n in counts.items()}, self.block)
        return {site: self._heaviest(found[site.attention], site) for site in sites}

    def _heaviest(self, mass: Tensor, site: AttentionBlock) -> Tensor:
        """The fewest slots that keep enough on average."""
        sinks = max(self.sinks, bool(self.global_tokens))
        seen = mass.sum(-1) > 0
        slots = min(sinks + 1, mass.shape[-1])
        while True:
            blocks = heaviest(mass, slots, sinks, site.causal)
            if slots == mass.shape[-1] or kept(mass, blocks)[seen].mean() >= self.mass:
                return blocks
            slots += 1

    def _too_dense(self, share: float) -> str:
        why = f"keeping {self.mass:g} of its attention" if self.pattern == "calibrated" else "the pattern"
        return f"{why} takes {share:.2f} of its blocks, more than most_density = {self.most_density:g}"

    def _dropped(self, graph: Graph, context: Context, chosen: dict[AttentionBlock, Tensor]) -> list[str]:
        """What each layer leaves out, in words."""
        said = {site: f"{path_of(site.attention)} density {density(blocks, site.causal):.2f}" for site, blocks in chosen.items()}
        if context.calibration is not None and not graph.on_meta:
            held_out = context.calibration.batches[-1:]
            lost = dropped_mass(graph, held_out, {site.attention: blocks for site, blocks in chosen.items()}, self.block, self.global_tokens)
            for site in chosen:
                mean, most = lost[site.attention]
                said[site] += f", dropped mass {mean:.3f} on average and {most:.3f} at most"
        return [f"sparse-attention: {'; '.join(said.values())}", "sparse-attention: an output moves by twice its dropped mass times the largest value at most"]


def _replace(graph: Graph, chosen: dict[AttentionBlock, Tensor], block: int, dense: int) -> None:
    by_name = {n.name: n for n in graph.nodes}
    for site, blocks in chosen.items():
        node = by_name[site.attention.name]
        if not isinstance(node.meta["val"].shape[2], int):  # the number of blocks stays a symbol as long as it is not all of them
            blocks = torch.nn.functional.pad(blocks, (0, 0, 0, 1), value=-1)
        pattern = graph.add_constant(f"{path_of(node)}.blocks", blocks, like=node)
        given: dict[str, Any] = {name: argument(node, name) for name in ("key_mask", "causal", "scale")}
        mask, causal, scale = given["key_mask"], given["causal"], given["scale"]
        new = graph.insert(ours.block_attention.default, *node.args[:3], pattern, block, mask, causal, scale, dense, before=node)
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.fx.erase_node(node)
