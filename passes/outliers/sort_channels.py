"""Hidden channels in order of size: rows of what makes them and columns of what reads them permuted alike, so that neighbours share a scale well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks import AttentionBlock, FFNBlock, attention_blocks, ffn_blocks
from ...ir.blocks.axes import source_axis
from ...ir.blocks.channel_tracer import ChannelTracer
from ...ir.blocks.vocabulary import path_of
from ...ir.errors import UsageError, near
from ...ir.evaluate import is_size
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from ..statistics import Request
from .head_channels import is_number_scale, rows_of, value_heads, why_not_stored, why_read_elsewhere

aten, ours = torch.ops.aten, torch.ops.rewright

SITES = ("hidden", "values", "keys")


@dataclass(frozen=True)
class Site:
    """Groups of channels (all of a layer, or heads), each reordered by an order of its own. Places are int64 [groups, width].

    Weights may have more groups than there are orders: query heads share that of their key or value head.
    permuted: (call, position of the weight, its axis, places of the channels on it).
    value: whose calibrated |x| counts, channels: which of its channels.   makers, readers: whose weights are measured instead.
    tables: (call, position) of cosines and sines to be permuted too; channel i of a head then stays half a head before its partner.
    """

    node: fx.Node
    groups: int
    value: fx.Node
    channels: Tensor
    permuted: tuple[tuple[fx.Node, int, int, Tensor], ...]
    makers: tuple[tuple[fx.Node, Tensor], ...]
    readers: tuple[tuple[fx.Node, Tensor], ...]
    tables: tuple[tuple[fx.Node, int], ...] = ()


@dataclass(frozen=True)
class SortChannels(GraphPass):
    """Reorder channels that only two layers know of, the largest first, so that channels of one size stand side by side.

    Before:  y = linear(act(linear(x, W1, b1)), W2)      After:  y = linear(act(linear(x, W1[p], b1[p])), W2[:, p])
    Nothing is computed differently; but a group of channels that shares a scale (int4 groups along the input channels of W2, the halves
    of `group-ffn`, blocks of a quantized key cache) then holds channels alike.

    sites: "hidden" (feed-forward, plain and gated), "values" (inside every value head), "keys" (inside every key head: K-sort,
    arXiv 2403.20137; with RoPE, halves of a rotated pair move together and the tables of cosines move along).
    by: "absmax" (largest |x| over the calibration inputs: for ranges of activations), "norm" (row norms of the weights that make a
    channel: an estimate of the same without data, and what K-sort takes) or "weight" (largest |w| in the columns that read it, for
    int4 groups of those: on hidden channels a hundredfold apart it took a quarter off the error of the layer's output, while the other
    two may add to it where large channels meet small weights).
    Refuses hidden channels that something else reads, experts, constants that differ by channel in between, and keys with a norm of
    their own or whose cosines are computed (they are shared by all layers, and every layer has its own order).
    """

    sites: tuple[str, ...] = ("hidden", "values")
    by: Literal["absmax", "norm", "weight"] = "absmax"

    name = "sort-channels"
    exact = True  # the same products, added in another order: within fp tolerance

    def __post_init__(self) -> None:
        if strange := [s for s in self.sites if s not in SITES]:
            raise UsageError(f"no site named {strange[0]!r}.{near(strange[0], SITES)} There are {', '.join(SITES)}")
        if self.by not in ("absmax", "norm", "weight"):
            raise UsageError(f"channels can't be sorted by {self.by!r}; there are absmax, norm and weight")

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]  # weights tell their own size
        return frozenset({"absmax"} if self.by == "absmax" else ())

    def requests(self, graph: Graph) -> list[Request]:
        """The values whose channels can be reordered."""
        return [Request(site.value.name, self.requires) for site in self._sites(graph) if isinstance(site, Site)] if self.requires else []

    def run(self, graph: Graph, context: Context) -> Graph:
        for site in self._sites(graph):
            if not isinstance(site, Site):
                context.decline(*site)
                continue
            if self.by != "absmax" and graph.on_meta:
                context.decline(site.node, "its weights have no data to be measured; sort by absmax")
                continue
            order = _order(site, self._scores(graph, site, context))
            if bool((order == torch.arange(order.shape[1])).all()):
                context.decline(site.node, "its channels are in order already")
                continue
            context.apply(site.node)
            _permute(graph, site, order)
        return graph

    def _sites(self, graph: Graph) -> Iterable[Site | tuple[fx.Node, str]]:
        found: list[tuple[fx.Node, Site | str]] = []
        if "hidden" in self.sites:
            found += [(block.down, _hidden(graph, block)) for block in ffn_blocks(graph)]
        if "values" in self.sites or "keys" in self.sites:
            blocks = attention_blocks(graph)
            found += [(block.attention, _values(graph, block)) for block in blocks if "values" in self.sites]
            found += [(block.attention, _keys(graph, block)) for block in blocks if "keys" in self.sites]
        return [site if isinstance(site, Site) else (node, site) for node, site in found]

    def _scores(self, graph: Graph, site: Site, context: Context) -> Tensor:
        """[groups, width]: how large each channel is."""
        if self.by == "absmax":
            assert context.statistics is not None  # the pipeline gathers what is required
            return _per_group(context.statistics[site.value].absmax, site.channels, site.groups)
        total = torch.ones(site.groups, site.channels.shape[1], dtype=torch.float64)
        by_rows = self.by == "norm" or not site.readers
        for call, places in site.makers if by_rows else site.readers:
            w = graph.weight(call.args[1]).detach().double()  # type: ignore[arg-type]
            total = total * _per_group(w.norm(dim=1) if by_rows else w.abs().amax(0), places, site.groups)
        return total


def _per_group(sizes: Tensor, places: Tensor, groups: int) -> Tensor:
    """[groups, width]: the largest over the heads that share an order."""
    return sizes.double()[places].view(groups, -1, places.shape[1]).amax(1)


def _order(site: Site, scores: Tensor) -> Tensor:
    """int64 [groups, width]: which channel of a group comes first, second, ..."""
    if not site.tables:
        return scores.argsort(dim=1, descending=True, stable=True)
    half = scores.shape[1] // 2  # one order for all heads: they share the tables
    order = torch.maximum(scores[:, :half], scores[:, half:]).amax(0).argsort(descending=True, stable=True)
    return torch.cat([order, order + half]).expand(len(scores), -1)


def _permute(graph: Graph, site: Site, order: Tensor) -> None:
    for call, position, axis, places in site.permuted:
        old: Any = call.args[position]
        by_group = order.repeat_interleave(len(places) // len(order), 0)
        recipe = Permute(axis, places, places.gather(1, by_group))
        call.update_arg(position, graph.add_weight(f"{old.target}_sorted", recipe, str(old.target), like=call))
    made: dict[fx.Node, fx.Node] = {}
    first = min((call for call, _ in site.tables), default=site.node)
    for call, position in site.tables:
        old = call.args[position]
        if old not in made:
            made[old] = _permuted_table(graph, old, order[0], first)
        call.update_arg(position, made[old])


def _permuted_table(graph: Graph, value: fx.Node, order: Tensor, before: fx.Node) -> fx.Node:
    """A copy of what leads from a stored table to `value`, with the last axis of the table reordered."""
    if value.op == "get_attr":
        places = torch.arange(len(order))[None]
        return graph.add_weight(f"{value.target}_sorted", Permute(-1, places, order[None]), str(value.target), like=before)
    source: Any = value.args[0]
    return graph.insert(value.target, _permuted_table(graph, source, order, before), *value.args[1:], before=before, like=value, **value.kwargs)


@dataclass(frozen=True, eq=False)
class Permute:
    """w -> w with what stands at `sources` of one axis moved to `places`.  int64, any shape"""

    axis: int
    places: Tensor
    sources: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        index = torch.arange(w.shape[self.axis])
        index[self.places.flatten()] = self.sources.flatten()
        return w.index_select(self.axis, index.to(w.device))


# -- where channels may be reordered --------------------------------------------------------------------------------


def _hidden(graph: Graph, block: FFNBlock) -> Site | str:
    up, gate, down = block.up, block.gate, block.down
    makers = (up,) if gate is None or gate is up else (up, gate)
    if block.experts is not None:
        return "its hidden channels are those of several experts"
    if why := next(iter(block.why), None) or why_not_stored(graph, *makers, down):
        return why
    if vector := _vector_between(makers, down):
        return f"{vector.target} differs by channel between {path_of(up)} and {path_of(down)}"
    everything = torch.arange(block.hidden)[None]
    rows = [(up, block.up_rows), *([] if gate is None else [(gate, block.gate_rows)])]
    makers_rows = tuple((call, r[None]) for call, r in rows if r is not None)
    permuted = [*_rows(makers_rows), (down, 1, 1, everything)]
    return Site(down, 1, down.args[0], everything, tuple(permuted), makers_rows, ((down, everything),))  # type: ignore[arg-type]


def _vector_between(makers: Sequence[fx.Node], down: fx.Node) -> fx.Node | None:
    """A stored value of more than one element that is used on the way."""
    work = [n for n in down.all_input_nodes if n.op == "call_function"]
    for node in work:
        if node in makers or is_size(node):
            continue
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and operand.meta["val"].numel() > 1:
                return operand
            if operand not in work and operand.op == "call_function":
                work.append(operand)
    return None


def _rows(makers: Sequence[tuple[fx.Node, Tensor]]) -> list[tuple[fx.Node, int, int, Tensor]]:
    """The weights and biases of calls, by output channel; a fused projection once with all its groups."""
    found: list[tuple[fx.Node, int, int, Tensor]] = []
    for call, places in makers:
        found.append((call, 1, 0, places))
        if argument(call, "bias") is not None:
            found.append((call, 2, 0, places))
    return found


def _values(graph: Graph, block: AttentionBlock) -> Site | str:
    heads = value_heads(graph, block)
    if isinstance(heads, str):
        return heads
    v, out = (heads.v, heads.rows), (heads.out, heads.columns)
    permuted = (*_rows([v]), (heads.out, 1, 1, heads.columns))
    return Site(block.attention, len(heads.rows), heads.out.args[0], heads.columns, permuted, (v,), (out,))  # type: ignore[arg-type]


def _keys(graph: Graph, block: AttentionBlock) -> Site | str:
    tables: list[tuple[fx.Node, int]] = []
    made: list[tuple[fx.Node, Tensor]] = []
    for name, projection, position in (("q", block.to_q, 0), ("k", block.to_k, 1)):
        rows = rows_of(projection)
        if isinstance(rows, str):
            return f"{name} can't be reordered: {rows}"
        linear = projection.linears[0]
        if why := why_not_stored(graph, linear):
            return why
        for step in ChannelTracer(graph, linear).trace(block.attention.args[position]).steps:  # type: ignore[arg-type]
            if step.node.target is ours.rope.default and step.channels == block.head_dim:
                tables += [(step.node, 1), (step.node, 2)]
            elif step.kind.startswith("rope"):
                return f"the rotation of {name} is not one op over whole heads, half against half"
            elif not is_number_scale(graph, step):
                return f"{path_of(step.node)} stands between {path_of(linear)} and the attention ({step.kind})"
        if why := why_read_elsewhere(graph, linear, rows, block.attention, position):
            return why
        made.append((linear, rows))
    for call, position in tables:
        if why := _why_not_table(call.args[position]):
            return why
    k, rows = made[1]
    return Site(block.attention, len(rows), k, rows, tuple(_rows(made)), (made[1],), (), tuple(tables))


def _why_not_table(value: Any) -> str | None:
    """Why cosines or sines can't be reordered."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        last = value.meta["val"].dim() - 1
        source: Any = value.args[0]
        if not isinstance(source, fx.Node) or source_axis(value, last) != source.meta["val"].dim() - 1:
            return f"its cosines and sines are computed ({value.name}) and shared by all layers; they would have to be stored as tables"
        value = source
    return None if isinstance(value, fx.Node) and value.op == "get_attr" else "its cosines and sines are inputs"
