"""What a canonical graph is built of: norms with the linears they feed, attention blocks, feed-forward blocks."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import Graph
from .nodes import argument, is_looked_through

aten = torch.ops.aten
ours = torch.ops.rewright

ACTIVATIONS = {
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.hardswish.default: "hardswish",
    aten.mish.default: "mish",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    ours.quick_gelu.default: "quick_gelu",
}
_NORMS = (aten.layer_norm.default, ours.rms_norm.default, ours.add_layer_norm.default, ours.add_rms_norm.default)
_LAYOUT = (
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
)
_PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_FAR = 32  # steps of a walk: a projection lies no further from its attention


@dataclass(frozen=True)
class NormLinears:
    """A norm and all linears that read its output."""

    norm: fx.Node
    linears: tuple[fx.Node, ...]
    layer: str


@dataclass(frozen=True)
class AttentionBlock:
    """An attention node with its projections; q, k and v are one linear when it is fused. None: not found, `why` says so."""

    attention: fx.Node
    q: fx.Node | None
    k: fx.Node | None
    v: fx.Node | None
    out: fx.Node | None
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None
    key_mask: fx.Node | None
    norm: str
    """"pre-norm", "post-norm", "sandwich-norm" (before and after, in the branch), "output-norm" (after, in the branch) or ""."""
    layer: str
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.heads} heads of {self.head_dim}" + (f" ({self.kv_heads} key-value heads)" if self.kv_heads != self.heads else "")]
        parts.append("causal" if self.causal else "bidirectional")
        parts[-1] += f" within {self.window} tokens" if self.window is not None else ""
        parts[-1] += " with a key mask" if self.key_mask is not None else ""
        return ", ".join(parts)


@dataclass(frozen=True)
class FFNBlock:
    """act(up(x)) -> down, or act(gate(x)) * up(x) -> down. A fused gate_up is both `gate` and `up`."""

    up: fx.Node
    gate: fx.Node | None
    activation: fx.Node
    down: fx.Node
    width: int
    hidden: int
    layer: str
    why: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """ "plain", "gated" or "fused gated"."""
        return "plain" if self.gate is None else "fused gated" if self.gate is self.up else "gated"

    def __str__(self) -> str:
        return f"{self.width} -> {self.hidden}, {ACTIVATIONS[self.activation.target]}"  # type: ignore[index]


def norm_linears(graph: Graph) -> list[NormLinears]:
    """Every norm whose output at least one linear reads, in graph order; fused residual norms by their first output."""
    found = []
    for norm in graph.find(*_NORMS):
        linears = tuple(u for u in _normed(norm).users if u.target is aten.linear.default)
        if linears:
            found.append(NormLinears(norm, linears, norm.meta.get("path", "")))
    return found


def attention_blocks(graph: Graph) -> list[AttentionBlock]:
    """Every attention node with its projections, in graph order."""
    return [_attention_block(node) for node in graph.find(ours.attention.default)]


def ffn_blocks(graph: Graph) -> list[FFNBlock]:
    """Every feed-forward block, in graph order of its down projection."""
    return [block for node in graph.find(aten.linear.default) if (block := _ffn_block(node)) is not None]


def describe(graph: Graph) -> list[str]:
    """The model in a few sentences: what its blocks are, how many, and what was not understood."""
    attentions, ffns = attention_blocks(graph), ffn_blocks(graph)
    said = _counted([(f"{a.norm} attention block".strip(), f", {a}") for a in attentions]) + _counted([(f"{f.kind} FFN", f" {f}") for f in ffns])
    for what, target in (("scaled_dot_product_attention", aten.scaled_dot_product_attention.default), ("softmax", aten.softmax.int)):
        if left := graph.find(target):
            said.append(f"{len(left)} {what} node{'s' * (len(left) > 1)} not raised to attention, first in {left[0].meta.get('path') or left[0].name}")
    reasons = Counter(why for block in (*attentions, *ffns) for why in block.why)
    return said + [f"{why} ({n} times)" if n > 1 else why for why, n in reasons.items()]


# -- attention ------------------------------------------------------------------------------------------------------


def _attention_block(node: fx.Node) -> AttentionBlock:
    q, k, v = node.args[:3]
    why: list[str] = []
    to_q, to_k, to_v = (_projection(value, name, why) for name, value in (("q", q), ("k", k), ("v", v)))
    out = _reader(node)
    if out is None:
        why.append("no linear reads the attention's output")
    shape = q.meta["val"].shape  # type: ignore[union-attr]
    return AttentionBlock(
        node,
        to_q,
        to_k,
        to_v,
        out,
        int(shape[1]),
        int(k.meta["val"].shape[1]),  # type: ignore[union-attr]
        int(shape[3]),
        argument(node, "causal"),
        argument(node, "window"),
        argument(node, "key_mask"),
        _norm_position(to_q, out),
        node.meta.get("path", ""),
        tuple(why),
    )


def _projection(value: Any, name: str, why: list[str]) -> fx.Node | None:
    """Up from q, k or v through layout, RoPE, norms and number factors to the linear that makes it."""
    linear, stopped = _up(value)
    if linear is None:
        what = str(stopped.target).removeprefix("aten.").removesuffix(".default") if stopped.op == "call_function" else stopped.name
        why.append(f"{name} comes from {what}, not from a linear")
    return linear


def _up(value: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    for _ in range(_FAR):
        if value.target is aten.linear.default:
            return value, value
        if value.target is aten.cat.default:  # a partial rotation: all parts must come from one linear
            parts = {_up(part)[0] for part in value.args[0]}  # type: ignore[union-attr, arg-type]
            return (parts.pop() if len(parts) == 1 else None), value
        source = _source(value)
        if source is None:
            return None, value
        value = source
    return None, value


def _source(node: fx.Node) -> fx.Node | None:
    """The one value a layout op, part, rotation, norm or number factor is made of."""
    if node.op != "call_function":
        return None
    if node.target in _LAYOUT or node.target in _PARTS or node.target in _NORMS[:2] or node.target is ours.rope.default or is_looked_through(node):
        return node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source if source.target in _PARTS else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        tensors = [a for a in node.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        return tensors[0] if len(tensors) == 1 else None
    return None


def _reader(node: fx.Node) -> fx.Node | None:
    """Down through layout ops with one reader each to the linear that reads them."""
    for _ in range(_FAR):
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        if node.target is aten.linear.default:
            return node
        if node.target not in _LAYOUT and not is_looked_through(node):
            return None
    return None


def _norm_position(q: fx.Node | None, out: fx.Node | None) -> str:
    if q is None or out is None:
        return ""
    source: Any = _past_casts(q.args[0])
    before = source if source.target in _NORMS or _is_normed(source) else None
    branch, after = out, False
    while len(branch.users) == 1 and ((user := next(iter(branch.users))).target in _NORMS[:2] or is_looked_through(user)):
        branch, after = user, after or user.target in _NORMS
    others = _added(branch)
    if before is not None and any(o in others for o in _norm_inputs(before)):
        return "sandwich-norm" if after else "pre-norm"
    if source in others:
        return "output-norm" if after else "post-norm"
    return ""


def _added(value: fx.Node) -> set[fx.Node]:
    """Everything that is added to a value, until the sum has several readers (parallel branches add twice)."""
    others: set[fx.Node] = set()
    for _ in range(4):
        adds = [u for u in value.users if u.target in (aten.add.Tensor, ours.add_rms_norm.default, ours.add_layer_norm.default)]
        if len(adds) != 1 or len(value.users) != 1:
            break
        others |= {_past_casts(a) for a in adds[0].args[:2] if isinstance(a, fx.Node) and a is not value}
        value = adds[0]
    return others


def _norm_inputs(norm: fx.Node) -> list[fx.Node]:
    """What the residual stream is where a norm reads it; for a fused norm its second output."""
    if norm.target is operator.getitem:
        fused: Any = norm.args[0]
        return [u for u in fused.users if u is not norm]
    return [_past_casts(norm.args[0])]


def _past_casts(node: Any) -> fx.Node:
    while node.op == "call_function" and is_looked_through(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_normed(node: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0].target in _NORMS and node.args[1] == 0  # type: ignore[union-attr]


def _normed(norm: fx.Node) -> fx.Node:
    """The node that holds a norm's output: itself, or the first item of a fused residual norm."""
    return next((u for u in norm.users if _is_normed(u)), norm)


