"""after each attention -> fewer tokens: those most alike are merged, and count as many as they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ..rewrite import Context, GraphPass
from .following import Refused
from .merge_places import places_of, sequences
from .merging import Merging

Variant = Literal["tome", "tofu", "pitome", "kth", "random"]
Metric = Literal["keys", "queries", "hidden"]
Rule = Literal["mean", "drop"]


@dataclass(frozen=True)
class TokenMerging(GraphPass):
    """Merge the tokens that are most alike, some behind every attention, and let each that is left count as many as it stands for.

    Before:  x = x + attention(norm(x));  x = x + ffn(norm(x))
    After:   x = x + attention(norm(x), sizes);  x, sizes = token_merge(x, sizes, *token_match(keys, r));  x = x + ffn(norm(x))
    Bolya et al. 2023 ("Token Merging: Your ViT But Faster"; specs/attention_tokens.md 3). Exact where merged tokens are equal. Learned tokens
    in front (class, distillation, registers) are left alone; position tables follow the tokens; means over tokens are weighted; padding goes
    first; where all tokens are needed (dense outputs) each gets a copy of what it was merged into.
    Declines programs with a dynamic number of tokens, causal or windowed attention, biases between places, and blocks whose attention is not
    added to a residual stream; with a target, a schedule that is not predicted to be faster; with calibration, one whose answers
    differ from the original's in more than 1 - min_agreement of the samples is made milder. Lossy: README's table of merged tokens.
    """

    r: int | tuple[int, ...] | None = None
    """Tokens merged at each place, or at each of them; None: as many as `share` or `ratio` asks for."""
    share: float | None = None
    """Of all tokens, merged over all places together; instead of `ratio`."""
    ratio: float = 2.0
    """FLOPs of the program over FLOPs after it."""
    inflection: float = 0.0
    """From -1 (all early) to 1 (all late): r (1 - inflection) at the first layer to r (1 + inflection) at the last."""
    variant: Variant = "tome"
    """What is merged: "tome" the most alike of every second token; "tofu" the same, means stretched to the largest norm; "pitome" tokens with many like
    them; "kth" all but every k-th; "random" any."""
    rule: Rule = "mean"
    """drop: they go without a trace (pruning)."""
    metric: Metric = "keys"
    """By which tokens are alike: keys or queries of that layer before rotation, mean over heads, or the hidden state."""
    prefix: int | None = None
    """Tokens in front that are left alone; None: the learned ones, and those the model reads one by one."""
    proportional: bool = True
    """Attention counts a token by its size; off for encoders without supervised fine-tuning (MAE)."""
    margin: float = 0.5
    """Of pitome: cosines above it count as alike."""
    layers: tuple[int, ...] | None = None
    """Only at these attentions, from 0."""
    depths: tuple[float, ...] | None = None
    """Only at the attentions at these shares of the depth, from 0 to 1."""
    where: Literal["residual", "in-block"] = "residual"
    """residual: for good. in-block: only inside the attention, by hidden states, into the first token of each `cell`; the stream keeps all
    tokens (ToMeSD: Bolya and Hoffman 2023), for models whose later layers need them."""
    cell: tuple[int, int] = (2, 2)
    """Rows and columns of the image's tokens that share a target, of in-block; (1, k): k tokens in a row, for text."""
    allocation: Literal["schedule", "sensitivity"] = "schedule"
    """sensitivity: more where it moves the outputs least, measured on calibration data layer by layer."""
    unmerge: Literal["auto", "never"] = "auto"
    """never: decline where all tokens are needed again."""
    min_agreement: float = 0.97
    """Least share of calibration samples with the original's answer; 0: don't look."""
    require_faster: bool = True

    name = "token-merging"
    exact = False

    def __post_init__(self) -> None:
        for option, literal in (("variant", Variant), ("metric", Metric), ("rule", Rule)):
            if getattr(self, option) not in (known := get_args(literal)):
                raise RecipeError(f"token-merging has no {option} {getattr(self, option)!r}; there are {', '.join(known)}")
        if self.ratio < 1:
            raise RecipeError(f"ratio is FLOPs before over FLOPs after, at least 1; got {self.ratio:g}")
        if not -1 <= self.inflection <= 1:
            raise RecipeError(f"inflection is from -1 to 1; got {self.inflection:g}")
        if self.share is not None and not 0 <= self.share < 1:
            raise RecipeError(f"share is of all tokens, from 0 to less than 1; got {self.share:g}")
        if self.layers is not None and self.depths is not None:
            raise RecipeError("give layers or depths, not both")
        if any(r < 0 for r in (self.r if isinstance(self.r, tuple) else (self.r or 0,))):
            raise RecipeError(f"r counts tokens, at least 0; got {self.r}")

    def run(self, graph: Graph, context: Context) -> Graph:
        if self.r == 0 or (self.r is None and (self.share == 0 or (self.share is None and self.ratio == 1))):
            return graph
        for names in [[p.block.attention.name for p in group] for group in sequences(places_of(self, graph, context))]:
            graph = self._merged(graph, context, names)
        return graph

    def _merged(self, graph: Graph, context: Context, attentions: list[str]) -> Graph:
        """With fewer tokens of one sequence, if that can be and pays."""
        places = [p for p in places_of(self, graph, Context()) if p.block.attention.name in attentions]
        try:
            merging = Merging(self, graph, context, places)
            gone = merging.schedule()
            after, sweep = merging.swept(gone)
        except Refused as refused:
            context.decline(refused.node, str(refused))
            return graph
        why = merging.why_not_faster(after) if any(gone) else "no schedule holds the agreement asked for"
        if why is not None:
            context.decline(places[0].value, why)
            return graph
        for place, r in zip(places, gone):
            if r:
                context.apply(place.value)
        after.notes += [*merging.remarks, merging.said(gone, after, sweep)]
        return after
