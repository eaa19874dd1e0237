"""Feed-forward blocks: plain, gated, with a fused gate, as 1x1 convolutions, as experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ..evaluate import is_size, op_name
from ..graph import Graph
from ..nodes import is_looked_through, number
from .channel_constants import is_batch_norm
from .channel_tracer import ChannelTracer, Step
from .norms import norm_position
from .residual import Streams
from .vocabulary import (
    ACTIVATIONS,
    CHANNEL_NORMS,
    FUSED_NORMS,
    LAST_AXIS_NORMS,
    LAYOUT,
    SQUARES,
    aten,
    common_path,
    expert_weight,
    input_axis,
    is_depthwise_convolution,
    is_grouped_product,
    is_linear,
    is_pointwise_convolution,
    is_projection,
    past_casts,
    past_layout,
    reads,
    shared_weights,
)

_FAR = 12
_MOST = 80  # nodes between a hidden value and the projection that makes it
_INSIDE = {"activation", "scale", "shift", "norm", "convolution"}


@dataclass(frozen=True)
class FFNBlock:
    """act(up(x)) -> down, or act(gate(x)) * up(x) -> down. A fused gate_up is both `gate` and `up`, told apart by their rows.

    The projections are linears, 1x1 convolutions, or grouped products with the 3-d weights of experts [experts, ...].
    up_rows, gate_rows: int64 [hidden], which output channel of `up` (`gate`) each hidden channel is.
    """

    up: fx.Node
    gate: fx.Node | None
    activation: fx.Node
    down: fx.Node
    width: int
    hidden: int
    layer: str
    why: tuple[str, ...] = ()
    up_rows: Tensor | None = None
    gate_rows: Tensor | None = None
    norm: str = ""
    """As in AttentionBlock."""
    residual: fx.Node | None = None
    """The addition that puts the result back into a residual stream; None: this MLP stands alone (a head, a time embedding)."""
    experts: int | None = None
    """How many experts share this block; None: it is dense."""
    top_k: int | None = None
    """Experts a token."""
    router: fx.Node | None = None
    """The linear whose scores choose the experts."""
    shared: bool = False
    """Whether it runs for every token beside experts."""

    @property
    def kind(self) -> str:
        """ "plain", "gated" or "fused gated"."""
        return "plain" if self.gate is None else "fused gated" if self.gate is self.up else "gated"

    @property
    def act(self) -> str:
        """The activation's name."""
        return _name(self.activation)

    @property
    def residual_terms(self) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """(what `residual` adds to, what it adds, their sum), or None."""
        branch = self.down
        for _ in range(_FAR):
            if self.residual in branch.users:
                first, second = self.residual.args[:2]
                start: Any = first if second is branch else second
                total: Any = self.residual
                if total.target in FUSED_NORMS:  # the normed sum comes first
                    total = next((u for u in total.users if u.args[1] == 1), None)
                return None if total is None else (start, branch, total)
            branch = next((u for u in branch.users if not is_size(u)), None)
            if branch is None:
                return None
        return None

    def __str__(self) -> str:
        parts = [f"{self.width} -> {self.hidden}, {self.act}"]
        if self.experts is not None:
            parts.append(f"{self.experts} experts" + (f", {self.top_k} a token" if self.top_k else ""))
        if is_pointwise_convolution(self.up):
            parts.append("as 1x1 convolutions")
        return ", ".join(parts)


def ffn_blocks(graph: Graph, streams: Streams | None = None) -> list[FFNBlock]:
    """Every feed-forward block, in graph order of its down projection."""
    streams = streams or Streams(graph)
    found = [block for node in graph.nodes if is_projection(node) and (block := _ffn_block(graph, node, streams)) is not None]
    routed = {_source(b.up) for b in found if b.experts is not None}
    return [replace(b, shared=True) if b.experts is None and _source(b.up) in routed else b for b in found]


def _ffn_block(graph: Graph, down: fx.Node, streams: Streams) -> FFNBlock | None:
    inner = _inner(graph, past_casts(reads(down)))
    if inner is None:
        return None
    axis = input_axis(down)
    pair = _gated(inner)
    if pair is None:
        found = _branch(graph, past_casts(reads(down)), axis)
        if found is None or not (acts := [s.node for s in found[2] if s.kind == "activation"]):
            return None
        up, rows, steps = found
        gate, gate_rows, activation = None, None, next((a for a in reversed(acts) if a.target not in SQUARES), acts[-1])
    else:
        activation, other = pair
        a, b = _branch(graph, activation, axis), _branch(graph, other, axis)
        if a is None or b is None or past_layout(reads(a[0])) is not past_layout(reads(b[0])):
            return None
        gate, gate_rows, steps = a
        up, rows = b[0], b[1]
        steps = (*steps, *b[2])
    if up is down or any(s.kind not in _INSIDE for s in steps) or past_casts(reads(up)) is down:
        return None
    return _block(graph, streams, (up, gate, down), activation, (rows, gate_rows), steps)


