"""The prompt of a vision-language model in a prefill graph: its layers, where its image tokens are, and the sweep that lets them go."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ir.blocks import AttentionBlock, attention_blocks
from ...ir.blocks.residual import Streams
from ...ir.blocks.vocabulary import CONVOLUTIONS, FUSED_NORMS, LAST_AXIS_NORMS, past_casts, path_of
from ...ir.graph import Graph
from ...ir.nodes import argument, set_argument
from .fewer_tokens import Cut, Sweep
from .following import Refused, Rows, Tokens, made_of, static_count

aten = torch.ops.aten
ours = torch.ops.rewright


@dataclass(frozen=True)
class Image:
    """Which tokens are the image's: `count` from `start` on, or those of `mask` (bool [B, tokens], as many in each sample)."""

    count: int
    start: int | None = None
    mask: fx.Node | None = None


@dataclass(frozen=True)
class Prompt:
    """layers: attention of each layer of the language model.   values: the residual stream in front of each layer, [B, tokens, C]."""

    layers: tuple[AttentionBlock, ...]
    values: tuple[fx.Node, ...]
    image: Image
    tokens: int


@dataclass(frozen=True)
class PromptTokens(Tokens):
    """The tokens left of a prompt. The last `suffix` are never touched."""

    suffix: int = 0
    image: Image = Image(0)
    positions: fx.Node | None = None
    """int64 [B, count]: rows of tables of positions; None: as `numbers` says."""


class PromptSweep(Sweep):
    """Fewer tokens of a prompt: its last ones stay, keys and values may be outputs with fewer rows, positions may count anew."""

    def __init__(self, graph: Graph, cuts: dict[fx.Node, Cut], layers: Collection[AttentionBlock]) -> None:
        super().__init__(graph, cuts)
        self.caches = {argument(block.attention, side) for block in layers for side in ("k", "v")}
        self.places: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        """Of image tokens and of others, by the mask that tells them."""
        self.shorter: list[int] = []
        """The outputs that have fewer rows: keys and values of layers behind a cut."""

    def again(
        self, chain: Sequence[fx.Node], copies: Mapping[fx.Node, fx.Node], left: Rows | None, before: fx.Node, without: Collection[fx.Node] = ()
    ) -> dict[fx.Node, fx.Node]:
        """Calls made once more on other values, new ones by old ones; on fewer tokens, if `left` says which the first values hold.

        without: calls that are left out, their first operand in their place.
        """
        made = dict(copies)
        if left is not None:
            self.rows.update(dict.fromkeys(copies.values(), left))
        for node in chain:
            if node in without:
                made[node] = made[node.args[0]]  # type: ignore[index]
                continue
            with self.graph.fx.inserting_before(before):
                made[node] = self.graph.fx.node_copy(node, lambda n: made.get(n, n))
            if left is None:
                self.graph.infer(made[node])
            else:
                self._adapt(made[node])
        return made

    def _rule(self, node: fx.Node) -> Rows | bool | None:
        return True if self._takes_the_end(node) else super()._rule(node)

    def _takes_the_end(self, node: fx.Node) -> bool:
        """Whether a node reads none but tokens of the suffix; it then counts them from the end."""
        if node.target not in (aten.slice.Tensor, aten.select.int):
            return False
        first: Any = node.args[0]
        rows = self.rows.get(first)
        if rows is None or not isinstance(rows.tokens, PromptTokens) or argument(node, "dim") % first.meta["val"].dim() != rows.axis:
            return False
        name = "index" if node.target is aten.select.int else "start"
        begin = argument(node, name)
        begin = begin if not isinstance(begin, int) or begin < 0 else begin - rows.before
        whole = name == "index" or (argument(node, "step") == 1 and (argument(node, "end") is None or argument(node, "end") >= rows.before))
        if not isinstance(begin, int) or not -rows.tokens.suffix <= begin < 0 or not whole:
            return False
        set_argument(node, name, begin)
        return True

    def follow(self, node: fx.Node, table: fx.Node, rows: Rows, dims: int) -> fx.Node:
        tokens = rows.tokens
        if isinstance(tokens, PromptTokens) and tokens.positions is not None:
            rows = replace(rows, tokens=replace(tokens, numbers=tokens.positions, positions=None))
        return super().follow(node, table, rows, dims)

    def _output(self, node: fx.Node) -> None:
        outputs: Any = node.args[0]
        for i, value in enumerate(outputs):
            if value not in self.rows:
                continue
            if value not in self.caches:
                raise Refused(
                    value, f"output {i} ({path_of(value)}) has a row for every token, and some are dropped; capture the last token's (logits_to_keep=1)"
                )
            self.shorter.append(i)


