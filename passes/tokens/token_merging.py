"""after each attention -> fewer tokens: those most alike are merged, and count as many as they stand for."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.vocabulary import FUSED_NORMS, is_logits, is_norm, is_sum, past_casts, path_of
from ...ir.cost import cost
from ...ir.errors import RecipeError
from ...ir.graph import Flat, Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from .fewer_tokens import Cut, Make, Refused, Rows, Sweep, Tokens, numbers_after
from .schedule import TokenFlops, allocated, clamped, ramp, solved

aten = torch.ops.aten
ours = torch.ops.rewright

Variant = Literal["tome", "tofu", "pitome", "kth", "random"]
Metric = Literal["keys", "queries", "hidden"]
Rule = Literal["mean", "drop"]


INFLECTIONS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Of the shapes that allocation = sensitivity compares."""
STEPS = 4
"""How many numbers of tokens it tries at every layer alone."""
BATCHES = 16
"""Calibration batches that schedules are compared on, at most."""


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


class Merging:
    """One run of the pass over the places of one sequence."""

    def __init__(self, options: TokenMerging, graph: Graph, context: Context, places: Sequence[Place]) -> None:
        self.options, self.graph, self.context, self.places = options, graph, context, places
        self.remarks: list[str] = []
        calibration = None if graph.on_meta else context.calibration
        self.batches = [] if calibration is None else calibration.batches[:BATCHES]
        self.tokens = int(places[0].value.meta["val"].shape[1])
        self.prefix = options.prefix if options.prefix is not None else prefix_of(graph, self.tokens)

    @functools.cached_property
    def reference(self) -> list[tuple]:
        """The outputs of the original on calibration data."""
        return [self.graph.run(flat) for flat in self.batches]

    # -- how many -------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[int]:
        """Tokens that go at each place."""
        options, layers = self.options, len(self.places)
        if isinstance(options.r, tuple):
            if len(options.r) != layers:
                raise Refused(self.places[0].value, f"r has {len(options.r)} numbers and there are {layers} layers to merge behind")
            gone = clamped(options.r, self.tokens, self.prefix)
        elif options.r is not None:
            gone = clamped(ramp(options.r, options.inflection, layers), self.tokens, self.prefix)
        elif options.where == "in-block":
            gone = [min(int((0.5 if options.share is None else options.share) * self.tokens), len(self._cells()[0]))] * layers
        elif options.share is not None:
            gone = clamped(ramp(options.share * self.tokens / layers, options.inflection, layers), self.tokens, self.prefix)
        else:
            gone = self._solved(options.ratio)
        return self._agreeing(gone)

    def _flops(self) -> TokenFlops:
        _, sweep = self.swept([1] * len(self.places))
        return TokenFlops.of(self.graph, sweep, self.tokens, [p.value.name for p in self.places])

    def _solved(self, ratio: float) -> list[int]:
        """What reaches a ratio of FLOPs: of the shape asked for, or of all shapes that which moves the outputs least on calibration data."""
        flops = self._flops()
        if self.options.allocation == "schedule" or not self.batches:
            return solved(flops, ratio, self.options.inflection, self.prefix)
        most = solved(flops, ratio, 0.0, self.prefix)
        shapes = [solved(flops, ratio, inflection, self.prefix) for inflection in INFLECTIONS]
        shapes.append(allocated(flops, self._sensitivities(max(1, max(most) // 4)), ratio, self.prefix))
        reached = [s for s in shapes if flops.ratio(s) >= ratio] or [most]
        return min(reached, key=self._drift)

    def _drift(self, gone: Sequence[int]) -> float:
        """Of the outputs on calibration data with this schedule."""
        after, _ = self.swept(gone)
        return _drift(self.graph, self.reference, [after.run(flat) for flat in self.batches])

    def _sensitivities(self, step: int) -> list[list[tuple[int, float]]]:
        """For each place the drift of the outputs with more and more tokens gone there alone."""
        found = []
        for i in range(len(self.places)):
            self.context.progress("sensitivity of layers", i, len(self.places))
            steps: list[tuple[int, float]] = []
            for r in range(step, (self.tokens - self.prefix) // 2 + 1, step)[:STEPS]:
                drift = self._drift([r if j == i else 0 for j in range(len(self.places))])
                steps.append((r, max(drift, steps[-1][1] if steps else 0.0)))
            found.append(steps)
        return found

    def _agreeing(self, gone: list[int]) -> list[int]:
        """The schedule, or the largest one of its shape that holds min_agreement on the calibration data."""
        options = self.options
        if not options.min_agreement or not self.batches or not _logits(self.graph):
            return gone

        def holds(schedule: Sequence[int]) -> bool:
            after, _ = self.swept(schedule)
            return agreement(self.graph, self.reference, [after.run(flat) for flat in self.batches]) >= options.min_agreement

        if holds(gone):
            return gone
        low, high = 0, max(gone)  # of the largest r: low holds, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds([r * middle // max(gone) for r in gone]) else (low, middle)
        milder = [r * low // max(gone) for r in gone]
        self.remarks.append(
            f"token-merging: {sum(gone)} tokens less would change more than {1 - options.min_agreement:.0%} of the answers on calibration data, "
            f"so there are {sum(milder)} less; min_agreement = 0 insists"
        )
        return milder

    # -- the edit -------------------------------------------------------------------------------------------------------

    def swept(self, gone: Sequence[int]) -> tuple[Graph, Sweep]:
        """A draft of the graph with so many tokens gone at each place. Raises Refused."""
        draft = self.graph.draft()
        nodes = {n.name: n for n in draft.fx.nodes}
        cuts = {}
        for place, r in zip(self.places, gone):
            if r:
                readers = None if place.readers is None else frozenset(nodes[name] for name in place.readers)
                cuts[nodes[place.value.name]] = Cut(self._cut(place, r, nodes), readers)
        sweep = Sweep(draft, cuts)
        sweep.run()
        if self.options.unmerge == "never" and sweep.unmerged:
            node = sweep.unmerged[0]
            raise Refused(node, f"{path_of(node)} needs all tokens again, and unmerge = never")
        draft.clean()
        return draft, sweep

    def _cut(self, place: Place, r: int, nodes: dict[str, fx.Node]) -> Make:
        options = self.options

        def cut(sweep: Sweep, value: fx.Node, known: Rows | None, before: fx.Node) -> tuple[fx.Node, Tokens]:
            if sweep.unmerged and known is None and options.where == "residual":
                node = sweep.unmerged[0]
                raise Refused(node, f"{path_of(node)} needs all tokens, in front of more layers to merge behind")
            if known is not None and (known.begin or known.axis != 1):
                raise Refused(value, f"{path_of(value)}: tokens are counted along axis {known.axis} from {known.begin} on, not as they were")
            tokens = known.tokens if known is not None else None
            left = tokens.count if tokens is not None else self.tokens
            sizes = tokens.sizes if tokens is not None else self._mask(sweep, nodes[place.block.attention.name], before)
            masked = tokens.masked if tokens is not None else sizes is not None
            metric = self._metric(sweep, place, nodes, value, before)
            keep, source, slot = self._matched(sweep, metric, r, left, sizes, before)
            numbers = numbers_after(sweep, known, keep, before)
            if options.rule == "drop":
                new = sweep.insert(before, ours.token_take.default, value, keep)
                sizes = None if sizes is None else sweep.insert(before, ours.token_take.default, sizes, keep)
                return new, Tokens(left - r, self.tokens, self.prefix, numbers, sizes, None, masked)
            merged = sweep.insert(before, ours.token_merge.default, value, keep, source, slot, sizes, options.variant == "tofu", like=value)
            new, sizes = _items(sweep, merged, 2, before)
            places = sweep.insert(before, ours.token_places.default, keep, source, slot, tokens.places if tokens is not None else None)
            return new, Tokens(left - r, self.tokens, self.prefix, numbers, sizes, places, masked, options.proportional)

        return cut

    def _mask(self, sweep: Sweep, attention: fx.Node, before: fx.Node) -> fx.Node | None:
        """Sizes at the start, where there is padding: 1 and 0."""
        mask = argument(attention, "key_mask")
        return None if mask is None else sweep.insert(before, aten._to_copy.default, mask, dtype=torch.float32)

    def _metric(self, sweep: Sweep, place: Place, nodes: dict[str, fx.Node], value: fx.Node, before: fx.Node) -> fx.Node:
        """[B, tokens, d]: what tokens are compared by."""
        if self.options.metric == "hidden" or self.options.where == "in-block":
            return value
        block, attention = place.block, nodes[place.block.attention.name]
        name, heads, made = ("k", block.kv_heads, block.to_k) if self.options.metric == "keys" else ("q", block.heads, block.to_q)
        source = None if made.linear is None else nodes[made.linear.name]
        if source is not None and made.rows is not None and made.norm is None and source.meta["val"].shape[:2] == value.meta["val"].shape[:2]:
            # before rotation, and before heads are split
            return self._mean_head(sweep, self._channels(sweep, made.rows.flatten(), source), heads, before)
        operand = past_casts(argument(attention, name))
        if attention.target is ours.multi_head_attention.default:
            return self._mean_head(sweep, operand, heads, before)
        return sweep.insert(before, aten.mean.dim, operand.args[0] if operand.target is ours.rope.default else operand, [1])

    def _mean_head(self, sweep: Sweep, value: fx.Node, heads: int, before: fx.Node) -> fx.Node:
        """[B, tokens, heads * d] -> [B, tokens, d]"""
        tokens, width = (int(s) for s in value.meta["val"].shape[1:])
        return sweep.insert(before, aten.mean.dim, sweep.insert(before, aten.reshape.default, value, [-1, tokens, heads, width // heads]), [2])

    def _channels(self, sweep: Sweep, rows: Tensor, made: fx.Node) -> fx.Node:
        """The channels of a linear's output that make keys or queries, head by head."""
        first = int(rows[0])
        if torch.equal(rows, torch.arange(first, first + len(rows))):
            if len(rows) == int(made.meta["val"].shape[-1]):
                return made
            return sweep.insert(made.next, aten.slice.Tensor, made, -1, first, first + len(rows))
        index = sweep.graph.add_constant(f"{made.name}_rows", rows, like=made)
        return sweep.insert(made.next, aten.index_select.default, made, -1, index)

    def _matched(self, sweep: Sweep, metric: fx.Node, r: int, left: int, sizes: fx.Node | None, before: fx.Node) -> list[fx.Node]:
        options = self.options
        if options.variant == "pitome":
            found = sweep.insert(before, ours.token_match_energy.default, metric, r, self.prefix, options.margin, sizes)
            return _items(sweep, found, 3, before)
        sets: list[fx.Node] = []
        if options.where == "in-block":
            sets = [sweep.graph.add_constant(f"token_{name}_{left}", t, like=metric) for name, t in zip(("candidates", "targets"), self._cells())]
        elif options.variant in ("kth", "random"):
            behind = torch.arange(self.prefix, left)
            if options.variant == "random":
                generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + left)
                gone = torch.randperm(len(behind), generator=generator)[:r].sort().values
            else:
                k = max(2, -(-len(behind) // max(1, len(behind) - r)))  # every k-th is a target, so that r candidates are left
                gone = (torch.arange(len(behind)) % k != k - 1).nonzero().squeeze(1)
            kept = torch.ones(len(behind), dtype=torch.bool)
            kept[gone] = False
            sets = [sweep.graph.add_constant(f"token_{name}_{left}", behind[index], like=metric) for name, index in (("candidates", gone), ("targets", kept))]
        return _items(sweep, sweep.insert(before, ours.token_match.default, metric, r, self.prefix, sizes, *sets), 3, before)

    def _cells(self) -> tuple[Tensor, Tensor]:
        """Candidates and targets of in-block: the first token of each cell is a target. Raises Refused for cells of an image that is no square."""
        count = self.tokens - self.prefix
        rows, columns = self.options.cell
        side = 1 if rows == 1 else math.isqrt(count)
        if count % side or (rows > 1 and side * side != count):
            raise Refused(
                self.places[0].value, f"{count} tokens behind the first {self.prefix} are no square image; for a row of tokens give cell = (1, {columns})"
            )
        grid = torch.zeros(side, count // side, dtype=torch.bool)
        grid[::rows, ::columns] = True
        flat = grid.flatten()
        return (~flat).nonzero().squeeze(1) + self.prefix, flat.nonzero().squeeze(1) + self.prefix

    # -- what it is worth -------------------------------------------------------------------------------------------------

    def why_not_faster(self, after: Graph) -> str | None:
        """The sentence for a schedule that is not predicted to pay."""
        if not self.options.require_faster:
            return None
        if (flops := cost(after).flops / cost(self.graph).flops) >= 1:
            return f"with merging it takes {flops:.3f} times the FLOPs: what is behind needs all tokens again"
        if self.context.predict is None:
            return None
        now, then = self.context.predict(self.graph) * 1e6, self.context.predict(after) * 1e6
        return None if then < now else f"predicted {then:.0f} us with merging against {now:.0f} us without, on {self.context.target.name}"

    def said(self, gone: Sequence[int], after: Graph, sweep: Sweep) -> str:
        """The schedule in a sentence."""
        if self.options.where == "residual":
            then = "then " + ", ".join(str(self.tokens - sum(gone[: i + 1])) for i in range(len(gone)))
        else:
            then = f"{self.tokens - gone[0]} inside {len(gone)} attentions"
        dense = ", ".join(dict.fromkeys(path_of(n) or "the output" for n in sweep.unmerged)) if self.options.where == "residual" else ""
        copied = f"; copied back to all in front of {dense}" if dense else ""
        ratio = cost(self.graph).flops / cost(after).flops
        return f"token-merging: {self.tokens} tokens, {self.prefix} of them left alone; {then}; {ratio:.2f} times less FLOPs{copied}"


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


def _items(sweep: Sweep, call: fx.Node, count: int, before: fx.Node) -> list[fx.Node]:
    return [sweep.insert(before, operator.getitem, call, i) for i in range(count)]


def agreement(graph: Graph, before: Sequence[Flat], after: Sequence[Flat]) -> float:
    """The share of rows of logits with the same largest one."""
    same = [(a.argmax(-1) == b.argmax(-1)).flatten() for i in _logits(graph) for x, y in zip(before, after, strict=True) for a, b in [(x[i], y[i])]]
    return float(torch.cat(same).double().mean())


def _logits(graph: Graph) -> list[int]:
    return [i for i, n in enumerate(graph.output.args[0]) if isinstance(n, fx.Node) and is_logits(n)]  # type: ignore[arg-type, var-annotated]


def _drift(graph: Graph, before: Sequence[Flat], after: Sequence[Flat]) -> float:
    """KL of logits a row in nats, or squared error relative to the output's for outputs that are none."""
    logits, total = set(_logits(graph)), 0.0
    for x, y in zip(before, after, strict=True):
        for i, (a, b) in enumerate(zip(x, y)):
            if not isinstance(a, Tensor) or not a.is_floating_point():
                continue
            a, b = a.double(), b.double()
            if i in logits:
                a, b = a.log_softmax(-1), b.log_softmax(-1)
                total += float((a.exp() * (a - b)).sum(-1).mean())
            else:
                total += float((a - b).square().sum() / a.square().sum().clamp(min=1e-30))
    return total / len(before)