def _block(
    graph: Graph,
    streams: Streams,
    projections: tuple[fx.Node, fx.Node | None, fx.Node],
    activation: fx.Node,
    rows: tuple[Tensor, Tensor | None],
    steps: tuple[Step, ...],
) -> FFNBlock | None:
    up, gate, down = projections
    most = 2 if gate is up else 1
    inner = [("up projection", up), ("gate projection", gate), ("activation", activation)]
    why = [f"the {what}'s result has {len(n.users)} readers" for what, n in inner if n is not None and len(n.users) > most]
    if any(s.kind == "convolution" for s in steps):
        why.append("a depthwise convolution stands between the projections")
    if any(s.kind == "norm" and s.node.target in LAST_AXIS_NORMS for s in steps):
        why.append("a norm over the hidden channels stands before the down projection")
    why += shared_weights(up, gate, down)
    axis = input_axis(up)
    if axis == -1 and _turned(reads(up)):
        why.append("its channels are the tokens (an MLP-Mixer)")
    width = int(reads(up).meta["val"].shape[axis])
    norm, residual = norm_position(streams, reads(up), down)
    if (stream := streams.of(residual)) is None or any(source.node is down for source in stream.sources):
        residual = None  # a time embedding is added to another one, and depends on no stream
    if residual is None and why:
        return None  # part of something else: a state-space mixer, a squeeze-and-excitation
    experts = expert_weight(up) if is_grouped_product(up) else None
    router, top_k = _router(up) if experts is not None else (None, None)
    return FFNBlock(
        up=up,
        gate=gate,
        activation=activation,
        down=down,
        width=width,
        hidden=len(rows[0]),
        layer=common_path(up, down),
        why=tuple(why),
        up_rows=rows[0],
        gate_rows=rows[1],
        norm=norm,
        residual=residual,
        experts=None if experts is None else int(experts.meta["val"].shape[0]),
        top_k=top_k,
        router=router,
    )


def _turned(value: Any) -> bool:
    """Whether a permute between a norm and a linear puts another axis last."""
    for _ in range(_FAR):
        if not isinstance(value, fx.Node) or value.target not in LAYOUT and not is_looked_through(value):
            return False
        if value.target is aten.permute.default and value.args[1][-1] != len(value.args[1]) - 1:  # type: ignore[index, arg-type]
            return past_layout(value).target in LAST_AXIS_NORMS
        value = value.args[0]
    return False


def _inner(graph: Graph, value: Any) -> fx.Node | None:
    """Up from the down projection through norms, layout, constants and depthwise convolutions to an activation or a product; None when there is none."""
    for _ in range(_FAR):
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return None
        if value.target in ACTIVATIONS or value.target in SQUARES:
            return value
        if value.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
            tensors = [a for a in value.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr" and number(graph, a) is None]
            if len(tensors) != 1:
                return value if value.target is aten.mul.Tensor else None
            value = past_casts(tensors[0])
        elif is_batch_norm(value):
            value = past_casts(value.args[0].args[0])  # type: ignore[union-attr]
        elif value.target in LAST_AXIS_NORMS or value.target in CHANNEL_NORMS or value.target in LAYOUT or is_depthwise_convolution(value):
            value = past_casts(value.args[0])
        else:
            return None
    return None


def _gated(inner: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the activated side, the other side) of a gate's product; None for x * act(x) and anything that is no product."""
    if inner.target is not aten.mul.Tensor:
        return None
    a, b = (past_casts(x) for x in inner.args[:2])
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return None
    for activation, other in ((a, b), (b, a)):
        if activation.target in ACTIVATIONS and past_casts(activation.args[0]) is not other:
            return activation, other
    return None


def _branch(graph: Graph, value: fx.Node, axis: int) -> tuple[fx.Node, Tensor, tuple[Step, ...]] | None:
    """(projection, its output channels, the steps between) for a hidden value, perhaps a part of a fused projection."""
    found = ChannelTracer(graph, most=_MOST).origin(value, (axis,))
    if isinstance(found, str) or bool((found.which != 0).any()) or len(found.producers) != 1 or not is_projection(found.producers[0]):
        return None
    return found.producers[0], found.channel, found.steps


def _name(activation: fx.Node) -> str:
    name = ACTIVATIONS.get(activation.target, op_name(activation))  # type: ignore[arg-type]
    squared = any(u.target in SQUARES and u.args[1:] in ((), (2,)) or u.target is aten.mul.Tensor and u.args[0] is u.args[1] for u in activation.users)
    return f"{name}^2" if squared else name


# -- experts --------------------------------------------------------------------------------------------------------


def _source(up: fx.Node) -> Any:
    """What a block reads, before its tokens are handed out to experts."""
    value = past_layout(reads(up))
    while isinstance(value, fx.Node) and value.target in (aten.index.Tensor, aten.index_select.default, aten.expand.default, aten.repeat_interleave.self_int):
        value = past_layout(value.args[0])
    return value


def _router(up: fx.Node) -> tuple[fx.Node | None, int | None]:
    """(the linear whose scores choose the experts, how many a token takes), by walking up the integers that order the tokens."""
    work, seen, k = [n for n in up.all_input_nodes if n.op == "call_function"], set(), None
    for _ in range(400):
        if not work:
            break
        node = work.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.topk.default and k is None:
            k, work = int(node.args[1]), []  # type: ignore[call-overload, arg-type]
        if k is not None and is_linear(node):
            return node, k
        floats = k is not None
        work += [n for n in node.all_input_nodes if n.op == "call_function" and (floats or not _is_activation(n))]
    return None, k


def _is_activation(node: fx.Node) -> bool:
    """A float value of the model; the order of the tokens is made of integers (but counted by histc in float)."""
    value = node.meta.get("val")
    return is_projection(node) or node.target in LAST_AXIS_NORMS or getattr(value, "dim", lambda: 0)() > 1 and value.is_floating_point()  # type: ignore[union-attr]
