"""x -> x Q for a whole residual stream, Q folded into the weights that write and read it: outlier channels are spread over all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.blocks import Stream, Streams
from ...ir.blocks.vocabulary import path_of
from ...ir.graph import Graph
from ...ir.nodes import argument
from ..rewrite import Context, GraphPass
from .hadamard import Rotation
from .residual_plan import AddToBias, Plan, Product, plan_rotation
from .residual_writers import Turn, TurnConstant, Unscaled

aten, ours = torch.ops.aten, torch.ops.rewright


@dataclass(frozen=True)
class RotateResidual(GraphPass):
    """Run every residual stream in a rotated basis: the R1 of QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2025), section 3.

    Before:  x = x + linear(.., Wo, bo);      y = linear(rms_norm(x, w), Wi, bi)
    After:   x = x + linear(.., Q'Wo, Q'bo);  y = linear(rms_norm(x, 1), Wi diag(w) Q, bi)
    rms_norm without a weight commutes with Q, so the function stays; a channel that was large at every token is spread over all, and
    linear layers see activations without outliers. Where the norms are LayerNorms the mean is taken out of everything that is written
    instead (W - mean of its rows, embeddings, positions, class token), the norms become RMS norms, and their bias goes into bi + Wi beta.
    LayerScale goes into the weights before it. Embeddings, linears, convolutions with channels of their own, and experts are followed
    through layout ops, scales by number or token, sums and means over tokens.

    matrix: "hadamard" (randomised) or "random"; a width no Hadamard matrix is known for gets blocks, which `Graph.notes` says.
    untie: give an embedding and a head that share a weight one each, at the memory of another table.
    explicit: at the ends of a stream, which are paid once and not a layer, turn what no weight can take (an input that is given as a
    value, a normed embedding; an output of the model, pooling) by one more linear layer [width, width].

    Refuses, the whole stream: post-norm (the affine lies inside the residual path); a norm on the way in whose weight differs by channel
    (Gemma 2, OLMo 2); readers inside the stream that are no linear layer; readers without a norm where LayerNorms drop the mean (the
    patch merging of Swin: its norm takes the mean of four tokens, not of each); tied weights without `untie`; sums fused with norms.
    """

    matrix: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    untie: bool = False
    explicit: bool = True

    name = "rotate-residual"
    exact = True  # an orthogonal change of basis, folded in float64 and rounded once: within fp tolerance

    def run(self, graph: Graph, context: Context) -> Graph:
        streams = Streams(graph)
        for number, last in enumerate([s.last for s in streams.all]):
            stream = streams.of(last)
            assert stream is not None  # sums outlive all edits
            plan = plan_rotation(graph, streams, stream, self.explicit, self.untie)
            if isinstance(plan, str):
                context.decline(last, plan)
                continue
            rotation = Rotation(stream.width, self.matrix, self.seed + number)
            context.apply(last)
            graph.notes += [f"{self.name}: {note}" for note in _notes(plan, stream, rotation)]
            _Edit(graph, rotation).apply(plan)
            streams = Streams(graph)
        return graph


def _notes(plan: Plan, stream: Stream, rotation: Rotation) -> list[str]:
    found = [f"{name} is no longer shared: the rotation gives each of its readers a weight of its own" for name in plan.untied]
    for product in plan.products:
        found.append(f"{path_of(product.value)} is turned {'back ' if product.back else ''}by a linear layer of {stream.width} x {stream.width}")
    return found + ([rotation.remark] if rotation.remark else [])


class _Edit:
    """Carries a plan out."""

    def __init__(self, graph: Graph, rotation: Rotation) -> None:
        self.graph, self.rotation = graph, rotation
        self.made: dict[tuple, fx.Node] = {}
        """What was made of which weights: calls that share a weight go on sharing it."""

    def apply(self, plan: Plan) -> None:
        for shift in plan.shifts:  # before W is turned
            self._add_to_bias(shift)
        for turn in plan.reads:
            turn.call.update_arg(turn.position, self._turned(turn.weight, turn))
        for write in plan.writes:
            if isinstance(write, TurnConstant):
                write.call.replace_input_with(write.constant, self._turned(write.constant, write))
                continue
            write.call.update_arg(write.position, self._turned(write.weight, write))
            if (bias := _bias(write.call)) is not None:
                _set_bias(write.call, self._turned(bias, Turn(write.call, 2, 0, write.scales, write.centre)))
        for product in plan.products:
            self._multiply(product, plan.centre)
        for norm in plan.norms:
            self._unscale(norm)
        for scale in plan.scales:
            scaled: Any = next(a for a in scale.args[:2] if not self.graph.is_weight(a))
            scale.replace_all_uses_with(scaled, propagate_meta=False)

    def _turned(self, weight: fx.Node, edit: Turn | TurnConstant) -> fx.Node:
        names = tuple(str(s.target) for s in edit.scales)
        return self._weight(f"{weight.target}_rotated", TurnWeight(self.rotation, edit.axis, edit.centre), (str(weight.target), *names), edit.call)

    def _add_to_bias(self, shift: AddToBias) -> None:
        weight, bias = str(shift.call.args[1].target), _bias(shift.call)  # type: ignore[union-attr]
        name = f"{bias.target}_shifted" if bias is not None else f"{weight.rpartition('.')[0]}.bias".lstrip(".")
        sources = (weight, str(shift.beta.target), *(() if bias is None else (str(bias.target),)))
        made = self._weight(name, shifted_bias, sources, shift.call)
        _set_bias(shift.call, made)

    def _multiply(self, product: Product, centre: bool) -> None:
        value = product.value
        width, dtype = self.rotation.width, value.meta["val"].dtype
        path = path_of(value)
        turn = TurnIdentity(self.rotation, width, dtype, centre, product.back)
        sources = () if product.scale is None else (str(product.scale.target),)
        weight = self._weight(f"{path}.rotation", turn, sources, value)
        before = min(product.readers)
        turned = self.graph.insert(aten.linear.default, value, weight, product.beta, before=before, like=value)
        for reader in product.readers:
            reader.replace_input_with(value, turned)

    def _unscale(self, norm: Unscaled) -> None:
        node = norm.norm
        width = self.rotation.width
        weight: Any = node.args[1] if node.target is ours.rms_norm.default else argument(node, "weight")
        if norm.keep and weight is not None:
            one = weight
        elif weight is not None:
            one = self._weight(f"{weight.target}_one", torch.ones_like, (str(weight.target),), node)
        else:
            one = self.graph.add_constant(f"{path_of(node)}.one", torch.ones(width, dtype=node.meta["val"].dtype), like=node)
        new = self.graph.insert(ours.rms_norm.default, node.args[0], one, norm.eps, before=node)
        node.replace_all_uses_with(new, propagate_meta=False)

    def _weight(self, name: str, function: Callable[..., Tensor], sources: tuple[str, ...], like: fx.Node) -> fx.Node:
        key = (name, repr(function), *sources)
        if key not in self.made:
            self.made[key] = self.graph.add_weight(name, function, *sources, like=like)
        return self.made[key]


def _bias(call: fx.Node) -> fx.Node | None:
    return argument(call, "bias") if any(a.name == "bias" for a in call.target._schema.arguments) else None  # type: ignore[union-attr]


def _set_bias(call: fx.Node, bias: fx.Node) -> None:
    call.args, call.kwargs = (*call.args[:2], bias, *call.args[3:]), {k: v for k, v in call.kwargs.items() if k != "bias"}


# -- recipes of weights ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TurnWeight:
    """w -> w Q along one axis, after a factor for each place on it and, with `centre`, without its mean over it."""

    rotation: Rotation
    axis: int
    centre: bool

    def __call__(self, w: Tensor, *scales: Tensor) -> Tensor:
        x = w.movedim(self.axis, -1).double()
        for s in scales:
            x = x * s.double().flatten()
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        return self.rotation.turn(x).movedim(-1, self.axis).to(w.dtype).contiguous()


@dataclass(frozen=True)
class TurnIdentity:
    """The weight of a linear layer that turns a value (Q'), or turns it back to what a norm's weight gave (diag(w) Q)."""

    rotation: Rotation
    width: int
    dtype: torch.dtype
    centre: bool
    back: bool

    def __call__(self, *scale: Tensor) -> Tensor:
        device = scale[0].device if scale else None
        return TurnWeight(self.rotation, 1 if self.back else 0, self.centre)(torch.eye(self.width, dtype=torch.float64, device=device), *scale).to(self.dtype)


def shifted_bias(w: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
    """b + W beta, over the window of a convolution too."""
    y = w.double().flatten(2).sum(-1) @ beta.double() if w.dim() > 2 else w.double() @ beta.double()
    return (y if bias is None else y + bias.double()).to(w.dtype)
