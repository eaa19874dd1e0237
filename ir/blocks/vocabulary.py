"""What kinds of nodes the structural questions tell apart: projections, norms, activations, layout ops, sums."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import op_name
from ..nodes import CASTS, argument, arguments, is_looked_through

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
    aten.elu.default: "elu",
    aten.leaky_relu.default: "leaky_relu",
    aten.relu6.default: "relu6",
    aten.hardtanh.default: "hardtanh",
    aten.softplus.default: "softplus",
    ours.quick_gelu.default: "quick_gelu",
}
SQUARES = (aten.pow.Tensor_Scalar, aten.square.default)
SCALED_CODES = (ours.linear_int8_dynamic.default, ours.linear_int8_static.default, ours.linear_token.default, ours.linear_fp8.default)
"""Linears on codes [out, in] with one scale [out] an output channel."""
DEQUANTIZABLE = (*SCALED_CODES, ours.linear_nbits.default)
QUANTIZED_LINEARS = (
    *DEQUANTIZABLE,
    ours.shift_linear.default,
    ours.shift_linear_q.default,
    ours.shift_linear_ps.default,
    ours.ternary_linear.default,
)
"""Linears on codes: blocks have them as projections, no edit changes their weights."""
BLOCK_LINEARS = (ours.block_dense_linear.default, ours.block_shuffle_linear.default)
"""Linears whose matrix is a product: blocks have them as projections, no edit changes their weights."""
LINEARS = (aten.linear.default, *QUANTIZED_LINEARS, *BLOCK_LINEARS)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
FUSED_NORMS = (ours.add_layer_norm.default, ours.add_rms_norm.default)
LAST_AXIS_NORMS = (aten.layer_norm.default, ours.rms_norm.default, aten.rms_norm.default)
CHANNEL_NORMS = (aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default)
NORMS = (*LAST_AXIS_NORMS, *FUSED_NORMS)
LAYOUT = (
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.clone.default,
    aten.contiguous.default,
)
"""Ops that keep every element and only move it."""
PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
MOVES = (
    *LAYOUT,
    *PARTS,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.cat.default,
    aten.stack.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.flip.default,
    aten.roll.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.slice_scatter.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
)
"""Ops whose result holds elements of their operands, chosen without looking at values."""
SUMS = (aten.add.Tensor, *FUSED_NORMS)
_POINTWISE = {
    "hardswish",
    "quick_gelu",
    "masked_fill",
    "where",
    "__and__",
    "__or__",
    "dropout",
    "copy",
    "floor_divide",
    "bitwise_not",
    "silu_",
    "fake_quantize",
}


def is_linear(node: Any) -> bool:
    """A linear layer: dense, quantized or a product of blocks."""
    return isinstance(node, fx.Node) and node.target in LINEARS


def is_pointwise_convolution(node: Any) -> bool:
    """A convolution with a kernel of one element, no groups, no stride: a linear layer over channels."""
    if not isinstance(node, fx.Node) or node.target not in CONVOLUTIONS or argument(node, "groups") != 1:
        return False
    weight: Any = node.args[1]
    return all(int(k) == 1 for k in weight.meta["val"].shape[2:]) and all(s == 1 for s in _ints(argument(node, "stride")))


def is_depthwise_convolution(node: fx.Node) -> bool:
    """A convolution that keeps channels apart: as many groups as channels."""
    if node.target not in CONVOLUTIONS:
        return False
    source: Any = node.args[0]
    return argument(node, "groups") > 1 and argument(node, "groups") == int(source.meta["val"].shape[1])


def is_grouped_product(node: Any) -> bool:
    """A product with one matrix of a 3-d weight [experts, in, out] a token: a grouped matmul, or a bmm with gathered weights."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return "grouped_mm" in op_name(node) or op_name(node) == "grouped_linear" or node.target is aten.bmm.default and expert_weight(node) is not None


def expert_weight(node: fx.Node) -> fx.Node | None:
    """The 3-d weight [experts, ...] behind an operand of a grouped product."""
    return next((w for operand in node.args[:2] if (w := _expert_weight(operand)) is not None), None)


def _expert_weight(operand: Any) -> fx.Node | None:
    """Through gathers, permutes and casts."""
    for _ in range(6):
        if not isinstance(operand, fx.Node) or operand.op == "get_attr":
            break
        if operand.target not in (aten.index.Tensor, aten.index_select.default, *LAYOUT) and not is_looked_through(operand):
            return None
        operand = operand.args[0]
    return operand if isinstance(operand, fx.Node) and operand.op == "get_attr" and operand.meta["val"].dim() == 3 else None


