"""linear(x, w, b) -> two block-diagonal products with a shuffle between, or one block-diagonal and one dense: fewer weights and FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import path_of
from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..linear_algebra import shrunk
from ..made import add_made
from ..rewrite import NOT_ASKED, Context, GraphPass
from ..scope import Scope, linears_in, why_not_stored
from ..statistics import Moments, Order, Request
from .block_projection import Blocks, merged, projected, refitted_first, refitted_second
from .block_seconds import block_seconds, dense_seconds, threshold
from .predicted import rows_of

ours = torch.ops.rewright

Kind = Literal["block-dense", "block-shuffle"]
"""block-dense: a block-diagonal matrix, then a dense one.   block-shuffle: two block-diagonal ones, each with a shuffle behind it (Monarch)."""


@dataclass(frozen=True)
class BlockStructured(GraphPass):
    """Replace matrices by products of block-diagonal ones, nearest to them in the outputs they make.

    Before:  linear(x, w, b)      After:  block_dense_linear(x, v, u, b), or block_shuffle_linear(x, w1, w2, b)
    Every pair of an input block and an output block is projected by an SVD of its own: in the weights, which is then the nearest
    matrix of that structure, or in what its inputs make; then the factors are refitted in closed form to the whole layer's output
    on calibration data, and so is the bias (a layer without gets one). Building on Efficient Foundations (Wei et al. 2024), Monarch
    (Dao et al. 2022); specs/structured_ffn.md 6.
    Declines tied and computed weights, layers with fewer channels than blocks, shapes that save nothing, and, with premerge =
    "auto" and a target, layers that would not be faster there: they stay as they are.
    Lossy: 30 % off the FFNs of zoo:stdlib-lm takes its perplexity from 10.73 to 11.94, with 3 refits to 11.82 (block-shuffle: 12.51 and 12.16).
    """

    kind: Kind = "block-dense"
    ratio: float = 0.3
    """Share of each layer's parameters that is removed."""
    blocks: int = 4
    """Of the inputs; block-shuffle has as many of the outputs."""
    rank: int | None = None
    """Middle values of every layer, rounded down to a multiple of `blocks`, instead of by `ratio`."""
    project: Literal["frobenius", "whitened"] = "whitened"
    """Nearest in weights, which needs no data, or in what each block of inputs makes."""
    refits: int = 3
    """Of the second factor given the first; between two of them the first is refitted given the second."""
    scope: Scope = "ffn"
    premerge: Literal["never", "auto", "always"] = "auto"
    """never: factors; always: their product, a dense matrix as large as before; auto: factors, and where a target is known only
    where it is predicted to run them faster."""
    calibration: Order = "oneshot"
    ridge: float = 1e-4
    """Of the refits, relative to the mean of the diagonal."""
    shrink: float = 0.0
    """Share of the covariances between inputs that is not believed."""

    name = "block-structured"
    exact = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"ratio is the share that is removed, from 0 to less than 1; got {self.ratio:g}")
        if self.blocks < 2:
            raise RecipeError(f"blocks must be 2 or more, got {self.blocks}; one block is what low-rank makes")
        if self.rank is not None and self.rank < self.blocks:
            raise RecipeError(f"rank = {self.rank} leaves some of {self.blocks} blocks without any; it must be at least blocks")
        if self.refits < 0:
            raise RecipeError(f"refits must not be negative, got {self.refits}")
        if self.ridge <= 0:
            raise RecipeError(f"ridge must be above 0, got {self.ridge:g}")
        if not 0 <= self.shrink <= 1:
            raise RecipeError(f"shrink is a share, from 0 to 1; got {self.shrink:g}")
        if not self.requires and self.calibration != "oneshot":
            raise RecipeError(f"calibration = {self.calibration} changes nothing where neither a projection nor a refit reads data")

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # what the options need: nothing for a projection of weights alone
        return frozenset({"gram"}) if self.project == "whitened" or self.refits else frozenset()

    def requests(self, graph: Graph) -> list[Request]:
        inputs = dict.fromkeys(n.args[0] for n in linears_in(graph, self.scope) if graph.is_weight(n.args[1])) if self.requires else {}
        return [Request(x.name, self.requires) for x in inputs]  # type: ignore[union-attr]

    def run(self, graph: Graph, context: Context) -> Graph:
        if not self.ratio and self.rank is None:
            return graph
        linears = linears_in(graph, self.scope)
        source = context.moments_in_order(graph, self.calibration) if self.requires else None
        done: list[Blocks] = []
        slower: list[str] = []
        for i, node in enumerate(linears):
            context.progress(f"{self.kind} of {path_of(node)}", i, len(linears))
            why = context.ignored(node)
            if why == NOT_ASKED:
                continue
            blocks = self._blocks(node)
            why = why or why_not_stored(node) or (blocks if isinstance(blocks, str) else None)
            if not why and self.premerge == "auto" and context.target is not None and (why := _why_not_faster(graph, node, blocks, context.target)):  # type: ignore[arg-type]
                slower.append(f"{path_of(node)} ({why})")
            if why:
                context.decline(node, why)
                continue
            assert isinstance(blocks, Blocks)
            x = node.args[0]
            assert isinstance(x, fx.Node)
            context.apply(node)
            done.append(blocks)
            self._replace(graph, node, _Factors(blocks, self, None if source is None else source(x, x)))
        if (done or slower) and context.only is None:
            graph.notes.append(self._said(done, slower))
        return graph

    def _blocks(self, node: fx.Node) -> Blocks | str:
        """How a linear's matrix is cut, or why it isn't."""
        shape = node.args[1].meta["val"].shape  # type: ignore[union-attr]
        if len(shape) != 2:
            return f"its weight has {len(shape)} axes, a matrix has 2"
        outputs, inputs = map(int, shape)
        cut = self.blocks if self.kind == "block-shuffle" else 1
        if inputs < self.blocks or outputs < cut:
            return f"its matrix of {outputs} x {inputs} has fewer channels than the {self.blocks} blocks"
        dense = outputs * inputs
        thinnest = Blocks(inputs, outputs, self.blocks, cut, 1)
        q = self.rank // self.blocks if self.rank is not None else math.floor((1 - self.ratio) * dense / thinnest.parameters)
        if not q:
            return f"{1 - self.ratio:.0%} of its {dense:,} parameters are fewer than {self.blocks} blocks of rank 1 take ({thinnest.parameters:,})"
        found = Blocks(inputs, outputs, self.blocks, cut, q)
        if found.parameters >= dense:
            return f"{found.middle} middle values take {found.parameters:,} parameters, its matrix of {outputs} x {inputs} has {dense:,}"
        return found

    def _replace(self, graph: Graph, node: fx.Node, make: _Factors) -> None:
        x, w, b = node.args[0], node.args[1], argument(node, "bias")
        assert isinstance(w, fx.Node)
        stem = str(w.target)
        factors = {"merged": f"{stem}_merged"} if self.premerge == "always" else {"first": f"{stem}_first", "second": f"{stem}_second"}
        bias = {"bias": f"{path_of(node)}.block_bias" if b is None else f"{b.target}_refitted"}
        made = add_made(graph, make, [stem] if b is None else [stem, str(b.target)], factors | bias, node)
        operands = [made[key] for key in factors]
        op = torch.ops.aten.linear if self.premerge == "always" else ours.block_dense_linear if self.kind == "block-dense" else ours.block_shuffle_linear
        new = graph.insert(op.default, x, *operands, made.get("bias"), before=node)
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.fx.erase_node(node)

    def _said(self, done: list[Blocks], slower: list[str]) -> str:
        parts = []
        if done:
            dense, kept = sum(b.inputs * b.outputs for b in done), sum(b.parameters for b in done)
            saved, widths = f"{1 - kept / dense:.1%}", " to ".join(map(str, sorted({min(b.middle for b in done), max(b.middle for b in done)})))
            blocks = f"{self.blocks} blocks, {widths} middle values"
            merged_ones = f"{len(done)} layers merged to dense matrices, which saves nothing ({blocks}: {saved} of their parameters)"
            parts.append(merged_ones if self.premerge == "always" else f"{saved} of the parameters of {len(done)} layers removed: {blocks}")
        if slower:
            parts.append(f"{len(slower)} stay as they are, not predicted to be faster: {', '.join(slower)}")
        return f"{self.name}: {self.kind}, {'; '.join(parts)}"


