"""From how many tokens on linear attention is predicted to be faster than softmax attention: both by the cost model every pass is judged by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401
from .capture import capture
from .feature_maps import initial
from .graph import Graph

ours = torch.ops.rewright

Predict = Callable[..., float]
"""(graph, sizes) -> predicted seconds, as passes have it in `context.predict`."""

MOST = 2**17

EXAMPLE = 1009
"""Tokens of the traced example; costs are asked for at others. A prime: whole chunks or windows are a case of their own."""


class Attention(TypedDict, total=False):
    """What the two are compared for. kv_heads: default heads; value_dim: default head_dim; features: default the map's own number (elu1).

    window: above 0 softmax attention within that window stands beside the linear one (`hybrid_attention`).
    """

    heads: Required[int]
    head_dim: Required[int]
    kv_heads: int | None
    value_dim: int | None
    feature_map: str
    features: int | None
    causal: bool
    window: int
    batch: int
    dtype: torch.dtype


def crossover(predict: Predict, *, most: int = MOST, **attention: Unpack[Attention]) -> int | None:
    """The number of tokens from which linear attention, its feature maps included, is predicted faster than softmax attention; None: not at `most`.

    A prediction, of the roofline behind `predict` and no better than that; kept for each predict and attention.
    """
    return _crossover(predict, most, *sorted(attention.items()))


def times(predict: Predict, tokens: int, **attention: Unpack[Attention]) -> tuple[float, float]:
    """Predicted seconds of softmax attention and of linear attention over that many tokens."""
    softmax, linear = _programs(**dict(sorted(attention.items())))  # type: ignore[arg-type]  # one order: the cache looks at it
    return predict(softmax, {"tokens": tokens}), predict(linear, {"tokens": tokens})


@functools.lru_cache(maxsize=256)
def _crossover(predict: Predict, most: int, *attention: tuple[str, object]) -> int | None:
    softmax, linear = _programs(**dict(attention))  # type: ignore[arg-type]

    def faster(tokens: int) -> bool:
        return predict(linear, {"tokens": tokens}) < predict(softmax, {"tokens": tokens})

    if not faster(most):
        return None
    low, high = most // 2, most
    while low and faster(low):  # the last crossing counts, should there be several
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=64)
def _programs(
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    feature_map: str = "elu1",
    features: int | None = None,
    causal: bool = False,
    window: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Graph, Graph]:
    """Softmax and linear attention over any number of tokens, without weights; the second is made of the first, as a pass would."""
    kv_heads = kv_heads or heads
    softmax = _softmax(batch, heads, kv_heads, head_dim, value_dim or head_dim, causal, dtype)
    linear = softmax.draft()
    (attention,) = linear.find(ours.attention.default)
    q, k, v = attention.args[:3]

    def features_of(x: object, heads: int, query: bool) -> object:
        given = [linear.add_constant("map", p.to("meta", dtype)) for p in initial(feature_map, heads, head_dim, features=features)]
        return linear.insert(ours.feature_map.default, x, given, feature_map, query, before=attention)

    mapped = features_of(q, heads, True), features_of(k, kv_heads, False)
    if window:
        gamma = linear.add_constant("gamma", torch.empty(heads, dtype=dtype, device="meta"))
        new = linear.insert(ours.hybrid_attention.default, q, k, v, *mapped, gamma, None, window, causal, before=attention)
    else:
        new = linear.insert(ours.linear_attention.default, *mapped, v, None, causal, before=attention)
    attention.replace_all_uses_with(new, propagate_meta=False)
    linear.fx.erase_node(attention)
    return softmax, linear


@functools.lru_cache(maxsize=64)
def _softmax(batch: int, heads: int, kv_heads: int, head_dim: int, value_dim: int, causal: bool, dtype: torch.dtype) -> Graph:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ours.attention(q, k, v, None, causal)

    shapes = (batch, heads, EXAMPLE, head_dim), (batch, kv_heads, EXAMPLE, head_dim), (batch, kv_heads, EXAMPLE, value_dim)
    given = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return capture(Attend(), given, dynamic_shapes={name: {2: "tokens"} for name in "qkv"})
