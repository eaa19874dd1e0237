"""Stored constants that count the channels of what a node makes: a norm's weight and bias, the rows of a linear, the columns of a table."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..nodes import argument, arguments
from .vocabulary import CHANNEL_NORMS, CONVOLUTIONS, LAST_AXIS_NORMS, aten, channel_axis, is_normed, is_projection, ours, path_of, without_floats


@dataclass(frozen=True)
class Constant:
    """One argument of a node that counts channels along `axis`. Look it up when it is edited: another edit may have replaced or made it."""

    argument: str
    axis: int
    neutral: float | None = None
    """What stands for it where the node has none; None: it always has one."""


@dataclass(frozen=True)
class ChannelConstants:
    """kind: "norm", "linear", "convolution", "embedding" or "experts".

    scaled: what a factor of all channels goes into.   shifted: what an offset is added to; None: `no_shift` says why there is none.
    axis: the channels of what the node makes (from 0).
    """

    node: fx.Node
    kind: str
    axis: int
    scaled: tuple[Constant, ...]
    shifted: Constant | None
    no_shift: str = ""


def channel_constants(node: fx.Node) -> ChannelConstants | str | None:
    """The constants that count a node's channels, why they can't be changed, or None for a node that has none."""
    if is_normed(node):
        fused: Any = node.args[0]
        return _of_norm(fused, node.meta["val"].dim() - 1, "w", "b" if fused.target is ours.add_layer_norm.default else None)
    if is_batch_norm(node):
        return _of_norm(node.args[0], 1, "weight", "bias")
    if node.target in LAST_AXIS_NORMS or node.target in CHANNEL_NORMS:
        if node.target in (aten.layer_norm.default, aten.rms_norm.default) and len(argument(node, "normalized_shape")) != 1:
            return f"{path_of(node)} norms several axes"
        return _of_norm(node, _axis(node), "w" if node.target is ours.rms_norm.default else "weight", "bias" if "bias" in arguments(node) else None)
    if node.target is aten.linear.default or node.target in CONVOLUTIONS:
        why = why_not_edited(node.args[1], node) or (why_not_edited(bias, node) if (bias := argument(node, "bias")) is not None else None)
        kind, offset = "linear" if node.target is aten.linear.default else "convolution", Constant("bias", 0, 0.0)
        return why or ChannelConstants(node, kind, _axis(node), (Constant("weight", 0), offset), offset)
    if node.target is aten.embedding.default:
        table = Constant("weight", 1)
        return why_not_edited(node.args[0], node) or ChannelConstants(node, "embedding", _axis(node), (table,), table)
    if node.target is ours.grouped_linear.default:
        no_shift = f"the experts of {path_of(node)} have no bias that could take a shift"
        return why_not_edited(node.args[1], node) or ChannelConstants(node, "experts", _axis(node), (Constant("w", 2),), None, no_shift)
    if is_projection(node):
        return without_floats(node)
    return None


def is_batch_norm(node: fx.Node) -> bool:
    """The first of a batch norm's three outputs, as captured in eval mode."""
    source, item = node.args if node.target is operator.getitem else (None, None)
    return isinstance(source, fx.Node) and source.target is aten._native_batch_norm_legit_no_training.default and item in (0,)


def why_not_edited(weight: Any, node: fx.Node) -> str | None:
    """Why a weight can't be changed for one of its readers, or None. A shared vector is no matter: the others keep the old one."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return f"the weight of {path_of(node)} is computed, not stored"
    others = [u for u in weight.users if u is not node]
    if not others or weight.meta["val"].dim() < 2:
        return None
    if any(path_of(o) == path_of(node) for o in others):
        return f"{weight.target} serves {len(weight.users)} calls: an edit for one would untie them"
    return f"{weight.target} is also read by {path_of(others[0])}: an edit would untie them"


def _axis(node: fx.Node) -> int:
    return channel_axis(node) % node.meta["val"].dim()


def _of_norm(node: Any, axis: int, weight: str, bias: str | None) -> ChannelConstants | str:
    given = arguments(node)
    for name in (weight, bias):
        if name is not None and given[name] is not None and (not isinstance(given[name], fx.Node) or given[name].op != "get_attr"):
            return f"the {name} of {path_of(node)} is computed, not stored"
    kept = Constant(weight, 0, 1.0)
    if bias is None:
        return ChannelConstants(node, "norm", axis, (kept,), None, f"{path_of(node)} is an RMS norm, which has no bias that could take a shift")
    offset = Constant(bias, 0, 0.0)
    return ChannelConstants(node, "norm", axis, (kept, offset), offset)
