"""linear(x, w, b) -> linear(linear(x, first), second, b'): a matrix as a product of two of small rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx

from ...ir.blocks import ffn_blocks
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import RecipeError
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..made import add_made
from ..rewrite import NOT_ASKED, Context, GraphPass
from ..scope import Scope, linears_in, why_not_stored
from ..statistics import Moments, Order, Request
from .allocation import Method, allocate
from .low_rank_factors import Data, Factors, joint_is_better
from .low_rank_scores import Score, Scores, Side
from .predicted import product_seconds, rows_of
from .shared_input import insert_joint, insert_packed, shared_name

aten = torch.ops.aten

Gauge = Literal["ortho", "balanced"]
Shared = Literal["separate", "packed", "joint"]
_LITERALS = {"scope": Scope, "score": Score, "side": Side, "gauge": Gauge, "shared": Shared, "allocation": Method, "calibration": Order}


@dataclass(frozen=True)
class LowRank(GraphPass):
    """Replace matrices by products of two of smaller rank, the best there are by `score`.

    Before:  y = linear(x, w, b)      After:  y = linear(linear(x, first), second, b')      first [rank, n], second [m, rank]
    score: what an error costs. "plain": itself (SVD); "asvd": by the root of the mean |x| of its column (ASVD); "whitened": in the
    outputs, on calibration data (the optimum of DRONE, SVD-LLM and Swift-SVD, without their Cholesky factor: specs/structured_ffn.md 2);
    "fisher": by the mean squared gradient of its row, of its column or of both (FWSVD); "two-sided": in the loss, by the Grams of
    inputs and of output gradients (K-FAC; 3.2). The last two take gradients of calibration.loss, or of the model's own likelihood.
    affine: a bias (a layer without gets one) takes up the mean, and the score is about it: whitened + affine is AFM and Unified-CTR,
    whitened without is LoRD. Needs data, whatever the score.
    Linears that read the same value (q, k, v; gate, up): "packed" computes their first products as one (exact), "joint" gives them one
    first factor in common where that has less error at equal parameters, and packs them where it hasn't.
    Declines tied and computed weights, layers whose factors would take as many parameters as the matrix, and, where a target is known and
    require_faster is set, those it is not predicted to run faster. scope="all" takes the head too, if it is not tied: `ignore` it.
    Weights that are streamed: allocations other than uniform read them (calibration.weights).
    Lossy: README's table of smaller feed-forward layers.
    """

    ratio: float = 0.3
    """Share of the layers' weights that is removed."""
    rank: int | None = None
    """Of every layer, instead of by `ratio`."""
    scope: Scope = "ffn"
    score: Score = "whitened"
    side: Side = "out"
    """Of score="fisher": the rows' gradients (outputs), the columns' (inputs), or both."""
    gauge: Gauge = "ortho"
    """ortho: what is between the factors is no larger than the output, and a smaller rank is a slice of a larger one; balanced:
    matching rows and columns have equal norms, for factors that are quantized."""
    affine: bool = True
    shared: Shared = "packed"
    refit: bool = False
    """Fit the second factor to the first on calibration data: for scores that look at less."""
    allocation: Method = "uniform"
    """By errors relative to each layer's output; with scores that know the loss (fisher, two-sided), by its estimated change."""
    calibration: Order = "oneshot"
    round_to: int = 16
    """Ranks are multiples of it, or of an eighth of the smallest matrix's where that is less."""
    floor: float = 0.5
    """No layer keeps less than this share of what uniform would give it."""
    shrink: float = 0.0
    """Share of the covariances between inputs that is not believed, against overfitting few tokens."""
    ridge: float = 1e-4
    """Of the refit and of asymmetric calibration, relative to the mean of the diagonal."""
    require_faster: bool = True

    name = "low-rank"
    exact = False

    def __post_init__(self) -> None:
        for option, literal in _LITERALS.items():
            if getattr(self, option) not in (known := get_args(literal)):
                raise RecipeError(f"low-rank has no {option} {getattr(self, option)!r}; there are {', '.join(known)}")
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"ratio is the share that is removed, from 0 to less than 1; got {self.ratio:g}")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank must be at least 1, got {self.rank}")
        for option in ("floor", "shrink"):
            if not 0 <= getattr(self, option) <= 1:
                raise RecipeError(f"{option} is a share, from 0 to 1; got {getattr(self, option):g}")
        if self.round_to < 1:
            raise RecipeError(f"round_to must be at least 1, got {self.round_to}")
        if self.ridge <= 0:
            raise RecipeError(f"ridge must be above 0, moments of few tokens are singular; got {self.ridge:g}")
        if self.side != "out" and self.score != "fisher":
            raise RecipeError(f"side = {self.side} is for score = fisher; the score is {self.score}")
        if self.shared == "joint" and self.score == "fisher" and self.side != "out":
            raise RecipeError(f"a joint basis needs one weighting of the inputs, and side = {self.side} has one for each matrix; use shared = packed")

    # -- statistics ------------------------------------------------------------------------------------------------

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of the inputs are needed."""
        return self.score in ("whitened", "two-sided") or self.affine or self.refit or self.calibration != "oneshot"

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # what the options need: nothing for the plain SVD
        kinds = {"asvd": {"mean_abs"}, "fisher": {"gradient"}, "two-sided": {"gradient_gram"}}.get(self.score, set())
        return frozenset(kinds | ({"gram"} if self.needs_moments else set()) | ({"influence"} if self._by_influence else set()))

    @property
    def _by_influence(self) -> bool:
        return self.rank is None and self.allocation.endswith("influence")

    def requests(self, graph: Graph) -> list[Request]:
        found = []
        for node in linears_in(graph, self.scope) if self.requires else ():
            if why_not_stored(node):
                continue
            if of_input := self.requires & {"gram", "mean_abs"}:
                found.append(Request(node.args[0].name, of_input))  # type: ignore[union-attr]
            if self.score == "fisher":
                found.append(Request(node.args[1].name, frozenset({"gradient"})))  # type: ignore[union-attr]
            if self.score == "two-sided":
                found.append(Request(node.name, frozenset({"gradient_gram"})))
        if self._by_influence:
            terms = [t for block in ffn_blocks(graph) if (t := block.residual_terms) is not None]
            found += [Request(total.name, frozenset({"influence"}), block_input=start.name) for start, _, total in terms]
        return found

    # -- the rewrite ------------------------------------------------------------------------------------------------

    def run(self, graph: Graph, context: Context) -> Graph:
        if not self.ratio and self.rank is None:
            return graph
        linears = self._asked(graph, context)
        if not linears:
            return graph
        scores = Scores(self, graph, context)
        ranks = self._ranks(graph, linears, scores, context)
        source = context.moments_in_order(graph, self.calibration) if self.needs_moments else None
        kept: dict[fx.Node, tuple[int, int]] = {}
        for i, group in enumerate(groups := self._groups(ranks)):
            context.progress(f"{self.name}: {path_of(group[0])}", i, len(groups))
            x: Any = group[0].args[0]
            kept |= zip(group, self._rewrite(graph, scores, group, [ranks[n] for n in group], None if source is None else source(x, x)))
            for node in group:
                context.apply(node)
        if context.only is None:
            graph.notes.append(self._said(linears, kept))
        return graph

    def _asked(self, graph: Graph, context: Context) -> dict[fx.Node, tuple[int, int]]:
        """The linears that can be factorised, with outputs and inputs; the rest of the scope is declined."""
        found = {}
        for node in linears_in(graph, self.scope):
            why = context.ignored(node)
            if why == NOT_ASKED:
                continue
            if why := why or why_not_stored(node):
                context.decline(node, why)
            else:
                found[node] = _shape(node)
        return found

    def _ranks(self, graph: Graph, linears: dict[fx.Node, tuple[int, int]], scores: Scores, context: Context) -> dict[fx.Node, int]:
        """The rank of each linear that is to be factorised; the others are declined, they stay as they are."""
        if self.rank is not None:
            wanted: list[int | None] = [self.rank] * len(linears)
        else:
            step = max(1, min(self.round_to, min(min(shape) for shape in linears.values()) // 8))
            method = self.allocation if len(linears) > 1 else "uniform"
            wanted = allocate(scores.layers(linears, method), 1 - self.ratio, method, self.floor, step)
        found = {}
        for (node, (m, n)), rank in zip(linears.items(), wanted):
            if why := _why_not_smaller(m, n, rank) or self._why_not_faster(graph, node, m, n, rank, context.target):
                context.decline(node, why)
            else:
                assert rank is not None
                found[node] = rank
        return found

    def _why_not_faster(self, graph: Graph, node: fx.Node, m: int, n: int, rank: int | None, target: Any) -> str | None:
        if target is None or not self.require_faster or rank is None:
            return None
        rows, dtype = rows_of(graph, node), node.meta["val"].dtype
        factorised, dense = (product_seconds(target, rows, products, dtype) * 1e6 for products in ([(n, rank), (rank, m)], [(n, m)]))
        if factorised < dense:
            return None
        return f"predicted {factorised:.1f} us factorised at rank {rank} against {dense:.1f} us dense for {rows} rows on {target.name}"

    def _groups(self, ranks: dict[fx.Node, int]) -> list[list[fx.Node]]:
        """Linears that read the same value, in graph order of the first of them; each its own where they stay separate."""
        groups: dict[Any, list[fx.Node]] = {}
        for node in ranks:
            key = node if self.shared == "separate" else (node.args[0], node.args[1].meta["val"].dtype)  # type: ignore[union-attr]
            groups.setdefault(key, []).append(node)
        return list(groups.values())

    def _rewrite(self, graph: Graph, scores: Scores, group: Sequence[fx.Node], ranks: list[int], moments: Moments | None) -> list[tuple[int, int]]:
        """Factorise linears that read the same value. Returns each one's rank and weights now."""
        shapes = [_shape(node) for node in group]
        apart = scores.of(group, moments)
        if self.shared == "joint" and len(group) > 1:
            data = Data(moments, apart[0].inputs, tuple(d.outputs[0] for d in apart))
            m, n = sum(shape[0] for shape in shapes), shapes[0][1]
            rank = sum(k * sum(shape) for k, shape in zip(ranks, shapes)) // (m + n)
            if joint_is_better([scores.target(node, moments) for node in group], data, ranks, rank):
                insert_joint(graph, group, self._made(graph, group, rank, data))
                return [(rank, rank * (shape[0] + (n if i == 0 else 0))) for i, shape in enumerate(shapes)]
        insert_packed(graph, group, [self._made(graph, [node], k, data) for node, k, data in zip(group, ranks, apart)])
        return [(k, k * sum(shape)) for k, shape in zip(ranks, shapes)]

    def _made(self, graph: Graph, group: Sequence[fx.Node], rank: int, data: Data) -> dict[str, fx.Node]:
        """New weights for linears with one first factor: "first", "second0", "bias0", ..."""
        weights, biases = [node.args[1] for node in group], [argument(node, "bias") for node in group]
        names = {"first": f"{weights[0].target}_first" if len(group) == 1 else shared_name(group)}  # type: ignore[union-attr]
        for i, (w, b) in enumerate(zip(weights, biases)):
            names[f"second{i}"] = f"{w.target}_second"  # type: ignore[union-attr]
            if self.affine:
                names[f"bias{i}"] = f"{path_of(group[i])}.low_rank_bias" if b is None else f"{b.target}_low_rank"
        make = Factors(rank, data, tuple(b is not None for b in biases), self.affine, self.gauge == "balanced", self.ridge, self.shrink, self.refit)
        sources = [str(s.target) for s in (*weights, *biases) if s is not None]  # type: ignore[union-attr]
        found = add_made(graph, make, sources, names, group[0])
        return found | {f"bias{i}": b for i, b in enumerate(biases) if b is not None and not self.affine}

    def _said(self, linears: dict[fx.Node, tuple[int, int]], kept: dict[fx.Node, tuple[int, int]]) -> str:
        dense = sum(m * n for m, n in linears.values())
        left = sum(kept[node][1] if node in kept else m * n for node, (m, n) in linears.items())
        each = ", ".join(f"{path_of(node)} " + (f"{kept[node][0]} of {min(shape)}" if node in kept else "dense") for node, shape in linears.items())
        return f"{self.name}: {1 - left / dense:.1%} less weights in {len(linears)} linears, {len(kept)} of them factorised; ranks: {each}"


def _why_not_smaller(m: int, n: int, rank: int | None) -> str | None:
    if rank is not None and rank * (m + n) < m * n:
        return None
    even = m * n // (m + n)
    if rank is None:
        return f"it keeps so much that its matrix of {m} x {n} is no larger than two factors (they break even at rank {even})"
    return f"two factors of rank {rank} take {rank * (m + n):,} parameters, its matrix of {m} x {n} {m * n:,}"


def _shape(node: fx.Node) -> tuple[int, int]:
    m, n = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    return int(m), int(n)