def find_prompt(graph: Graph, span: tuple[int, int] | None) -> Prompt | tuple[fx.Node, str]:
    """The prompt of a prefill graph, or a node and why it is none. span: (first image token, how many), where the graph doesn't tell."""
    if fused := graph.find(*FUSED_NORMS):
        return fused[0], "sums are fused with norms here: prune before fuse-add-rms-norm and fuse-add-layer-norm"
    streams = Streams(graph)
    blocks = [b for b in attention_blocks(graph, streams) if b.kind == "self" and b.q is not None]
    read = {b.attention: _stream_value(b) for b in blocks}
    of = {b.attention: streams.of(read[b.attention]) for b in blocks}
    causal = Counter(id(of[b.attention]) for b in blocks if b.causal and of[b.attention] is not None)
    if not causal:
        why = next((w for b in blocks if b.causal for w in b.why), "no attention here is proven causal: this is no prefill graph of a language model")
        return (blocks[-1].attention if blocks else graph.output), why
    (stream, _) = causal.most_common(1)[0]
    layers = [b for b in blocks if id(of[b.attention]) == stream]
    if (other := next((b for b in layers if not b.causal), None)) is not None:
        return other.attention, f"{path_of(other.attention)} is not causal as the other layers are: its tokens see later ones"
    values = tuple(read[b.attention] for b in layers)
    tokens = static_count(values[0])
    if tokens is None:
        return values[0], "the number of tokens is dynamic; capture with prompts of one length (only the batch dynamic)"
    image = _of_span(span, tokens) if span is not None else _image(graph, values[0], tokens)
    if isinstance(image, str):
        return values[0], image
    return Prompt(tuple(layers), values, image, tokens)


def _stream_value(block: AttentionBlock) -> fx.Node:
    """What a layer's attention reads, before its norm."""
    assert block.q is not None
    value = past_casts(block.q.args[0])
    return value.args[0] if value.target in LAST_AXIS_NORMS else value


def _of_span(span: tuple[int, int], tokens: int) -> Image | str:
    start, count = span
    if start < 0 or count < 1 or start + count >= tokens:
        return f"image_span = ({start}, {count}) is no part of {tokens} tokens with text behind it, the last of which asks for the image"
    return Image(count, start)


def _image(graph: Graph, value: fx.Node, tokens: int) -> Image | str:
    """Where image features join the embedded text: concatenated with it, or scattered to its image tokens."""
    say = "give image_span=(first image token, how many)"
    joined = past_casts(value)
    if joined.target is aten.cat.default and argument(joined, "dim") % 3 == 1:
        parts: Any = joined.args[0]
        images = [i for i, part in enumerate(parts) if _sees(part)]
        counts = [static_count(part) for part in parts]
        if len(images) == 1 and None not in counts:
            (i,) = images
            return _of_span((sum(counts[:i]), counts[i]), tokens)  # type: ignore[arg-type]
        return f"{len(images)} of the {len(parts)} parts of the prompt are made from images; {say}"
    if joined.target is aten.masked_scatter.default:
        mask, features = _tokens_of(joined.args[1]), joined.args[2].meta["val"].shape  # type: ignore[union-attr]
        batch, rows = value.meta["val"].shape[0], 1
        for s in features[:-1]:
            rows = rows * s
        count = graph.size(rows) // graph.size(batch)
        if mask.meta["val"].dim() == 2 and count * batch == rows and 0 < count < tokens:
            return Image(count, None, mask)
        return f"{graph.size(rows)} image features for a batch of {graph.size(batch)} are not as many for each prompt; {say}"
    return f"{joined.name}, what the first layer reads, joins no image features with text; {say}"


def _sees(value: fx.Node) -> bool:
    """Whether a value is made from an image: by a convolution, or given as floats where the text is embedded."""
    return any(n.target in CONVOLUTIONS or (n.op == "placeholder" and n.meta["val"].is_floating_point()) for n in made_of(value))


def _tokens_of(mask: Any) -> fx.Node:
    """A mask of tokens behind the axis of channels it is spread over."""
    while mask.target in (aten.unsqueeze.default, aten.expand.default) and mask.args[0].meta["val"].dim() >= 2:
        mask = mask.args[0]
    return mask


# -- in a cut ---------------------------------------------------------------------------------------------------------


def tokens_at(sweep: PromptSweep, value: fx.Node, known: Rows | None, image: Image, before: fx.Node) -> PromptTokens:
    """The tokens of a value in front of a cut: those the last one left, or all."""
    if known is not None:
        assert isinstance(known.tokens, PromptTokens)
        return known.tokens
    count = int(value.meta["val"].shape[1])
    prefix, suffix = (0, 1) if image.start is None else (image.start, count - image.start - image.count)
    return PromptTokens(count, count, prefix, counted(sweep, value, range(count), before), None, None, suffix=suffix, image=image)


