"""What ffn-width does to the blocks it found: their moments, the widths they get, the channels that stay, the new weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import path_of
from ...ir.graph import Graph
from ...ir.nodes import argument, set_argument
from ..linear_algebra import shrunk
from ..rewrite import Context
from ..statistics import Moments
from .allocation import Layer, allocate
from .channel_mask import read_mask
from .channel_selection import LARGEST, Selection, eliminate, energy, errors_without_refit, leverage, refitted
from .expert_moments import ExpertSource
from .hidden_channels import HiddenChannels, Take, weight_name

if TYPE_CHECKING:
    from .ffn_width import FFNWidth

TOKENS = 5
"""An expert that saw fewer tokens than this times its hidden channels is not refitted to them."""
SLACK = 1e-9
"""Added to every error curve, times the square of the share that goes: where channels cost nothing, as many stay as the budget
has room for, for inputs that calibration has not seen."""
Choice = int | Tensor | str
"""How many hidden channels stay, which (int64 [kept] or [experts, kept]), or why the block stays as it is."""


@dataclass(frozen=True)
class Part:
    """The hidden channels h of a block, or of one expert of it: what is to give w h + b.   w: float64 [m, hidden], b: float64 [m].
    moments: of h; None: nothing is known.   tokens: an expert's; None: enough.   shrink: of the second moments' off-diagonal."""

    w: Tensor
    b: Tensor
    moments: Moments | None = None
    tokens: int | None = None
    shrink: float = 0.0

    @property
    def scarce(self) -> bool:
        """Whether it has too few tokens to be refitted to."""
        return self.tokens is not None and self.tokens < TOKENS * self.w.shape[1]

    def second(self, affine: bool) -> Tensor:
        """[hidden, hidden]: what the error of the output is measured by, centred where a bias takes up the mean."""
        assert self.moments is not None
        found = self.moments.covariance() if affine else self.moments.gram
        return shrunk(found, self.shrink)


class Narrowing:
    """One run of the pass over the blocks of a graph, in order; made before the first edit."""

    def __init__(self, options: FFNWidth, graph: Graph, context: Context, sites: Sequence[HiddenChannels]) -> None:
        self.options, self.graph, self.context, self.sites = options, graph, context, sites
        self.remarks: list[str] = []
        self._selections: dict[HiddenChannels, list[Selection]] = {}
        if options.needs_data:
            self._source = context.moments_in_order(graph, options.calibration)
            downs = [site.block.down for site in sites if site.block.experts is not None]
            if downs and context.calibration is not None:
                self._experts = ExpertSource(graph, context.calibration, downs, live=options.calibration != "oneshot")

    # -- how many, and which ------------------------------------------------------------------------------------------

    def masked(self) -> list[Choice]:
        """What the mask says of each block."""
        layers = [((site.block.layer, str(site.block.down.args[1].target)), site.block.hidden, site.block.experts) for site in self.sites]  # type: ignore[union-attr]
        found = read_mask(self.options.mask, layers)
        return [
            "the mask says nothing of it" if index is None else "the mask keeps all its hidden channels" if index.shape[-1] == site.block.hidden else index
            for site, index in zip(self.sites, found)
        ]

    def allocated(self) -> list[Choice]:
        """How many channels of each block the budget has room for."""
        options = self.options
        method = options.allocation if options.needs_data and len(self.sites) > 1 else "uniform"
        layers = [self._layer(site, method) for site in self.sites]
        step = max(1, min(options.round_to, min(site.block.hidden for site in self.sites) // 8))
        kept = allocate(layers, 1 - options.ratio, method, options.floor, step)
        return ["the budget leaves it as it is" if k is None else k for k in kept]

    def _layer(self, site: HiddenChannels, method: str) -> Layer:
        errors, influence = torch.linspace(1, 0, site.block.hidden + 1, dtype=torch.float64), None
        if method.startswith("waterfill"):
            parts = self._parts(site, dense=True)
            found = self._rank(site, parts, 0, curves=True)
            errors = self._joint(parts, found) + SLACK * errors.square()
            if self.options.calibration == "oneshot" and self.context.moments is None:
                self._selections[site] = found
        if (terms := site.block.residual_terms) is not None and self.context.statistics is not None:
            _, branch, total = terms
            if method == "waterfill":
                errors = errors * min(1.0, self._variance(branch) / self._variance(total))
            elif method.endswith("influence"):
                influence = self.context.statistics[total].influence
        return Layer(errors, site.unit, site.unit * site.block.hidden, influence=influence)

    def _variance(self, value: fx.Node) -> float:
        """Of all channels of a value together."""
        assert self.context.statistics is not None
        seen = self.context.statistics[value]
        return max(float((seen.mean_square - seen.mean.square()).sum()), torch.finfo(torch.float64).tiny)

    def _joint(self, parts: Sequence[Part], selections: Sequence[Selection]) -> Tensor:
        """The errors of a block; experts count by what they give over all tokens."""
        if len(parts) == 1:
            return selections[0].errors
        weights = [0.0 if p.moments is None else float(((p.w @ p.moments.gram) * p.w).sum()) * (p.tokens or 0) for p in parts]
        total = sum(weights) or 1.0
        return torch.stack([s.errors * (x / total) for s, x in zip(selections, weights)]).sum(0)

    def _parts(self, site: HiddenChannels, dense: bool = False) -> list[Part]:
        """What the block's hidden channels are to give. dense: in the original program, for allocation."""
        options, down = self.options, site.block.down
        affine = options.refit == "affine"
        w = self.context.weight(self.graph, down.args[1]).double()
        if site.block.experts is not None:
            nothing = w.new_zeros(w.shape[2])
            if not options.needs_data:
                return [Part(m.T, nothing) for m in w]
            found = self._experts(down)
            zero = w.new_zeros(w.shape[1])
            moments = [Moments(gram, zero) if int(n) else None for gram, n in zip(found.gram, found.tokens)]
            return [Part(m.T, nothing, seen, int(n), options.shrink) for m, seen, n in zip(w, moments, found.tokens)]
        bias = argument(down, "bias")
        b = w.new_zeros(len(w)) if bias is None else self.context.weight(self.graph, bias).double()
        if not options.needs_data:
            return [Part(w, b)]
        if dense:
            assert self.context.statistics is not None
            known = self.context.statistics[site.value]
            moments = Moments(known.gram, known.mean)
        else:
            moments = self._source(site.value, site.start)
        if options.refit != "none":
            w, b = moments.target(w, b, affine, options.ridge)
        return [Part(w, b, moments, shrink=options.shrink)]

    def _rank(self, site: HiddenChannels, parts: Sequence[Part], least: int, curves: bool = False) -> list[Selection]:
        """The order in which each part's channels go; `least` of them need none. curves: whether errors are asked for."""
        name = site.block.down.name
        generator = torch.Generator().manual_seed(self.context.seed * 1_000_003 + zlib.crc32(name.encode()))
        return [self._rank_part(site, i, part, least, curves, generator) for i, part in enumerate(parts)]

    def _rank_part(self, site: HiddenChannels, i: int, part: Part, least: int, curves: bool, generator: torch.Generator) -> Selection:
        options, count = self.options, site.block.hidden
        straight = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        batch = max(1, min(options.batch, count // 8))
        affine, refit = options.refit == "affine" and part.tokens is None, options.refit != "none" and not part.scarce
        if options.selection == "random":
            order = torch.randperm(count, generator=generator)
        elif options.selection == "prefix":
            order = torch.arange(count - 1, -1, -1)
        elif part.moments is None:
            order = self._norms(site, i, part).argsort(stable=True)
        elif options.selection == "obs" and count <= LARGEST and not part.scarce:
            found = eliminate(part.w, part.second(affine), options.ridge, batch, least=least)
            if refit or not curves:
                return found
            order = found.order
        elif options.selection == "leverage" and not part.scarce:
            order = leverage(part.second(affine), options.ridge).argsort(stable=True)
        else:
            order = energy(part.w, part.second(affine)).argsort(stable=True)
        if not curves or part.moments is None:
            return Selection(order, straight)
        if refit and count <= LARGEST:
            return eliminate(part.w, part.second(affine), options.ridge, batch, order)
        return Selection(order, errors_without_refit(part.w, part.second(affine), order))

    def _norms(self, site: HiddenChannels, expert: int, part: Part) -> Tensor:
        """[hidden]: products of squared norms of each channel's weights, for an expert that saw no token."""
        found = part.w.square().sum(0)
        for stored in site.stored:
            if (held := argument(stored.call, stored.name)) in site.matrices:
                w = self.context.weight(self.graph, held)[expert].double()
                for rows in stored.rows:
                    found = found * w[:, rows].square().sum(0)
        return found

    # -- the edit -------------------------------------------------------------------------------------------------------

    def narrow(self, site: HiddenChannels, choice: int | Tensor) -> None:
        """Rewrite one block."""
        down, options = site.block.down, self.options
        blind = not options.needs_data and options.selection in ("random", "prefix", "mask")
        parts = [] if blind else self._parts(site)
        if isinstance(choice, Tensor):
            index = choice
        elif blind:
            whole = Part(torch.empty(0, site.block.hidden), torch.empty(0))
            chosen = self._rank(site, [whole] * (site.block.experts or 1), choice)
            index = self._stacked(site, [s.kept(choice) for s in chosen])
        else:
            chosen = self._selections.pop(site, None) or self._rank(site, parts, choice)
            index = self._stacked(site, [s.kept(choice) for s in chosen])
        if options.refit != "none":
            self._refit(site, parts, index)
        else:
            old: Any = down.args[1]
            set_argument(down, weight_name(down), self.graph.add_weight(f"{old.target}_kept", Take(1, index), str(old.target), like=down))
        site.keep(self.graph, index)
        self.graph.infer(down)
        self._remark(site, parts)

    def _stacked(self, site: HiddenChannels, kept: list[Tensor]) -> Tensor:
        return kept[0] if site.block.experts is None else torch.stack(kept)

    def _refit(self, site: HiddenChannels, parts: Sequence[Part], index: Tensor) -> None:
        """New weights of the down projection, and a new bias where there may be one."""
        down, options = site.block.down, self.options
        affine = options.refit == "affine" and site.block.experts is None
        made = []
        for part, kept in zip(parts, [index] if index.dim() == 1 else index):
            if part.scarce or part.moments is None:
                made.append(part.w[:, kept])
            else:
                made.append(refitted(part.w, part.second(affine), kept, options.ridge))
        old: Any = down.args[1]
        new = made[0] if site.block.experts is None else torch.stack([m.T for m in made])
        dtype = old.meta["val"].dtype
        set_argument(down, weight_name(down), self._constant(f"{old.target}_refit", new, dtype, down))
        if affine:
            (part,), bias = parts, argument(down, "bias")
            assert part.moments is not None
            b = part.b + part.w @ part.moments.mean - made[0] @ part.moments.mean[index]
            name = str(bias.target) if bias is not None else f"{str(old.target).removesuffix('.weight')}.bias"
            set_argument(down, "bias", self._constant(f"{name}_refit", b, dtype if bias is None else bias.meta["val"].dtype, down))

    def _constant(self, name: str, value: Tensor, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        return self.graph.add_constant(name, value.to(dtype).contiguous(), like=like)

    def _remark(self, site: HiddenChannels, parts: Sequence[Part]) -> None:
        path, hidden = path_of(site.block.down), site.block.hidden
        if self.options.selection == "obs" and hidden > LARGEST:
            self.remarks.append(f"ffn-width: {path} has {hidden} hidden channels, over {LARGEST}: chosen by energy, not obs")
        if scarce := [part.tokens or 0 for part in parts if part.scarce]:
            self.remarks.append(
                f"ffn-width: {len(scarce)} of {len(parts)} experts of {path} saw fewer than {TOKENS} x {hidden} tokens (the fewest {min(scarce)}): "
                "chosen by energy, or weight norms where there was none, and not refitted"
            )
