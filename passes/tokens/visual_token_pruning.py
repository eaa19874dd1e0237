"""a prompt with an image -> the same with fewer image tokens from some layers on: those that the text does not look at are dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import is_logits
from ...ir.cost import cost
from ...ir.errors import RecipeError, UsageError
from ...ir.graph import Graph
from ...ir.nodes import argument, set_argument
from ..rewrite import NOT_ASKED, Context, GraphPass
from ..sensitivity import rows_drift
from .fewer_tokens import Cut, Make, Sweep
from .following import Refused, Rows
from .prompt import Prompt, PromptSweep, PromptTokens, counted, find_prompt, image_after, keep_of, tokens_at
from .visual_merging import merged_image
from .visual_schedule import METHODS, MethodName, Stage, by_layer, sigmoid_shares, smallest
from .visual_scores import Criterion, ScoredBy, best, grid_of, scores

aten = torch.ops.aten
ours = torch.ops.rewright

FIRST_LAYER = 2
"""The first two layers gather what an image shows into few tokens: before them nothing tells which."""


@dataclass(frozen=True)
class VisualTokenPruning(GraphPass):
    """Drop image tokens of a vision-language prompt between layers of the language model, in a graph that computes the last token's logits.

    Before:  x = layer_8(layer_7(...))     After:  keep = all text tokens and the image tokens that receive most attention
                                                   x = layer_8(token_take(layer_7(...), keep)), and every layer after with fewer tokens
    Cached keys and values are outputs with fewer tokens in the layers behind; kept tokens keep their positions, so decoding goes on
    at the position it would have. specs/attention_tokens.md 5.

    method: "balanced" (half of the image tokens after a quarter of the layers, a quarter after half of them, scored without RoPE, with a
    grid), "feather" (ICCV 2025), "fastv" (ECCV 2024), "pyramiddrop" (CVPR 2025) or "aim" (ICCV 2025: an eighth of the tokens by merging
    before the first layer, then none by two thirds of the layers). Every other option left out is the method's.

    Prompts of a batch may have their image elsewhere, where the graph finds it by its ids, but each has one of the same size, and a text token last.
    Declines where image tokens can't be found, layers that are not causal or look at distances in tokens, outputs with a row for every
    token, a dynamic number of tokens. Text tokens always stay. Lossy: what the text looks at is a guess. FEATHER has RefCOCO 43.4 with a
    grid against FastV's 7.6 (Prismatic SigLIP-7B): measure on localisation, reading and counting, not on average answers.
    """

    method: MethodName = "balanced"
    image_span: tuple[int, int] | None = None
    """(first image token, how many); None: as the graph has them, by a concatenation or by the image tokens among the ids."""
    stages: tuple[tuple[int, float], ...] | None = None
    """(before layer, share of the image tokens that stay from there on), shares falling; the grid comes on top of the first."""
    criterion: Criterion | None = None
    """What image tokens are ranked by: see visual_scores."""
    scored_by: ScoredBy | None = None
    """Whose queries and keys: layer-before's are there already, layer-behind's are computed for it."""
    uniform_stride: int | None = None
    """Every so many-th token of every so many-th row stays at the first stage; 0: no grid."""
    image_grid: tuple[int, int] | None = None
    """(rows, columns) of the image tokens; None: a square."""
    positions: Literal["original", "renumber"] | None = None
    """original: kept tokens keep theirs; renumber: they are counted anew after each stage (and decoding has to know)."""
    pre_llm_keep: float | None = None
    """1, 0.5, 0.25, ...: image embeddings are merged in pairs, so many times, before the first layer. Shares are then of what is left."""
    frame_tokens: int | None = None
    """Tokens of one frame of a video, merged among themselves; None: it is one image."""
    sigmoid: tuple[float, float, float] | None = None
    """(least share, steepness, middle): before each layer the share of P-Sigmoid's curve, in place of stages (CVPR 2025)."""
    max_drift: float | None = None
    """KL divergence in nats of the last token's softmax, mean over calibration inputs: each stage in turn keeps the smallest share that
    holds it, from shallow to deep (G-Search, CVPR 2025). Shares of stages are then the least there is to try."""

    name = "visual-token-pruning"
    exact = False
    shortens_outputs = True

    def __post_init__(self) -> None:
        for layer, share in self.stages or ():
            if layer < FIRST_LAYER:
                raise RecipeError(f"stages: no image token may go before layer {FIRST_LAYER}, got layer {layer}: the first layers see what each is for")
            if not 0 <= share <= 1:
                raise RecipeError(f"stages: the share that stays is from 0 to 1, got {share:g}")
        if self.stages and self.sigmoid:
            raise RecipeError("sigmoid gives a share to every layer and takes the place of stages; give one of them")
        ordered = [list(self.stages or ()), sorted(self.stages or ())]
        if ordered[0] != ordered[1] or any(a[1] < b[1] for a, b in zip(ordered[0], ordered[0][1:])):
            raise RecipeError(f"stages go from shallow to deep with falling shares, got {self.stages}")
        kept = self._pre_llm_keep
        if not 0 < kept <= 1 or not math.log2(kept).is_integer():
            raise RecipeError(f"pre_llm_keep halves the image tokens some times: 1, 0.5, 0.25, 0.125, ...; got {kept:g}")
        if kept < 1 and self._stride:
            raise RecipeError("merged image tokens form no grid: uniform_stride = 0 goes with pre_llm_keep")
        if self.max_drift is not None and self.max_drift <= 0:
            raise RecipeError(f"max_drift is a divergence in nats above 0, got {self.max_drift:g}")

    # What isn't given is the method's.

    @property
    def _criterion(self) -> Criterion:
        return self.criterion or METHODS[self.method].criterion

    @property
    def _scored_by(self) -> ScoredBy:
        return self.scored_by or METHODS[self.method].scored_by

    @property
    def _stride(self) -> int:
        return METHODS[self.method].uniform_stride if self.uniform_stride is None else self.uniform_stride

    @property
    def _positions(self) -> str:
        return self.positions or METHODS[self.method].positions

    @property
    def _pre_llm_keep(self) -> float:
        return METHODS[self.method].pre_llm_keep if self.pre_llm_keep is None else self.pre_llm_keep

    def _grid(self, image: int) -> tuple[int, int]:
        return self.image_grid or (math.isqrt(image), math.isqrt(image))

    def run(self, graph: Graph, context: Context) -> Graph:
        prompt = find_prompt(graph, self.image_span)
        if isinstance(prompt, tuple):
            context.decline(*prompt)
            return graph
        plan = self._plan(prompt)
        if isinstance(plan, str):
            context.decline(prompt.values[0], plan)
            return graph
        stages = [s for s in plan if self._asked(prompt, s, context)]
        if not stages:
            return graph
        try:
            after, shorter = self._pruned(graph, stages)
            if self.max_drift is not None:
                stages = self._search(graph, prompt, stages, context)
                after, shorter = self._pruned(graph, stages)
        except Refused as refused:
            context.decline(_namesake(graph, refused.node), str(refused))
            return graph
        if not stages:
            return graph
        for stage in stages:
            context.apply(prompt.layers[stage.layer].attention)
        after.notes.append(f"{self._said(prompt, stages, shorter)}; {cost(graph).flops / cost(after).flops:.2f} times less FLOPs")
        return after

    def _asked(self, prompt: Prompt, stage: Stage, context: Context) -> bool:
        node = prompt.layers[stage.layer].attention
        why = context.ignored(node)
        if why is not None and why != NOT_ASKED:
            context.decline(node, why)
        return why is None

    def _plan(self, prompt: Prompt) -> list[Stage] | str:
        """How many image tokens are left from which layer on, or why there is no telling."""
        depth, image = len(prompt.layers), prompt.image.count
        found: list[Stage] = []
        kept = self._pre_llm_keep
        if kept < 1:
            frame = self.frame_tokens or image
            if image % frame or frame * kept % 1:
                return f"{image} image tokens in frames of {frame} can't be halved to {kept:g} of them"
            image = int(image * kept)
            found.append(Stage(0, image, merged=True))
        shares = sigmoid_shares(self.sigmoid, depth, FIRST_LAYER) if self.sigmoid else self.stages
        shares = METHODS[self.method].stages_of(depth, FIRST_LAYER) if shares is None else shares
        if bad := [layer for layer, _ in shares if layer >= depth]:
            return f"there is no layer {bad[0]}: the model has {depth}"
        grid = 0
        if self._stride:
            shape = self._grid(image)
            if math.prod(shape) != image:
                return f"{image} image tokens are no grid of {shape[0]} x {shape[1]}; give image_grid=(rows, columns), or uniform_stride=0"
            grid = int(grid_of(shape, self._stride).sum())
        for layer, share in by_layer(shares):
            extra = 0 if found else grid
            count = extra + round(share * (image - extra))
            if count < (found[-1].count if found else image):
                found.append(Stage(layer, count, grid=extra > 0))
        return found

    def _pruned(self, graph: Graph, stages: Sequence[Stage]) -> tuple[Graph, list[int]]:
        """A graph with these stages, and the outputs it has fewer rows of. Raises Refused."""
        draft = graph.draft()
        prompt = find_prompt(draft, self.image_span)
        assert isinstance(prompt, Prompt)
        cuts = {prompt.values[s.layer]: Cut(self._merge(prompt, s) if s.merged else self._drop(prompt, s)) for s in stages}
        for block in prompt.layers:
            if block.window is not None and block.window >= prompt.tokens:  # it hides nothing of so short a prompt
                set_argument(block.attention, "window", None)
        sweep = PromptSweep(draft, cuts, prompt.layers)
        sweep.run()
        draft.clean()
        return draft, sweep.shorter

    def _drop(self, prompt: Prompt, stage: Stage) -> Make:
        block = prompt.layers[stage.layer - (self._scored_by == "layer-before")]

        def cut(sweep: Sweep, value: fx.Node, known: Rows | None, before: fx.Node) -> tuple[fx.Node, PromptTokens]:
            assert isinstance(sweep, PromptSweep)
            tokens = tokens_at(sweep, value, known, prompt.image, before)
            image, chosen = tokens.image, None
            if stage.count and self._criterion == "uniform":
                even = torch.arange(stage.count) * image.count // stage.count
                chosen = counted(sweep, value, even, before)
            elif stage.count:
                grid = grid_of(self._grid(image.count), self._stride) if stage.grid else None
                found = scores(sweep, value, known, tokens, block, self._criterion, self._scored_by, before)
                chosen = best(sweep, found, stage.count, grid, before)
            keep = keep_of(sweep, value, tokens, chosen, before)
            left = self._left(sweep, value, tokens, keep, stage.count, before)
            return sweep.insert(before, ours.token_take.default, value, keep, like=value), left

        return cut

    def _left(self, sweep: PromptSweep, value: fx.Node, tokens: PromptTokens, keep: fx.Node, count: int, before: fx.Node, anew: bool = False) -> PromptTokens:
        """The tokens behind a cut that keeps these."""
        left = tokens.count - tokens.image.count + count
        positions = tokens.positions
        if anew or self._positions == "renumber":
            positions = counted(sweep, value, range(left), before)
        elif positions is not None:
            positions = sweep.insert(before, ours.token_take.default, positions, keep)
        return replace(
            tokens,
            count=left,
            numbers=sweep.insert(before, ours.token_take.default, tokens.numbers, keep),
            image=image_after(sweep, tokens.image, keep, count, before),
            positions=positions,
        )

    def _merge(self, prompt: Prompt, stage: Stage) -> Make:
        """Tokens that are left are counted anew: the language model sees a prompt that was shorter from the start."""
        frame = self.frame_tokens or prompt.image.count

        def cut(sweep: Sweep, value: fx.Node, known: Rows | None, before: fx.Node) -> tuple[fx.Node, PromptTokens]:
            assert isinstance(sweep, PromptSweep)
            tokens = tokens_at(sweep, value, known, prompt.image, before)
            merged, chosen = merged_image(sweep, value, tokens, frame, stage.count, before)
            keep = keep_of(sweep, value, tokens, chosen, before)
            return merged, self._left(sweep, value, tokens, keep, stage.count, before, anew=True)

        return cut

    def _search(self, graph: Graph, prompt: Prompt, stages: Sequence[Stage], context: Context) -> list[Stage]:
        """The smallest counts that hold `max_drift` on calibration inputs."""
        if context.calibration is None or graph.on_meta:
            raise UsageError("max_drift is held on calibration inputs, with weights; give some: calibration=Calibration(batches)")
        cached = {argument(block.attention, side) for block in prompt.layers for side in ("k", "v")}
        logits = [i for i, n in enumerate(graph.output.args[0]) if isinstance(n, fx.Node) and n not in cached and is_logits(n)]  # type: ignore[arg-type]
        if not logits:
            raise UsageError("max_drift compares the softmax of logits, and no output is made by a linear layer of several classes")
        batches = context.calibration.batches

        def of(program: Graph) -> list[Tensor]:
            return [outputs[i] for outputs in map(program.run, batches) for i in logits]

        expected = of(graph)
        tried = 0

        most = self.max_drift or 0.0

        def holds(some: list[Stage]) -> bool:
            nonlocal tried
            context.progress(f"{self.name}: trying {some[-1].count} image tokens before layer {some[-1].layer}", tried, tried + 1)
            tried += 1
            rows = [rows_drift(a, b, True) for a, b in zip(expected, of(self._pruned(graph, some)[0]), strict=True)]
            return torch.cat(rows).mean().item() <= most

        found = smallest(stages, prompt.image.count, holds)
        for stage in stages:
            if stage.layer not in [s.layer for s in found]:
                why = f"with fewer image tokens from here on the outputs move by more than {most:g} nats"
                context.decline(prompt.layers[stage.layer].attention, why)
        return found

    def _said(self, prompt: Prompt, stages: Sequence[Stage], shorter: Sequence[int]) -> str:
        """What is left where, and how decoding goes on."""
        text, image = prompt.tokens - prompt.image.count, prompt.image.count
        kept = ", ".join(f"{s.count} {'merged ' if s.merged else ''}from layer {s.layer} on" for s in stages)
        said = f"{self.name}: of {image} image tokens {kept}"
        if not shorter:
            return said
        lengths = [text + next((s.count for s in reversed(stages) if s.layer <= i), image) for i in range(len(prompt.layers))]
        first = prompt.tokens if not stages[0].merged else text + stages[0].count
        at = f"positions go on from {first}" if self._positions == "original" else "positions of each layer go on from its length"
        return f"{said}; cached keys and values of the layers have {', '.join(map(str, lengths))} tokens, {at}"


def _namesake(graph: Graph, node: fx.Node) -> fx.Node:
    """The node of that name in the graph as it was; the last layer's output stands for one a sweep made."""
    return next((n for n in graph.fx.nodes if n.name == node.name), graph.output)
