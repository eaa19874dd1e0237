"""linear(act(linear(x, Wu, bu)), Wd, bd) -> the same with fewer hidden channels, and a Wd, bd that make up for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ...ir.blocks import ffn_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ..rewrite import NOT_ASKED, Context, GraphPass
from ..statistics import Order, Request
from .allocation import Method
from .ffn_narrowing import Choice, Narrowing
from .hidden_channels import HiddenChannels, hidden_channels

Choosing = Literal["obs", "energy", "leverage", "random", "prefix", "mask"]
Refit = Literal["affine", "linear", "none"]


@dataclass(frozen=True)
class FFNWidth(GraphPass):
    """Keep the hidden channels of feed-forward blocks that matter most, and fit the output weights to what is left.

    Before:  y = linear(act(linear(x, Wu, bu)), Wd, bd)      After:  y = linear(act(linear(x, Wu[S], bu[S])), Wd', bd')
    and likewise gated (two linears or one fused) and for experts, each of which keeps channels of its own, as many as the others.
    Wd' = Wd[:, S] + Wd[:, N] C_NS (C_SS + lambda)^-1, with C the (centred) second moment of the hidden channels and N those that go, is the
    best there is for S; bd' takes up the mean (MoDeGPT's MLP module, arXiv 2408.09632, with a ridge on the correction alone).

    selection: "obs" removes batch by batch what costs least after refit (optimal brain surgeon on channels; specs/structured_ffn.md 5.1);
    "energy" C_jj |Wd_j|^2, "leverage" MoDeGPT's score, "random" by the seed, "prefix" the first channels (MatFormer's slices),
    "mask" what a safetensors file says. Beyond 16384 hidden channels obs is energy, and the notes say so.
    refit: "affine", "linear" (no bias) or "none". With "none", the last three selections need no data.
    allocation: see allocation.Method; without data, and for one layer, all layers keep the same share. waterfill counts errors relative to
    the residual stream they go into, where there is one: by their own output's alone, layers that all others build on give too much.
    Experts are refitted without a bias; one that saw fewer than 5 tokens a channel keeps its columns as they are, chosen by energy,
    or by weight norms where it saw none.
    Declines norms over the hidden channels, other readers of them, shared, computed or quantized weights, 1x1 convolutions.
    On weights that are streamed, the new Wd is held in memory.
    Lossy: on the shipped stdlib-lm (perplexity 10.25 on 64 held-out windows, calibrated on 16,384 tokens) 30 % less of the blocks is
    10.83, 50 % less 11.82.
    """

    ratio: float = 0.3
    """The share of the blocks' weights that is removed; a mask says itself what goes."""
    selection: Choosing = "obs"
    refit: Refit = "affine"
    allocation: Method = "waterfill"
    calibration: Order = "oneshot"
    round_to: int = 64
    """Widths are multiples of it, or of an eighth of the narrowest block where that is less."""
    floor: float = 0.5
    """No block keeps less than this share of what uniform would give it."""
    ridge: float = 1e-4
    """Relative to the mean of C's diagonal."""
    shrink: float = 0.0
    """C's off-diagonal times 1 - shrink, against overfitting few tokens."""
    batch: int = 64
    """Channels obs removes at a time, an eighth of all at most."""
    mask: str = ""
    """A safetensors file: path of the layer or name of the down weight -> the channels that stay, bool [hidden] or int64 indices;
    for experts bool [experts, hidden] or int64 [experts, kept]."""

    name = "ffn-width"
    exact = False

    def __post_init__(self) -> None:
        for option, literal in (("selection", Choosing), ("refit", Refit), ("allocation", Method), ("calibration", Order)):
            if getattr(self, option) not in (known := get_args(literal)):
                raise RecipeError(f"ffn-width has no {option} {getattr(self, option)!r}; there are {', '.join(known)}")
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"ratio is the share that is removed, from 0 to less than 1; got {self.ratio:g}")
        if self.allocation == "welore":
            raise RecipeError("welore allocates by singular values of matrices, and hidden channels have none; use waterfill or uniform")
        if self.ridge <= 0:
            raise RecipeError(f"ridge must be positive, moments of few tokens are singular; got {self.ridge:g}")
        for option, low, high in (("floor", 0, 1), ("shrink", 0, 1), ("round_to", 1, None), ("batch", 1, None)):
            value = getattr(self, option)
            if value < low or high is not None and value > high:
                raise RecipeError(f"{option} must be {f'from {low} to {high}' if high is not None else f'at least {low}'}; got {value:g}")
        if (self.selection == "mask") != bool(self.mask):
            raise RecipeError('mask is the path of a safetensors file, for selection="mask"; give both or none')

    @property
    def needs_data(self) -> bool:
        """Whether calibration is needed: not where channels are chosen without looking and nothing is refitted."""
        return self.refit != "none" or self.selection in ("obs", "energy", "leverage")

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        if not self.needs_data:
            return frozenset()
        told = {"waterfill": "mean_square", "waterfill-influence": "influence", "block-influence": "influence"}.get(self.allocation)
        return frozenset({"gram"}) if told is None or self.selection == "mask" else frozenset({"gram", told})

    def requests(self, graph: Graph) -> list[Request]:
        found = []
        for block in ffn_blocks(graph) if self.requires else ():
            channels = hidden_channels(graph, block)
            if isinstance(channels, str):
                continue
            if block.experts is None:  # experts' moments come from the tokens each of them sees
                found.append(Request(channels.value.name, frozenset({"gram"})))
            if (terms := block.residual_terms) is None:
                continue
            start, branch, total = (n.name for n in terms)
            if "influence" in self.requires:
                found.append(Request(total, frozenset({"influence"}), block_input=start))
            if "mean_square" in self.requires:
                found += [Request(value, frozenset({"mean", "mean_square"})) for value in (branch, total)]
        return found

    def run(self, graph: Graph, context: Context) -> Graph:
        if not self.ratio and self.selection != "mask":
            return graph
        sites = self._sites(graph, context)
        if not sites:
            return graph
        narrowing = Narrowing(self, graph, context, sites)
        choices = narrowing.masked() if self.selection == "mask" else narrowing.allocated()
        said = self._said(graph, sites, choices)
        for i, (site, choice) in enumerate(zip(sites, choices)):
            context.progress(f"{self.name}: {path_of(site.block.down)}", i, len(sites))
            if isinstance(choice, str):
                context.decline(site.block.down, choice)
                continue
            context.apply(site.block.down)
            narrowing.narrow(site, choice)
        if context.only is None:
            graph.notes += [said, *narrowing.remarks]
        return graph

    def _sites(self, graph: Graph, context: Context) -> list[HiddenChannels]:
        """The blocks whose hidden channels can be taken away, in the order they start; the rest is declined."""
        found = []
        for block in ffn_blocks(graph):
            why = context.ignored(block.down)
            channels = hidden_channels(graph, block) if why is None else why
            if isinstance(channels, HiddenChannels):
                found.append(channels)
            elif channels != NOT_ASKED:
                context.decline(block.down, channels)
        return sorted(found, key=lambda site: site.block.up)

    def _said(self, graph: Graph, sites: Sequence[HiddenChannels], choices: Sequence[Choice]) -> str:
        """What is removed of the blocks, of the model, and where."""
        total = gone = gone_bytes = 0
        each = []
        for site, choice in zip(sites, choices):
            hidden = site.block.hidden
            width = hidden if isinstance(choice, str) else choice if isinstance(choice, int) else choice.shape[-1]
            total, gone = total + site.unit * hidden, gone + site.unit * (hidden - width)
            gone_bytes += site.unit * (hidden - width) * site.matrices[0].meta["val"].dtype.itemsize
            each.append(f"{site.block.layer or path_of(site.block.down)} {hidden} -> {width}")
        model = gone_bytes / graph.weight_bytes()
        return f"{self.name}: {gone / total:.1%} less weights in {len(sites)} feed-forward blocks, {model:.1%} less in the model: {', '.join(each)}"
