"""What a graph costs before it runs: bytes moved, FLOPs and launches of every node, at the example sizes or given ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .feature_maps import named
from .graph import Graph
from .intermediates import intermediate_bytes, listed
from .nodes import arguments
from .ops import OPS
from .ops.linear_attention import CHUNK

aten = torch.ops.aten

VIEWS = {
    "reshape", "view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "unbind", "split", "split_with_sizes", "chunk",
    "getitem", "alias", "detach", "sym_size", "_assert_tensor_metadata", "diagonal", "unfold",
}  # fmt: skip
"""Ops that move no data by themselves."""

CAUSAL = "_causal"


@dataclass(frozen=True)
class Cost:
    """Of one node or a sum. A multiply-add is 2 FLOPs.

    `bytes` counts every operand read once and every result written once, and what attention without a kernel of its own copies on the way.
    """

    bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.bytes - other.bytes, self.flops - other.flops, self.launches - other.launches)


@dataclass(frozen=True)
class NodeCost:
    """One node's cost with what is needed to show it."""

    node: str
    op: str
    layer: str
    dtype: torch.dtype
    """Of the arithmetic: int8 or float8 for a product of two quantized operands, else the result's."""
    cost: Cost
    weight_bytes: int
    kind: str
    """What shares of a machine's peak are told apart by: the op, of attention one name for all forms, `CAUSAL` behind it where the call is."""


