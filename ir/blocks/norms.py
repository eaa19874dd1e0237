"""Norms with the linears they feed, and where a block's norm stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..graph import Graph
from ..nodes import is_looked_through
from .residual import Streams
from .vocabulary import (
    CHANNEL_NORMS,
    FUSED_NORMS,
    LAST_AXIS_NORMS,
    LAYOUT,
    aten,
    is_norm,
    is_pointwise,
    is_projection,
    is_sum,
    norm_output,
    past_casts,
    reads,
)

_FAR = 32
_EXPERTS = (aten.index.Tensor, aten.index_select.default, aten.repeat_interleave.self_int, aten.sum.dim_IntList)
"""How tokens get to their experts and back."""
_MOVED = (*LAYOUT, *_EXPERTS, aten.roll.default, aten.pad.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.cat.default)


@dataclass(frozen=True)
class NormLinears:
    """A norm and all linears (1x1 convolutions, grouped products) that read its output, through casts and layout ops.

    others: what else reads it; a rewrite of the norm's scale has to take care of them.
    """

    norm: fx.Node
    linears: tuple[fx.Node, ...]
    layer: str
    others: tuple[fx.Node, ...] = ()


def norm_linears(graph: Graph) -> list[NormLinears]:
    """Every norm whose output at least one linear reads, in graph order; fused residual norms by their first output."""
    found = []
    for norm in graph.find(*LAST_AXIS_NORMS, *FUSED_NORMS, *CHANNEL_NORMS):
        linears, others = _readers(norm_output(norm))
        if linears:
            found.append(NormLinears(norm, linears, norm.meta.get("path", ""), others))
    return found


def _readers(value: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    linears: dict[fx.Node, None] = {}
    others: dict[fx.Node, None] = {}
    work = [value]
    while work:
        source = work.pop(0)
        for user in source.users:
            if is_projection(user) and reads(user) is source:
                linears[user] = None
            elif user.op == "call_function" and (user.target in LAYOUT or is_looked_through(user)):
                work.append(user)
            elif user.target is not aten.sym_size.int:
                others[user] = None
    return tuple(sorted(linears)), tuple(sorted(others))


def norm_before(value: Any) -> tuple[fx.Node | None, Any]:
    """(the norm whose output a projection reads, what it reads): through casts, layout ops, and an adaptive norm's scale and shift."""
    value = past_casts(value)
    for _ in range(_FAR):
        if not isinstance(value, fx.Node) or value.op != "call_function" or is_norm(value) or is_projection(value):
            break
        if is_sum(value) and _modulated(value) is None:
            break
        if value.target in _MOVED or is_looked_through(value):
            source: Any = value.args[0]
            value = source[-1] if isinstance(source, list | tuple) else source
        elif is_pointwise(value) and (inner := _modulated(value)) is not None:
            value = inner
        else:
            break
    return (value if is_norm(value) else None), value


def _modulated(node: fx.Node) -> fx.Node | None:
    """x of x * (1 + scale), x * (1 + scale) + shift where x is a norm (DiT, SD3)."""
    for operand in node.args[:2]:
        if is_norm(past_casts(operand)):
            return operand  # type: ignore[return-value]
        if isinstance(operand, fx.Node) and operand.target is aten.mul.Tensor and any(is_norm(past_casts(a)) for a in operand.args[:2]):
            return operand
    return None


def residual_add(streams: Streams, out: fx.Node) -> tuple[fx.Node | None, bool]:
    """(the addition that puts a branch back, whether a norm stands between): through layout ops, LayerScale, gates and norms."""
    normed = False
    value = out
    for _ in range(_FAR):
        users = [u for u in value.users if u.target is not aten.sym_size.int]
        sums = [u for u in users if is_sum(u)]
        if len(sums) == 1 and len(users) == 1:
            return sums[0], normed
        if len(users) != 1:
            return None, normed
        user = users[0]
        if is_norm(user):
            normed = True
        elif user.target not in (*_MOVED, aten.mul.Tensor, aten.div.Tensor) and not is_looked_through(user):
            return None, normed
        value = user
    return None, normed


def norm_position(streams: Streams, reads: Any, out: fx.Node | None) -> tuple[str, fx.Node | None]:
    """("pre-norm", "post-norm", "sandwich-norm", "output-norm" or "", the residual addition) of a branch that reads a value and ends in `out`."""
    if out is None:
        return "", None
    add, after = residual_add(streams, out)
    if add is None:
        return "", None
    norm, source = norm_before(reads)
    before = _normed_value(norm) if norm is not None else None
    if norm is not None and streams.same(before, add) and not _starts_block(norm, add):
        return "sandwich-norm" if after else "pre-norm", add
    if streams.same(source, add) or streams.same(past_casts(source), add):
        return "output-norm" if after else "post-norm", add
    return "", add


def _normed_value(norm: fx.Node) -> Any:
    """What a norm reads; for a fused one its sum."""
    if norm.target in LAST_AXIS_NORMS or norm.target in CHANNEL_NORMS:
        return past_casts(norm.args[0])
    fused: Any = norm.args[0]
    return fused


def _starts_block(norm: fx.Node, add: fx.Node) -> bool:
    """Whether the norm's own output is what the branch is added to (post-norm)."""
    return any(past_casts(a) is norm for a in add.args[:2])
