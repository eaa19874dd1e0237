"""Walks back from a value to what makes its channels, an index tensor in hand: one rule a kind of op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import Evaluator, is_size, op_name
from ..graph import Graph
from ..nodes import argument, is_looked_through, schema
from .vocabulary import (
    ACTIVATIONS,
    CHANNEL_NORMS,
    CONVOLUTIONS,
    FUSED_NORMS,
    LAST_AXIS_NORMS,
    LINEARS,
    MOVES,
    channel_axis,
    is_depthwise_convolution,
    is_grouped_product,
    is_pointwise,
    past_layout,
)

aten = torch.ops.aten
ours = torch.ops.rewright

_SHIFT = 1 << 24  # a code is producer * _SHIFT + channel; no layer has more channels
_MOST = 3000  # nodes of one walk
_POOLS = ("mean", "sum", "amax", "avg_pool", "max_pool", "adaptive_avg_pool", "upsample")


@dataclass(frozen=True)
class Step:
    """A node on the way that is more than layout.

    kind: "scale" or "shift" (by a constant), "times" or "add" (another computed value), "norm", "activation", "attention",
    "convolution" (depthwise), "pool", "rope" (half-split) or "rope interleaved".
    """

    node: fx.Node
    kind: str
    channels: int = 0
    """For a rotation: how many channels of a head it turns."""


@dataclass(frozen=True)
class Origin:
    """Where the channels of a value come from: `producers` in graph order. which, channel: int64, over `axes` of the value; which is -1 where none makes it."""

    producers: tuple[fx.Node, ...]
    which: Tensor
    channel: Tensor
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Traced:
    """Codes of a value (a list for several outputs, None where no producer's channels arrive), the steps behind them, why they are lost."""

    codes: Any = None
    steps: tuple[Step, ...] = ()
    why: str | None = None


_NOTHING = _Traced()


class ChannelTracer:
    """Walks back from a value to the producers of its channels; with `producer`, to that one alone."""

    def __init__(self, graph: Graph, producer: fx.Node | None = None, most: int = _MOST) -> None:
        sizes = {name: dim.example for name, dim in graph.dims.items()}
        self.graph, self.producer, self.most = graph, producer, most
        self.at = Evaluator(graph, sizes, {})
        self.producers: list[fx.Node] = []
        self._done: dict[fx.Node, _Traced] = {}

    def origin(self, value: fx.Node, axes: tuple[int, ...] = (-1,)) -> Origin | str:
        """The producers of a value's channels, which are the same at every place of all other axes, or why not."""
        traced = self.trace(value)
        if traced.codes is None:
            return traced.why or f"no channel of {value.name} comes from {self.producer.name if self.producer else 'a projection'}"
        codes = _compact(traced.codes, keep={a % traced.codes.dim() for a in axes})
        rest = [d for d in range(codes.dim()) if d not in {a % codes.dim() for a in axes}]
        flat = codes.permute(*rest, *(a % codes.dim() for a in axes)).reshape(-1, *(codes.shape[a] for a in axes))
        if not bool((flat == flat[0]).all()):
            return f"the channels of {value.name} differ from place to place"
        first = flat[0]
        producers = tuple(sorted(self.producers))
        place = torch.tensor([producers.index(p) for p in self.producers])
        which = torch.where(first < 0, -1, place[(first // _SHIFT).clamp(min=0)])
        return Origin(producers, which, torch.where(first < 0, -1, first % _SHIFT), traced.steps)

    def trace(self, value: fx.Node) -> _Traced:
        """The codes of a value over its whole shape."""
        stack = [value]
        while stack:
            top = stack[-1]
            missing = [n for n in self._needs(top) if n not in self._done] if top not in self._done else []
            if missing and len(self._done) < self.most:
                stack += missing
                continue
            if top not in self._done:
                self._done[top] = _Traced(why=f"{value.name} is further than {self.most} nodes from what makes it") if missing else self._trace(top)
            stack.pop()
        return self._done[value]

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        if node.op != "call_function" or is_size(node) or self._starts(node) or op_name(node).startswith("new_") or op_name(node).endswith("_like"):
            return []
        if self.producer is not None and node < self.producer or _is_constant(node):
            return []
        if node.target in (ours.attention.default, ours.multi_head_attention.default):
            return [n for n in (node.args[2], *(node.args[:2] if self.producer else ())) if isinstance(n, fx.Node)]
        return [n for n in node.all_input_nodes if n.op != "get_attr"]

    def _starts(self, node: fx.Node) -> bool:
        if self.producer is not None:
            return node is self.producer
        if node.op == "placeholder":
            value = node.meta["val"]
            return value.is_floating_point() and value.dim() > 2
        if node.target in CONVOLUTIONS:
            return not is_depthwise_convolution(node)
        return node.target in LINEARS or node.target is aten.embedding.default or is_grouped_product(node)

    def _start(self, node: fx.Node) -> _Traced:
        if not isinstance(node.meta["val"], Tensor):
            return _Traced(why=f"{node.name} has several outputs")
        shape, axis = self.at.shape(node), channel_axis(node)
        if not shape:
            return _Traced(why=f"{node.name} is one number")
        number = len(self.producers)
        self.producers.append(node)
        codes = torch.arange(shape[axis]) + number * _SHIFT
        return _Traced((codes.view(-1, *[1] * (len(shape) - 2)) if axis == 1 else codes).expand(shape))

    def _trace(self, node: fx.Node) -> _Traced:
        if self._starts(node):
            return self._start(node)
        operands = {n: self._done.get(n, _NOTHING) for n in self._needs(node)}
        coded = {n: t for n, t in operands.items() if t.codes is not None}
        if not coded:
            return next((t for t in operands.values() if t.why), _NOTHING)
        steps = tuple(dict.fromkeys(s for t in coded.values() for s in t.steps))
        found = self._rule(node, coded)
        if found is None:
            if self.producer is None:
                return self._start(node)  # it makes new channels; whoever asked looks at what it is
            return _Traced(why=f"{node.name} mixes the channels of {self.producer.name}")
        if isinstance(found, str):
            return _Traced(why=found)
        codes, step = found
        return _Traced(codes, (*steps, step) if step else steps)

    def _rule(self, node: fx.Node, coded: dict[fx.Node, _Traced]) -> tuple[Any, Step | None] | str | None:
        """(codes, the step if it is more than layout), why the channels are lost, or None for an op that makes new channels."""
        target: Any = node.target
        codes = next(iter(coded.values())).codes
        if target is operator.getitem:
            return codes[node.args[1]], None
        if target in (aten.index.Tensor, aten.gather.default) and any(n.op != "get_attr" for n in node.all_input_nodes if n not in coded):
            return self._picked(node, codes)
        if target in MOVES:
            return self._moved(node, coded), None
        if is_looked_through(node):
            return codes.expand(self.at.shape(node)), None
        if target in FUSED_NORMS:
            found = self._pointwise(node, {n: t for n, t in coded.items() if n in node.args[:2]}, [self.at.size(s) for s in node.meta["val"][0].shape])
            return found if isinstance(found, str) else ([found[0], found[0]], Step(node, "norm"))
        if target in LAST_AXIS_NORMS or target in CHANNEL_NORMS:
            return codes, Step(node, "norm")
        if target is aten._native_batch_norm_legit_no_training.default:
            return [codes, None, None], Step(node, "norm")
        if target is ours.rope.default:
            return codes, Step(node, "rope", int(node.meta["val"].shape[-1]))
        if target in (ours.attention.default, ours.multi_head_attention.default):
            return self._attended(node, coded)
        if is_depthwise_convolution(node):
            return self._kept(node, codes, {0, 1}, 1), Step(node, "convolution")
        if any(op_name(node).startswith(p) for p in _POOLS):
            return self._pooled(node, codes)
        if is_pointwise(node):
            return self._pointwise(node, coded, self.at.shape(node))
        return None

    def _moved(self, node: fx.Node, coded: dict[fx.Node, _Traced]) -> Any:
        def operand(n: fx.Node) -> Any:
            if n in coded:
                return coded[n].codes
            if is_size(n):
                return self.at.size(n.meta["val"])
            value = n.meta["val"]
            if n.op == "get_attr" and not value.is_floating_point():
                return self.at.run(n)  # constant indices
            return torch.full([1] * value.dim(), -1).expand(self.at.shape(n))

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)  # type: ignore[misc]
        if node.target in (aten.pad.default, aten.constant_pad_nd.default):
            args, kwargs = (*args[:2], *(("constant",) if node.target is aten.pad.default else ()), -1), {}  # type: ignore[index]
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        return list(made) if isinstance(made, tuple | list) else made

    def _picked(self, node: fx.Node, codes: Tensor) -> tuple[Any, Step | None] | str:
        """Tokens chosen by values: fine while the channels do not depend on the token."""
        if node.target is aten.gather.default:
            axes, rank = [argument(node, "dim") % codes.dim()], 1
        else:
            indices: Any = node.args[1]
            axes = [i for i, index in enumerate(indices) if index is not None]
            rank = max(index.meta["val"].dim() for index in indices if index is not None)
        for axis in axes:
            codes = codes.narrow(axis, 0, 1)
            if axes != list(range(axes[0], axes[-1] + 1)) or not _same_along(next(iter(self._coded(node))), axis):
                return f"{node.name} picks channels by values"
        shape = [*codes.shape[: axes[0]], *[1] * rank, *codes.shape[axes[-1] + 1 :]]
        return codes.reshape(shape).expand(self.at.shape(node)), None

    def _coded(self, node: fx.Node) -> list[Tensor]:
        return [self._done[n].codes for n in node.all_input_nodes if n in self._done and self._done[n].codes is not None]

    def _kept(self, node: fx.Node, codes: Tensor, keep: set[int], axis: int) -> Tensor:
        """The result's codes where some axes change in length but the channels do not depend on them."""
        shape = self.at.shape(node)
        for d in range(codes.dim()):
            if d not in keep:
                codes = codes.narrow(d, 0, 1)
        if shape[axis] != codes.shape[axis]:
            codes = codes.repeat_interleave(shape[axis] // codes.shape[axis], axis)
        return codes.expand(shape)

    def _pooled(self, node: fx.Node, codes: Tensor) -> tuple[Any, Step] | str | None:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return None
        if any(name == "dim" for name, *_ in schema(node.target)):
            dims = argument(node, "dim")
            axes = sorted({d % codes.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])}) if dims is not None else list(range(codes.dim()))
            if not all(_same_along(codes, a) for a in axes):
                return f"{node.name} sums over the channels"
            for a in reversed(axes):
                codes = codes.narrow(a, 0, 1) if value.dim() == codes.dim() and argument(node, "keepdim") else codes.select(a, 0)
            return codes.expand(self.at.shape(node)), Step(node, "pool")
        if value.dim() != codes.dim() or not all(_same_along(codes, a) for a in range(2, codes.dim())):
            return None
        return self._kept(node, codes, {0, 1}, 1), Step(node, "pool")

    def _attended(self, node: fx.Node, coded: dict[fx.Node, _Traced]) -> tuple[Any, Step] | str:
        v: Any = node.args[2]
        if v not in coded:
            return f"{node.name} only weighs with {', '.join(n.name for n in coded)}"
        codes = coded[v].codes
        packed = node.target is ours.multi_head_attention.default
        heads, kv_heads = (argument(node, "heads"), argument(node, "kv_heads")) if packed else (int(node.meta["val"].shape[1]), codes.shape[1])
        tokens = 1 if packed else 2
        if not _same_along(codes, tokens):
            return f"{node.name} mixes tokens of several projections"
        codes = codes.narrow(tokens, 0, 1)
        if packed:
            codes = codes.unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 2).flatten(2)
        else:
            codes = codes.repeat_interleave(heads // kv_heads, 1)
        return codes.expand(self.at.shape(node)), Step(node, "attention")

    def _pointwise(self, node: fx.Node, coded: dict[fx.Node, _Traced], shape: list[int]) -> tuple[Any, Step | None] | str:
        if op_name(node) == "copy":
            source: Any = node.args[1]
            return (coded[source].codes.expand(shape), None) if source in coded else f"{node.name} overwrites the channels"
        values = [t.codes.expand(shape) for t in coded.values()]
        first = values[0]
        others = [a for a in node.args if not (isinstance(a, fx.Node) and a in coded)]
        if len(values) == 1 or all(_equal(first, v) for v in values[1:]):
            return first, Step(node, _kind(node, others, len(values)))
        if op_name(node) in ("add", "sub") and len(values) == 2 and _equal(first // _SHIFT, values[1] // _SHIFT):
            return first, _rotation(node, first, values[1])
        names = sorted({self.producers[int(p)].name for v in values for p in (_compact(v) // _SHIFT).unique() if p >= 0})
        return f"{node.name} combines different channels of {' and '.join(names)}"


def _kind(node: fx.Node, others: list[Any], coded: int) -> str:
    constant = all(not isinstance(o, fx.Node) or _is_constant(o) for o in others)
    if coded == 1 and op_name(node) in ("mul", "div", "neg"):
        return "scale" if constant else "times"
    if coded == 1 and op_name(node) in ("add", "sub", "rsub", "add_layer_norm", "add_rms_norm"):
        return "shift" if constant else "add"
    if node.target in ACTIVATIONS or coded > 1 or constant:
        return "activation"
    return op_name(node)


def _is_constant(node: Any) -> bool:
    source = past_layout(node)
    if isinstance(source, fx.Node) and source.target is aten.index.Tensor:  # rows of a table: the biases of experts
        source = past_layout(source.args[0])
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _rotation(node: fx.Node, a: Tensor, b: Tensor) -> Step:
    """A sum of a head's channels with other channels of it: the two halves, or neighbours."""
    a, b = _compact(a, {a.dim() - 1}), _compact(b, {b.dim() - 1})
    a, b = torch.broadcast_tensors(a, b)
    distance = (a - b)[a != b].abs()
    turned = int((a != b).any(dim=tuple(range(a.dim() - 1))).sum()) if a.dim() > 1 else int((a != b).sum())
    neighbours = int(distance[0]) == 1
    # x0 cos - x1 sin and x1 cos + x0 sin apart: each sum holds half of the turned channels
    parts = 2 if len({int(c) for c in a.flatten()} & {int(c) for c in b.flatten()}) == 0 else 1
    return Step(node, "rope interleaved" if neighbours else "rope", turned * parts)


def _equal(a: Tensor, b: Tensor) -> bool:
    for d in range(a.dim()):
        if a.stride(d) == 0 and b.stride(d) == 0:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return torch.equal(a, b)


def _same_along(codes: Tensor, axis: int) -> bool:
    return codes.stride(axis) == 0 or codes.shape[axis] == 1 or bool((codes == codes.narrow(axis, 0, 1)).all())


def _compact(codes: Tensor, keep: set[int] | frozenset[int] = frozenset()) -> Tensor:
    """Without the copies along axes the codes do not depend on."""
    for d in range(codes.dim()):
        if d not in keep and codes.stride(d) == 0:
            codes = codes.narrow(d, 0, 1)
    return codes