@dataclass(frozen=True)
class _Factors:
    """What makes a layer's new weights: "first" and "second" factor, "merged", their product, and "bias", if it has one."""

    blocks: Blocks
    options: BlockStructured
    moments: Moments | None

    def __call__(self, w: Tensor, b: Tensor | None = None) -> dict[str, Tensor]:
        """w [outputs, inputs], b [outputs]"""
        cut = self.blocks
        if w.is_meta:
            second = (cut.outs, cut.s, cut.middle // cut.outs)
            found = {"first": w.new_empty(cut.ins, cut.q, cut.p), "second": w.new_empty(second), "merged": w.new_empty(w.shape)}
            bias = w.new_empty(cut.outputs) if self._has_bias(b) else None
        else:
            first, second, bias = self._factored(w, b)
            found = {"first": first, "second": second, "merged": merged(cut, first, second)}
        if self.options.kind == "block-dense":
            found["second"] = found["second"][0]
        if bias is not None:
            found["bias"] = bias
        return {key: t.to(w.dtype) for key, t in found.items()}

    def _factored(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        cut, options, zeros = self.blocks, self.options, torch.zeros(self.blocks.outputs, dtype=torch.float64)
        if self.moments is None:
            return *projected(cut, w), (zeros if b is None else b.double()) if self._has_bias(b) else None
        wanted, offset = self.moments.target(w, zeros if b is None else b, ridge=options.ridge)
        covariance = shrunk(self.moments.covariance(), options.shrink)
        first, second = projected(cut, wanted, covariance if options.project == "whitened" else None)
        for i in range(options.refits):
            if i:
                first = refitted_first(cut, wanted, first, second, covariance, options.ridge)
            second = refitted_second(cut, wanted, first, second, covariance, options.ridge)
        return first, second, offset + (wanted - merged(cut, first, second)) @ self.moments.mean

    def _has_bias(self, b: Tensor | None) -> bool:
        """A refitted layer has one; without, one of zeros says how many of padded outputs count."""
        padded = self.options.premerge != "always" and self.blocks.s * self.blocks.outs > self.blocks.outputs
        return b is not None or self.moments is not None or padded


def _why_not_faster(graph: Graph, node: fx.Node, blocks: Blocks, target: object) -> str | None:
    rows, dtype = rows_of(graph, node), node.meta["val"].dtype
    structured, dense = block_seconds(target, rows, blocks, dtype), dense_seconds(target, rows, blocks, dtype)
    if structured < dense:
        return None
    enough = threshold(target, blocks, dtype)
    when = "at no number of rows" if enough is None else f"from {enough} rows on"
    return f"{structured * 1e6:.1f} us in blocks against {dense * 1e6:.1f} us as it is at {rows} rows; faster {when}"
