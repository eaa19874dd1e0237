"""Attention blocks: projections and their rows, heads, mask, rotation, norms, and where the result is added back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..evaluate import op_name
from ..graph import Graph
from ..nodes import argument, is_looked_through
from .channel_tracer import ChannelTracer
from .norms import norm_position
from .residual import Streams
from .vocabulary import LAYOUT, aten, is_norm, is_projection, ours, past_layout, shared_weights

_FAR = 32
_FAR_NODES = 400
_INSIDE = ("scale", "shift", "norm", "rope", "rope interleaved", "add")
"""Steps between a projection and the attention that leave it its projection."""


@dataclass(frozen=True)
class Projection:
    """Where q, k or v comes from. rows: int64 [heads, dim], the row of `linears[which[h, d]]` that makes channel d of head h (-1: none)."""

    linears: tuple[fx.Node, ...]
    rows: Tensor | None = None
    which: Tensor | None = None
    norm: fx.Node | None = None
    """The norm over a head's channels (Qwen 3) or over all heads (OLMo 2)."""
    rope: str = ""
    """"half" (first against second half), "interleaved" (neighbours) or "" for none."""
    rope_dims: int = 0
    """How many channels of a head are turned."""
    why: str | None = None

    @property
    def linear(self) -> fx.Node | None:
        """The one linear that makes it, perhaps as part of a fused one."""
        return self.linears[0] if len(self.linears) == 1 else None