def op_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default and rewright.linear: the short name people use."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def node_costs(graph: Graph, sizes: Mapping[str, int] | None = None) -> Iterator[NodeCost]:
    """The cost of every call in order. `sizes`: dim name -> size, default the example's."""
    size = sizer(graph, sizes)
    for node in graph.nodes:
        results = list(_tensors(node.meta.get("val")))
        name = op_name(node)
        if not results or name in VIEWS:
            continue
        written = sum(numel(t, size) * t.element_size() for t in results)
        read = sum(numel(t, size) * t.element_size() for n in node.all_input_nodes for t in _tensors(n.meta.get("val")))
        if name.startswith("embedding"):  # reads the rows it returns, not the tables
            given = arguments(node)
            ids = given["ids" if "ids" in given else "indices"]
            tables = [t.meta["val"] for t in node.all_input_nodes if t is not ids]
            rows = sum(numel(t, size) // size(t.shape[0]) * t.element_size() for t in tables)
            read = numel(ids.meta["val"], size) * (rows + ids.meta["val"].element_size())
        read += intermediate_bytes(node, name, size)
        weights = sum(graph.weight(n).nbytes for n in node.all_input_nodes if graph.is_weight(n))
        dtype = torch.int8 if arguments(node).get("activations", "none") != "none" else _ARITHMETIC.get(name, results[0].dtype)
        found = Cost(read + written, _flops(node, name, results, size), _LAUNCHES.get(name, 1))
        yield NodeCost(node.name, name, node.meta.get("path", ""), dtype, found, weights, _kind(node, name))


def _kind(node: fx.Node, name: str) -> str:
    kind, a = "attention" if name in _QKV else name, arguments(node)
    return kind + CAUSAL if a.get("causal") or a.get("is_causal") else kind


def is_kind(kind: str) -> bool:
    """Whether a call can be of that kind (`NodeCost.kind`)."""
    name = kind.removesuffix(CAUSAL)
    return name == "attention" or name not in _QKV and (name in OPS or hasattr(aten, name))


def cost(graph: Graph, sizes: Mapping[str, int] | None = None) -> Cost:
    """The sum over all nodes."""
    return sum((c.cost for c in node_costs(graph, sizes)), Cost())


def _flops(node: fx.Node, name: str, results: list[Tensor], size: Any) -> int:
    out = numel(results[0], size)
    operands = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    match name:
        case "linear" | "linear_nbits" | "linear_int8_dynamic" | "linear_int8_static" | "linear_token" | "linear_fp8" | "ternary_linear":
            return 2 * out * size(operands[0].shape[-1])
        case "shift_linear" | "shift_linear_q" | "shift_linear_ps":  # of float activations: its terms are added up first
            terms = 1 if arguments(node)["activations"] == "none" else terms_of(node)
            return 2 * out * size(operands[0].shape[-1]) * terms
        case "shift_add_attention":
            q, conv = (arguments(node)[n].meta["val"] for n in ("q", "conv"))
            return out * (4 * size(q.shape[-1]) + 2 * size(conv.shape[-1]) + 8)
        case "block_dense_linear" | "block_shuffle_linear":
            x, first, second = operands[:3]
            return 2 * numel(x, size) // size(x.shape[-1]) * (first.numel() + second.numel())
        case "mm" | "bmm" | "matmul":
            return 2 * out * size(operands[0].shape[-1])
        case "addmm" | "baddbmm":
            return 2 * out * size(operands[1].shape[-1])
        case "conv1d" | "conv2d" | "conv3d" | "convolution":
            return 2 * out * math.prod(size(s) for s in operands[1].shape[1:])
        case "attention" | "scaled_dot_product_attention" | "multi_head_attention":
            q, k, v = (arguments(node)[n].meta["val"] for n in _QKV[name])
            return (
                2 * numel(q, size) * size(k.shape[-2]) + 2 * numel(q, size) // size(q.shape[-1]) * size(k.shape[-2]) * size(v.shape[-1])
                if q.dim() == 4
                else 4 * numel(q, size) * size(k.shape[-2])
            )
        case "linear_attention" | "linear_attention_step" | "hybrid_attention" | "hybrid_attention_step":
            return _linear_attention(node, name, size)
        case "feature_map":
            a = arguments(node)
            projected = 2 * numel(operands[0], size) * size(a["parameters"][0].meta["val"].shape[-2]) if named(a["kind"]).projected else 0
            return projected + 8 * out
        case "block_attention":
            return 2 * listed(node, size) * arguments(node)["block"]
        case "token_match" | "token_match_energy":
            a = arguments(node)
            batch, count, width = (size(s) for s in a["metric"].meta["val"].shape)
            n = count - size(a["prefix"])
            return 2 * batch * width * (n * n if name == "token_match_energy" else _candidates(a, n, size))
        case "softmax" | "_softmax" | "layer_norm" | "add_layer_norm" | "rms_norm" | "add_rms_norm" | "group_norm" | "gelu":
            return 8 * out
    return out if results[0].is_floating_point() else 0


def _linear_attention(node: fx.Node, name: str, size: Any) -> int:
    """A state a key head, or one a query head where each decays by its own; its denominators; the pairs of a chunk or of what is near."""
    a = arguments(node)
    of = {n: x.meta["val"].shape for n, x in a.items() if isinstance(x, fx.Node)}
    (batch, heads, queries, _), keys = (tuple(size(s) for s in of[n]) for n in ("q", "k"))
    dv = size(of["v"][-1])
    features = size(of.get("state", of.get("fq", of["q"]))[-2 if "state" in of else -1])
    state_heads = size(of["state"][1]) if "state" in of else size(of["decay"][-1 if len(of["decay"]) == 1 else 1]) if "decay" in of else keys[1]
    flops = 2 * features * dv * (queries * heads + keys[2] * state_heads)
    if a.get("normalize", "sum") == "sum":
        flops += 2 * features * queries * heads
    if name == "hybrid_attention":
        flops += 2 * queries * min(a["window"] * (2 if a["causal"] else 3), queries) * (size(of["q"][-1]) + dv) * heads
    elif name == "hybrid_attention_step":
        flops += 2 * size(of["keys"][2]) * (size(of["q"][-1]) + dv) * heads
    elif a.get("causal"):
        flops += 2 * queries * CHUNK * (features + dv) * heads
    return batch * flops


def terms_of(node: fx.Node) -> int:
    """Power-of-two terms of shift_linear or one of its trained forms."""
    given = arguments(node)
    return int(given["scale" if "scale" in given else "largest"].meta["val"].shape[0])


def _candidates(a: Mapping[str, Any], n: int, size: Any) -> int:
    """Pairs of a candidate and a target; n tokens are dealt out in turn where none are given."""
    given = [a[name] for name in ("candidates", "targets")]
    return (n + 1) // 2 * (n // 2) if None in given else math.prod(size(t.meta["val"].shape[0]) for t in given)


_ARITHMETIC = {
    "linear_int8_dynamic": torch.int8,
    "linear_int8_static": torch.int8,
    "linear_token": torch.int8,
    "linear_fp8": torch.float8_e4m3fn,
}
"""Dtype of the product where it is not the result's."""

_LAUNCHES = {
    "block_attention": 20,
    "feature_map": 3,
    "hybrid_attention": 30,
    "hybrid_attention_step": 40,
    "linear_attention": 6,
    "linear_attention_step": 10,
    "shift_add_attention": 14,
    "token_match": 20,
    "token_match_energy": 30,
    "token_merge": 15,
    "token_places": 6,
    "token_take": 4,
}
"""Calls that ops of ours take in every backend we have, where they are several."""

_QKV = {"attention": ("q", "k", "v"), "multi_head_attention": ("q", "k", "v"), "scaled_dot_product_attention": ("query", "key", "value")}


def sizer(graph: Graph, sizes: Mapping[str, int] | None) -> Any:
    """What makes an int of a size that may be symbolic, at these sizes."""
    if not sizes:
        return graph.size
    values = {graph.symbols[name].node.expr: n for name, n in sizes.items()}

    def size(value: Any) -> int:
        if isinstance(value, torch.SymInt):
            expression = value.node.expr.subs(values)
            return int(expression) if expression.is_number else graph.size(value)
        return int(value)

    return size


def numel(tensor: Tensor, size: Any) -> int:
    """The number of a tensor's values, at the sizes of a `sizer`."""
    return math.prod(size(s) for s in tensor.shape)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)