def _takes_columns(node: fx.Node) -> bool:
    """Whether a grouped product is W x with the tokens' channels along axis 1: the weight comes first."""
    return node.target is aten.bmm.default and _expert_weight(node.args[0]) is not None


def reads(projection: fx.Node) -> Any:
    """The value a projection takes its channels from."""
    return projection.args[1] if _takes_columns(projection) else projection.args[0]


def input_axis(projection: fx.Node) -> int:
    """The axis of that value that counts its channels."""
    return 1 if projection.target in CONVOLUTIONS or _takes_columns(projection) else -1


def is_projection(node: Any) -> bool:
    """What makes new channels of all old ones by weights: a linear, a 1x1 convolution, a grouped product."""
    return is_linear(node) or is_pointwise_convolution(node) or is_grouped_product(node)


def is_pointwise(node: fx.Node) -> bool:
    """An op whose result at each place depends on its operands at that place alone."""
    if node.target in CASTS or node.target in (operator.mul, operator.add):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and (torch.Tag.pointwise in node.target.tags or op_name(node) in _POINTWISE)


def is_sum(node: Any) -> bool:
    """An addition of two float tensors, both computed or looked up, or a norm fused with one."""
    if not isinstance(node, fx.Node) or node.target not in SUMS:
        return False
    return all(isinstance(a, fx.Node) and isinstance(v := a.meta.get("val"), Tensor) and v.is_floating_point() and v.dim() > 1 for a in node.args[:2])


def channel_axis(node: fx.Node) -> int:
    """The axis that counts the channels of a node's result: 1 after convolutions, channel norms and products W x, else the last."""
    return 1 if node.target in CONVOLUTIONS or node.target in CHANNEL_NORMS or _takes_columns(node) else -1


def is_normed(node: Any) -> bool:
    """Whether a node is the first item of a fused residual norm: the normed value."""
    return isinstance(node, fx.Node) and node.target is operator.getitem and node.args[0].target in FUSED_NORMS and node.args[1] == 0  # type: ignore[union-attr]


def is_norm(node: Any) -> bool:
    """Whether a node holds a norm's output."""
    return isinstance(node, fx.Node) and (node.target in LAST_AXIS_NORMS or node.target in CHANNEL_NORMS or is_normed(node))


def norm_output(norm: fx.Node) -> fx.Node:
    """The node that holds a norm's output: itself, or the first item of a fused residual norm."""
    return next((u for u in norm.users if is_normed(u)), norm)


def past_casts(node: Any) -> Any:
    """The value behind no-ops and dtype conversions."""
    while isinstance(node, fx.Node) and node.op == "call_function" and is_looked_through(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def past_layout(node: Any) -> Any:
    """The value behind no-ops, dtype conversions and layout ops, windows of an image included."""
    while isinstance(node, fx.Node) and node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
        if not is_looked_through(node) and node.target not in LAYOUT and node.target not in (aten.roll.default, aten.pad.default):
            break
        node = node.args[0]
    return node


def is_logits(output: Any) -> bool:
    """Whether an output is what a linear layer makes of several classes: numbers for a softmax, as far as can be told."""
    return is_linear(past_layout(output)) and int(output.meta["val"].shape[-1]) > 1


def shared_weights(*projections: fx.Node | None) -> list[str]:
    """Why editing the weights of these projections changes others too (ALBERT's layers are one): at most one sentence."""
    calls = max((len(w.users) for p in projections if p is not None and isinstance(w := _weight(p), fx.Node) and w.op == "get_attr"), default=1)
    return [f"its weights serve {calls} calls: an edit changes them all"] if calls > 1 else []


def _weight(projection: fx.Node) -> Any:
    return arguments(projection).get("w", projection.args[1])


def path_of(node: fx.Node) -> str:
    """The module a node came from, or its name."""
    return node.meta.get("path") or node.name


def without_floats(node: fx.Node) -> str:
    """Why the weights of a layer that holds codes can't be edited."""
    cure = " (dequantize-linear in front makes them one)" if node.target in DEQUANTIZABLE else ""
    return f"{path_of(node)} is {op_name(node)}, whose weights are not stored as a matrix of floats{cure}"


def common_path(a: fx.Node, b: fx.Node) -> str:
    """The module path two nodes share."""

    def parts() -> Iterator[str]:
        for x, y in zip(a.meta.get("path", "").split("."), b.meta.get("path", "").split(".")):
            if x != y:
                return
            yield x

    return ".".join(parts())


def _ints(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