def counted(sweep: PromptSweep, value: fx.Node, numbers: range | torch.Tensor, before: fx.Node) -> fx.Node:
    """int64 [B, numbers]: the same numbers for each sample of a value."""
    row = torch.arange(numbers.start, numbers.stop) if isinstance(numbers, range) else numbers
    constant = sweep.graph.add_constant("image_tokens.numbers", row[None], like=before)
    return sweep.insert(before, aten.expand.default, constant, [batch_of(sweep, value, before), -1])


def batch_of(sweep: PromptSweep, value: fx.Node, before: fx.Node) -> Any:
    """The batch size of a value, as an operand."""
    size = value.meta["val"].shape[0]
    return size if isinstance(size, int) else sweep.insert(before, aten.sym_size.int, value, 0)


def image_and_others(sweep: PromptSweep, image: Image, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """int64 [B, image], [B, rest]: the places of the image's tokens and of all others, each ascending, where a mask tells them."""
    assert image.mask is not None
    if image.mask not in sweep.places:
        ranked = sweep.insert(before, aten._to_copy.default, image.mask, dtype=torch.int8)
        order = sweep.insert(before, operator.getitem, sweep.insert(before, aten.sort.stable, ranked, stable=True, dim=1, descending=True), 1)
        parts = (0, image.count), (image.count, torch.iinfo(torch.int64).max)
        sweep.places[image.mask] = tuple(sweep.insert(before, aten.slice.Tensor, order, 1, *part) for part in parts)  # type: ignore[assignment]
    return sweep.places[image.mask]


def image_rows(sweep: PromptSweep, value: fx.Node, image: Image, axis: int, before: fx.Node) -> fx.Node:
    """The image's rows of a value with tokens along axis 1 or 2."""
    if image.start is not None:
        return sweep.insert(before, aten.slice.Tensor, value, axis, image.start, image.start + image.count)
    places, _ = image_and_others(sweep, image, before)
    if axis == 1:
        return sweep.insert(before, ours.token_take.default, value, places)
    order = [0, 2, 1, *range(3, value.meta["val"].dim())]
    taken = sweep.insert(before, ours.token_take.default, sweep.insert(before, aten.permute.default, value, order), places)
    return sweep.insert(before, aten.permute.default, taken, order)


def keep_of(sweep: PromptSweep, value: fx.Node, tokens: PromptTokens, chosen: fx.Node | None, before: fx.Node) -> fx.Node:
    """int64 [B, left], ascending: all tokens but the image's, and of those the chosen ones ([B, k] of their numbers from 0; None: none)."""
    image = tokens.image
    if image.start is not None:
        ends = [range(image.start), range(image.start + image.count, tokens.count)]
        parts = [counted(sweep, value, r, before) for r in ends if len(r)]
        if chosen is not None:
            parts.insert(int(image.start > 0), sweep.insert(before, aten.add.Tensor, chosen, image.start))
        return sweep.insert(before, aten.cat.default, parts, 1)
    return _sorted(sweep, _others_and_chosen(sweep, image, chosen, before), 0, before)


def chosen_rows(sweep: PromptSweep, value: fx.Node, tokens: PromptTokens, chosen: fx.Node, rows: fx.Node, before: fx.Node) -> fx.Node:
    """[B, left, C]: what `keep_of` keeps, with rows of its own for the chosen image tokens."""
    image = tokens.image
    if image.start is not None:
        ends = [(0, image.start), (image.start + image.count, tokens.count)]
        parts = [sweep.insert(before, aten.slice.Tensor, value, 1, *end) for end in ends if end[0] < end[1]]
        return sweep.insert(before, aten.cat.default, [*parts[:-1], rows, parts[-1]], 1)
    _, others = image_and_others(sweep, image, before)
    unordered = sweep.insert(before, aten.cat.default, [sweep.insert(before, ours.token_take.default, value, others), rows], 1)
    order = _sorted(sweep, _others_and_chosen(sweep, image, chosen, before), 1, before)
    return sweep.insert(before, ours.token_take.default, unordered, order)


def _others_and_chosen(sweep: PromptSweep, image: Image, chosen: fx.Node | None, before: fx.Node) -> fx.Node:
    places, others = image_and_others(sweep, image, before)
    if chosen is None:
        return others
    return sweep.insert(before, aten.cat.default, [others, sweep.insert(before, aten.gather.default, places, 1, chosen)], 1)


def _sorted(sweep: PromptSweep, numbers: fx.Node, item: int, before: fx.Node) -> fx.Node:
    """Item 0: numbers in order; item 1: where they stood."""
    return sweep.insert(before, operator.getitem, sweep.insert(before, aten.sort.default, numbers, 1), item)


def image_after(sweep: PromptSweep, image: Image, keep: fx.Node, count: int, before: fx.Node) -> Image:
    """Where the image's tokens are among those that are kept."""
    if image.mask is None:
        return replace(image, count=count)
    return Image(count, None, sweep.insert(before, ours.token_take.default, image.mask, keep))