# -- feed-forward ---------------------------------------------------------------------------------------------------


def _ffn_block(down: fx.Node) -> FFNBlock | None:
    inner = _past(down.args[0], lambda n: is_looked_through(n))
    if inner.target in ACTIVATIONS:
        up = _branch(inner.args[0])
        return None if up is None else _block(up, None, inner, down)
    if inner.target is not aten.mul.Tensor:
        return None
    a, b = (_past(x, is_looked_through) if isinstance(x, fx.Node) else None for x in inner.args[:2])
    activation, other = (a, b) if a is not None and a.target in ACTIVATIONS else (b, a)
    if activation is None or other is None or activation.target not in ACTIVATIONS:
        return None
    gate, up = _branch(activation.args[0]), _branch(other)
    return None if gate is None or up is None or _past_casts(gate.args[0]) is not _past_casts(up.args[0]) else _block(up, gate, activation, down)


def _block(up: fx.Node, gate: fx.Node | None, activation: fx.Node, down: fx.Node) -> FFNBlock:
    most = 2 if gate is up else 1
    inner = [up, activation] if gate is None else [up, gate, activation]
    why = tuple(f"the hidden value {n.name} has {len(n.users)} readers" for n in dict.fromkeys(inner) if len(n.users) > most)
    width, hidden = (int(n.args[1].meta["val"].shape[1]) for n in (up, down))  # type: ignore[union-attr]
    return FFNBlock(up, gate, activation, down, width, hidden, _common(up, down), why)


def _branch(value: Any) -> fx.Node | None:
    """The linear a hidden value comes from, perhaps as a part of a fused one."""
    end = _past(value, lambda n: is_looked_through(n) or n.target in _PARTS or n.target in (operator.getitem, aten.slice.Tensor))
    return end if end.target is aten.linear.default else None


def _past(node: Any, through: Callable[[fx.Node], bool]) -> fx.Node:
    for _ in range(_FAR):
        if node.op != "call_function" or not through(node):
            break
        node = node.args[0]
    return node


def _common(a: fx.Node, b: fx.Node) -> str:
    """The module path two nodes share."""
    shared = []
    for x, y in zip(a.meta.get("path", "").split("."), b.meta.get("path", "").split(".")):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)


def _counted(kinds: list[tuple[str, str]]) -> list[str]:
    return [f"{n} {what}{'s' * (n > 1)}{details}" for (what, details), n in Counter(kinds).items()]
