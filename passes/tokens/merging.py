"""Which tokens are merged, how many at each place, and what that is worth: one run of token-merging over one sequence."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import is_logits, past_casts, path_of
from ...ir.cost import cost
from ...ir.graph import Graph
from ...ir.nodes import argument
from ...ir.verify import padding_mask, real_rows
from ..rewrite import Context
from ..sensitivity import rows_drift
from .fewer_tokens import Cut, Make, Sweep, numbers_after
from .following import Refused, Rows, Tokens
from .merge_places import Place, prefix_of
from .schedule import TokenFlops, allocated, clamped, ramp, solved

if TYPE_CHECKING:
    from .token_merging import TokenMerging

aten = torch.ops.aten
ours = torch.ops.rewright

INFLECTIONS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Of the shapes that allocation = sensitivity compares."""
STEPS = 4
"""How many numbers of tokens it tries at every layer alone."""
BATCHES = 16
"""Calibration batches that schedules are compared on, at most."""


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
        if options.where == "in-block":
            return self._agreeing(self._in_block(layers))
        if isinstance(options.r, tuple):
            if len(options.r) != layers:
                raise Refused(self.places[0].value, f"r has {len(options.r)} numbers and there are {layers} layers to merge behind")
            gone = clamped(options.r, self.tokens, self.prefix)
        elif options.r is not None:
            gone = clamped(ramp(options.r, options.inflection, layers), self.tokens, self.prefix)
        elif options.share is not None:
            gone = clamped(ramp(options.share * self.tokens / layers, options.inflection, layers), self.tokens, self.prefix)
        else:
            gone = self._solved(options.ratio)
        return self._agreeing(gone)

    def _in_block(self, layers: int) -> list[int]:
        """Tokens that are away during each attention: no more than there are candidates."""
        wanted = self.options.r if self.options.r is not None else int((0.5 if self.options.share is None else self.options.share) * self.tokens)
        if isinstance(wanted, tuple):
            raise Refused(self.places[0].value, "in-block takes one r for all layers")
        return [min(wanted, len(self._cells()[0]))] * layers

    def _flops(self) -> TokenFlops:
        _, sweep = self.swept([1] * len(self.places))
        return TokenFlops.of(self.graph, sweep, self.tokens, [p.value.name for p in self.places])

    def _solved(self, ratio: float) -> list[int]:
        """What reaches a ratio of FLOPs: of the shape asked for, or of all shapes that which moves the outputs least on calibration data."""
        flops = self._flops()
        found = self._shaped(flops, ratio)
        if (reached := flops.ratio(found)) < ratio:
            self.remarks.append(f"token-merging: {reached:.2f} times less FLOPs is the most these places can give, {ratio:g} was asked for")
        return found

    def _shaped(self, flops: TokenFlops, ratio: float) -> list[int]:
        if self.options.allocation == "schedule" or not self.batches:
            return solved(flops, ratio, self.options.inflection, self.prefix)
        most = solved(flops, ratio, 0.0, self.prefix)
        drifts = self._sensitivities(max(1, max(most) // 4))
        alone = ", ".join(f"{path_of(p.block.attention)} {steps[-1][1]:.1e} ({steps[-1][0]})" for p, steps in zip(self.places, drifts) if steps)
        self.remarks.append(f"token-merging: drift of the outputs with tokens gone at one place alone (how many): {alone}")
        shapes = [solved(flops, ratio, inflection, self.prefix) for inflection in INFLECTIONS]
        reached = [s for s in [*shapes, allocated(flops, drifts, ratio, self.prefix)] if flops.ratio(s) >= ratio] or [most]
        return min(reached, key=self._drift)

    def _outputs(self, gone: Sequence[int]) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """On every calibration batch each float output, without padding: whether it is logits, what it was, what it is with this schedule."""
        after, _ = self.swept(gone)
        mask = padding_mask(self.graph)
        nodes = self.graph.output.args[0]
        for flat, before in zip(self.batches, self.reference, strict=True):
            for node, a, b in zip(nodes, before, after.run(flat), strict=True):  # type: ignore[arg-type]
                if isinstance(a, Tensor) and a.is_floating_point():
                    yield is_logits(node), real_rows(a, mask(flat)), real_rows(b, mask(flat))  # type: ignore[arg-type]

    def _drift(self, gone: Sequence[int]) -> float:
        """How far the outputs move on calibration data, the mean over batches: KL divergence of logits in nats, squared error relative to others."""
        return sum(float(rows_drift(a, b, logits).mean()) for logits, a, b in self._outputs(gone)) / len(self.batches)

    def _agreement(self, gone: Sequence[int]) -> float:
        """The share of rows of logits with the same largest one."""
        return float(torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for logits, a, b in self._outputs(gone) if logits]).double().mean())

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
        if not options.min_agreement or not self.batches or not any(is_logits(n) for n in self.graph.output.all_input_nodes):
            return gone
        if self._agreement(gone) >= options.min_agreement:
            return gone
        low, high = 0, max(gone)  # of the largest r: low holds, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._agreement([r * middle // max(gone) for r in gone]) >= options.min_agreement else (low, middle)
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
            new, sizes = sweep.items(merged, before)
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
            return sweep.items(found, before)
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
        return sweep.items(sweep.insert(before, ours.token_match.default, metric, r, self.prefix, sizes, *sets), before)

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
        return None if then < now else f"predicted {then:.0f} us with merging against {now:.0f} us without, on {self.context.target_name}"

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
