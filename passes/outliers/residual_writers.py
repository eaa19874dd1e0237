"""Pushes a rotation back from a value of the residual stream into the weights that make it, or says in one sentence what stands in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.blocks.axes import source_axis
from ...ir.blocks.vocabulary import CONVOLUTIONS, LAST_AXIS_NORMS, path_of
from ...ir.graph import Graph
from ...ir.nodes import argument, number
from .token_ops import axis_after

aten, ours = torch.ops.aten, torch.ops.rewright

_WEIGHT = {aten.linear.default: 1, aten.embedding.default: 0, ours.grouped_linear.default: 1, **dict.fromkeys(CONVOLUTIONS, 1)}
"""Position of the weight in a call."""
OUT_AXIS = {aten.linear.default: 0, aten.embedding.default: 1, ours.grouped_linear.default: 2, **dict.fromkeys(CONVOLUTIONS, 0)}
IN_AXIS = {aten.linear.default: 1, ours.grouped_linear.default: 1, **dict.fromkeys(CONVOLUTIONS, 1)}
"""The axis of that weight that counts the channels a call makes, and reads."""


@dataclass(frozen=True)
class Turn:
    """Turn the weight at one position of a call, along one axis, after scaling that axis by `scales`."""

    call: fx.Node
    position: int
    axis: int
    scales: tuple[fx.Node, ...] = ()
    centre: bool = False

    @property
    def weight(self) -> fx.Node:
        """The weight as it stands."""
        return self.call.args[self.position]  # type: ignore[return-value]


@dataclass(frozen=True)
class TurnConstant:
    """Turn a stored value (positions, a class token) that `call` reads."""

    call: fx.Node
    constant: fx.Node
    axis: int
    scales: tuple[fx.Node, ...] = ()
    centre: bool = False


@dataclass(frozen=True)
class Unscaled:
    """A norm that becomes an RMS norm with a weight of ones; `keep`: with the constant weight it has."""

    norm: fx.Node
    eps: float
    keep: bool = False


class Writes:
    """Pushes a rotation back from a value into the weights that make it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.writes: list[Turn | TurnConstant] = []
        self.norms: list[Unscaled] = []
        self.scales: list[fx.Node] = []

    def push(self, value: fx.Node, axis: int, scales: tuple[fx.Node, ...], readers: Sequence[fx.Node], centre: bool) -> str | None:
        """value -> value * scales, centred, times Q, for `readers`; or why not."""
        if value.meta["val"].shape[axis] != self.graph.size(value.meta["val"].shape[axis]):
            return f"the width of {value.name} is not fixed"
        if value.op == "get_attr":
            self.writes += [TurnConstant(reader, value, axis, scales, centre) for reader in readers]
            return None
        if value.target in OUT_AXIS:
            return self._weighted(value, axis, scales, centre)
        if value.target in LAST_AXIS_NORMS:
            return self._normed(value, axis, scales, centre)
        if value.target in (aten.mul.Tensor, aten.div.Tensor):
            return self._scaled(value, axis, scales, centre)
        if value.target is aten.add.Tensor and argument(value, "alpha") == 1:
            return self._through(value, axis, scales, centre, value.args[:2])
        if value.target is aten.cat.default and source_axis(value, axis, axis_after) is not None:
            return self._through(value, axis, scales, centre, value.args[0])
        before = source_axis(value, axis, axis_after) if value.op == "call_function" else None
        if before is None:
            what = "an input of the model" if value.op == "placeholder" else f"{value.target.__name__.removesuffix('.default')} of {path_of(value)}"  # type: ignore[union-attr]
            return f"{what} can't be rotated"
        source: Any = value.args[0]
        return self._alone(source, value) or self.push(source, before, scales, [value], centre)

    def _alone(self, value: fx.Node, reader: fx.Node) -> str | None:
        if value.op == "get_attr":
            return None
        other = next((u for u in computing(value) if u is not reader), None)
        return f"{value.name} is also read by {path_of(other)}" if other is not None else None

    def _through(self, value: fx.Node, axis: int, scales: tuple[fx.Node, ...], centre: bool, operands: Any) -> str | None:
        """All operands of a sum or a concatenation."""
        from_the_right = axis - value.meta["val"].dim()
        for operand in operands:
            shape = operand.meta["val"].shape if isinstance(operand, fx.Node) and isinstance(operand.meta["val"], Tensor) else ()
            if len(shape) < -from_the_right or shape[from_the_right] != value.meta["val"].shape[axis]:
                return f"{value.name} adds one number to all channels"
            if why := self._alone(operand, value) or self.push(operand, len(shape) + from_the_right, scales, [value], centre):
                return why
        return None

    def _weighted(self, call: fx.Node, axis: int, scales: tuple[fx.Node, ...], centre: bool) -> str | None:
        position = _WEIGHT[call.target]  # type: ignore[index]
        if not self.graph.is_weight(call.args[position]):
            return f"the weight of {path_of(call)} is computed, not stored"
        if axis != (1 if call.target in CONVOLUTIONS else call.meta["val"].dim() - 1):
            return f"the channels of {path_of(call)} are not those of the stream"
        if call.target in CONVOLUTIONS and argument(call, "groups") != 1:
            return f"{path_of(call)} is a grouped convolution"
        self.writes.append(Turn(call, position, OUT_AXIS[call.target], scales, centre))  # type: ignore[index]
        bias = argument(call, "bias") if call.target in (aten.linear.default, *CONVOLUTIONS) else None
        if bias is not None and not self.graph.is_weight(bias):
            return f"the bias of {path_of(call)} is computed, not stored"
        return None

    def _scaled(self, product: fx.Node, axis: int, scales: tuple[fx.Node, ...], centre: bool) -> str | None:
        """A product with a number, with one number a token, or with one constant a channel (LayerScale), which goes into the weights."""
        a: Any
        b: Any
        a, b = product.args[:2]
        rank = product.meta["val"].dim()
        for value, factor in ((a, b), (b, a))[: 1 if product.target is aten.div.Tensor else 2]:
            if not isinstance(value, fx.Node) or value.meta["val"].dim() != rank or value.meta["val"].shape[axis] != product.meta["val"].shape[axis]:
                continue
            shape = factor.meta["val"].shape if isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor) else ()
            by_channel = len(shape) >= rank - axis and shape[axis - rank] != 1
            if by_channel and (not self.graph.is_weight(factor) or factor.meta["val"].numel() != shape[axis - rank] or product.target is aten.div.Tensor):
                continue
            if by_channel:
                self.scales.append(product)
            return self._alone(value, product) or self.push(value, axis, (factor, *scales) if by_channel else scales, [product], centre)
        return f"{path_of(product)} multiplies its channels by computed values"

    def _normed(self, norm: fx.Node, axis: int, scales: tuple[fx.Node, ...], centre: bool) -> str | None:
        """A norm on the way in commutes with the rotation only if its weight is one number."""
        facts = affine(self.graph, norm)
        if isinstance(facts, str):
            return facts
        scale, beta, eps = facts
        takes_mean = norm.target is aten.layer_norm.default
        constant = all(w is None or _is_constant(self.graph, w) for w in (scale, beta))
        if not constant or scales or axis != norm.meta["val"].dim() - 1 or centre and not takes_mean:
            return f"{path_of(norm)} stands between it and the sum, with a weight that differs by channel"
        if beta is not None and not centre and _number_of(self.graph, beta) != 0:
            return f"{path_of(norm)} stands between it and the sum and adds a bias"
        self.norms.append(Unscaled(norm, eps, keep=True))
        source: Any = norm.args[0]
        return self._alone(source, norm) or self.push(source, axis, (), [norm], takes_mean)


def computing(value: fx.Node) -> list[fx.Node]:
    """The users of a value that read more than its sizes."""
    return [u for u in value.users if u.target is not aten.sym_size.int]


def _number_of(graph: Graph, constant: fx.Node) -> float:
    """The one number in a constant whose elements are all equal."""
    return float(graph.weight(constant).flatten()[0])


def _is_constant(graph: Graph, weight: fx.Node) -> bool:
    tensor = graph.weight(weight)
    return not tensor.is_meta and bool((tensor == tensor.flatten()[0]).all())


def affine(graph: Graph, norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None, float] | str:
    """(weight, bias, eps) of a norm, or why they can't be folded."""
    layer = norm.target is aten.layer_norm.default
    scale: Any = argument(norm, "weight") if norm.target is not ours.rms_norm.default else norm.args[1]
    beta: Any = argument(norm, "bias") if layer else None
    eps = number(graph, argument(norm, "eps"))
    if eps is None:
        return f"{path_of(norm)} has no eps of its own"
    if any(w is not None and not graph.is_weight(w) for w in (scale, beta)):
        return f"the weight of {path_of(norm)} is computed, not stored"
    return scale, beta, float(eps)