@dataclass(frozen=True)
class AttentionBlock:
    """An attention node with its projections; q, k and v are one linear when it is fused. None: not found or several, `why` says so.

    kind: "self", "cross" (k and v of another sequence), "joint" (several projections concatenated over tokens: SD3), "latent" (k made
    of two projections: DeepSeek's MLA), "pooling" (a learned query).
    """

    attention: fx.Node
    to_q: Projection
    to_k: Projection
    to_v: Projection
    out: fx.Node | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    causal: bool
    window: int | None
    key_mask: fx.Node | None
    bias: fx.Node | None
    softcap: float | None
    norm: str
    """"pre-norm", "post-norm", "sandwich-norm" (before and after, in the branch), "output-norm" (after, in the branch) or ""."""
    residual: fx.Node | None
    """The addition that puts the result back."""
    layer: str
    kind: str = "self"
    other_outs: tuple[fx.Node, ...] = ()
    """The out projections of a joint attention's other sequences."""
    why: tuple[str, ...] = ()

    @property
    def q(self) -> fx.Node | None:
        """The linear that makes q."""
        return self.to_q.linear

    @property
    def k(self) -> fx.Node | None:
        """The linear that makes k."""
        return self.to_k.linear

    @property
    def v(self) -> fx.Node | None:
        """The linear that makes v."""
        return self.to_v.linear

    @property
    def rope(self) -> str:
        """How q is turned: "half", "interleaved" or ""."""
        return self.to_q.rope

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed after their projection."""
        return self.to_q.norm is not None and self.to_k.norm is not None

    def __str__(self) -> str:
        parts = [f"{self.heads} heads of {self.head_dim}" + (f" ({self.kv_heads} key-value heads)" if self.kv_heads != self.heads else "")]
        parts.append("causal" if self.causal else "bidirectional")
        parts[-1] += f" within {self.window} tokens" if self.window is not None else ""
        parts[-1] += " with a key mask" if self.key_mask is not None else ""
        if self.rope:
            parts.append(f"{'interleaved ' if self.rope == 'interleaved' else ''}RoPE over {self.to_q.rope_dims} channels")
        parts += ["query-key norm"] if self.qk_norm else []
        parts += [f"scores capped at {self.softcap:g}"] if self.softcap is not None else []
        parts += ["a bias on the scores"] if self.bias is not None else []
        return ", ".join(parts)


def attention_blocks(graph: Graph, streams: Streams | None = None) -> list[AttentionBlock]:
    """Every attention node with its projections, in graph order."""
    streams = streams or Streams(graph)
    return [_attention_block(graph, node, streams) for node in graph.find(ours.attention.default, ours.multi_head_attention.default)]


def _attention_block(graph: Graph, node: fx.Node, streams: Streams) -> AttentionBlock:
    q, k, v = (a for a in node.args[:3] if isinstance(a, fx.Node))
    packed = node.target is ours.multi_head_attention.default
    heads, kv_heads = (argument(node, "heads"), argument(node, "kv_heads")) if packed else (int(q.meta["val"].shape[1]), int(k.meta["val"].shape[1]))
    width, value_width = int(q.meta["val"].shape[-1]), int(v.meta["val"].shape[-1])
    to_q, to_k, to_v = (_projection(graph, value, name, n, packed) for name, value, n in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)))
    why = [p.why for p in (to_q, to_k, to_v) if p.why]
    outs = _readers(node)
    out = outs[0] if outs else None
    if out is None:
        why.append("no linear reads the attention's output")
    kind = _kind(to_q, to_k)
    if kind == "joint":
        why = [f"q, k and v are joined from {len(to_q.linears)} sequences with projections of their own", *(w for w in why if "one for some tokens" not in w)]
    why += shared_weights(*dict.fromkeys(linear for p in (to_q, to_k, to_v) for linear in p.linears), *outs)
    norm, residual = "", None
    for linear in to_q.linears:  # of a joint attention the one of the sequence that `out` belongs to
        norm, residual = norm_position(streams, _above_bottleneck(linear.args[0]), out)
        if norm:
            break
    return AttentionBlock(
        attention=node,
        to_q=to_q,
        to_k=to_k,
        to_v=to_v,
        out=out,
        other_outs=outs[1:],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads if packed else width,
        value_dim=value_width // kv_heads if packed else value_width,
        scale=argument(node, "scale"),
        causal=argument(node, "causal"),
        window=argument(node, "window"),
        key_mask=argument(node, "key_mask"),
        bias=argument(node, "bias"),
        softcap=argument(node, "softcap"),
        norm=norm,
        residual=residual,
        layer=node.meta.get("path", ""),
        kind=kind,
        why=tuple(why),
    )


def _projection(graph: Graph, value: fx.Node, name: str, heads: int, packed: bool) -> Projection:
    """Up from q, k or v through layout, RoPE, norms and number factors to the linears that make it."""
    tracer = ChannelTracer(graph, most=_FAR_NODES)
    traced = tracer.trace(value)
    if traced.codes is None:
        return Projection((), why=_not_found(name, value, traced.why))
    axes = (2,) if packed else (1, 3)
    found = tracer.origin(value, axes)
    steps = traced.steps
    inside = {*_INSIDE, "times"} if any(s.kind.startswith("rope") for s in steps) else set(_INSIDE)  # a rotation by hand multiplies by cosines
    used = tuple(tracer.producers)
    if not isinstance(found, str):
        used = tuple(p for i, p in enumerate(found.producers) if bool((found.which == i).any()))
    strangers = [s.node for s in steps if s.kind not in inside] or [p for p in used if not is_projection(p)]
    if strangers:
        return Projection((), why=f"{name} comes from {op_name(strangers[-1]) or strangers[-1].name}, not from a linear")
    norm = next((s.node for s in reversed(steps) if s.kind == "norm"), None)
    turns = [s for s in steps if s.kind.startswith("rope")]
    rope = "" if not turns else "interleaved" if turns[0].kind == "rope interleaved" else "half"
    dims = max((s.channels for s in turns), default=0)
    if isinstance(found, str):
        return Projection(used, None, None, norm, rope, dims, f"{name} is made of several linears, one for some tokens each" if len(used) > 1 else found)
    order = {used.index(p): i for i, p in enumerate(found.producers) if p in used}
    which = found.which.clone()
    for new, old in order.items():
        which[found.which == old] = new
    rows, which = (t.reshape(heads, -1) for t in (found.channel, which))
    why = f"{name} is made of {len(used)} linears" if len(used) > 1 else None
    return Projection(used, rows, which, norm, rope, dims, why)


def _not_found(name: str, value: fx.Node, why: str | None) -> str:
    return why or f"{name} comes from {past_layout(value).name}, not from a linear"


def _kind(to_q: Projection, to_k: Projection) -> str:
    if len(to_q.linears) > 1 and to_q.rows is None:
        return "joint"
    if len(to_k.linears) > 1 and to_k.rows is not None:
        return "latent"
    if to_q.linears and to_k.linears:
        a, b = (past_layout(p.linears[0].args[0]) for p in (to_q, to_k))
        if a is not b:
            return "pooling" if _is_learned(a) else "self" if _same_sequence(a, b) else "cross"
    return "self"


def _is_learned(value: Any) -> bool:
    """A weight, perhaps repeated for every row of the batch."""
    while isinstance(value, fx.Node) and value.target in (aten.expand.default, aten.repeat.default):
        value = past_layout(value.args[0])
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _same_sequence(a: fx.Node, b: fx.Node) -> bool:
    """Whether one is computed from the other (keys of a reduced image, SegFormer), or both from one norm (low-rank queries, MLA)."""
    return b in _ancestors(a, 6) or a in _ancestors(b, 6) or any(is_norm(n) for n in _ancestors(a, 3) & _ancestors(b, 3))


def _ancestors(node: fx.Node, steps: int) -> set[fx.Node]:
    """The activations a few steps above a value, itself included."""
    found, level = {node}, [node]
    for _ in range(steps):
        level = [n for m in level for n in m.all_input_nodes if n.op == "call_function" and getattr(n.meta.get("val"), "is_floating_point", lambda: False)()]
        found.update(level)
    return found


def _above_bottleneck(value: Any) -> Any:
    """What a low-rank pair reads: x of linear_b(norm(linear_a(x))) (DeepSeek)."""
    node = past_layout(value)
    if isinstance(node, fx.Node) and node.target is ours.rms_norm.default:
        inner = past_layout(node.args[0])
        if isinstance(inner, fx.Node) and is_projection(inner):
            return inner.args[0]
    return value


def _readers(node: fx.Node) -> tuple[fx.Node, ...]:
    """Down through layout ops with one reader each to the linear that reads them; several after a split over tokens (joint attention)."""
    for _ in range(_FAR):
        users = [u for u in node.users if u.target is not aten.sym_size.int]
        if users and all(u.target is aten.slice.Tensor for u in users):
            return tuple(dict.fromkeys(linear for u in users for linear in _readers(u)))
        if len(users) != 1:
            return ()
        node = users[0]
        if is_projection(node):
            return (node,)
        if node.target not in LAYOUT and not is_looked_through(node):
            return ()
    return ()
