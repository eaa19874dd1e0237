"""What ops without a kernel of their own write and read again on the way: for some of them it is most of their memory traffic.

Counted from their meanings, which is how every backend runs them; numbers of values, of float32 at least where it is not said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .nodes import arguments
from .ops.linear_attention import CHUNK

PASSES = {
    "elu1": 2,
    "relu": 1,
    "exp": 2,
    "taylor2": 3,
    "performer": 5,
    "t2r": 3,
    "hedgehog_softmax": 4,
    "hedgehog_exp": 4,
    "focused": 7,
    "nala": 4,
}
"""How many times a feature map writes all its features, the last time counted."""

OPS = ("feature_map", "linear_attention", "hybrid_attention", "block_attention")


def intermediate_bytes(node: fx.Node, name: str, size: Callable[[Any], int]) -> int:
    """Bytes written and read between the operands and the result of one of `OPS`, beyond those two; 0 for any other op."""
    if name not in OPS:
        return 0
    a = arguments(node)
    if name == "block_attention":
        return _blocks(node, size) * node.meta["val"].element_size()
    found = {n: tuple(size(s) for s in x.meta["val"].shape) for n, x in a.items() if isinstance(x, fx.Node)}
    if name == "feature_map":
        of = node.meta["val"]
        values = 2 * (PASSES[a["kind"]] - 1) * math.prod(size(s) for s in of.shape)
    else:
        of = a["v"].meta["val"]
        values = _hybrid(found, a) if name == "hybrid_attention" else _causal(found) if a["causal"] else _bidirectional(found)
    return values * max(of.element_size(), torch.float32.itemsize)


def listed(node: fx.Node, size: Callable[[Any], int]) -> int:
    """Numbers in the keys and values that block_attention's queries see, each block of queries by itself."""
    a = arguments(node)
    q, v, blocks = (a[n].meta["val"] for n in ("q", "v", "blocks"))
    batch, heads, tokens, width = (size(s) for s in q.shape)
    count = -(-tokens // a["block"])
    return batch * heads * count * min(int(blocks.shape[2]), count) * a["block"] * (width + size(v.shape[-1]))


def _blocks(node: fx.Node, size: Callable[[Any], int]) -> int:
    """The listed blocks are copied; their scores are written, masked, normalised and read again. In the inputs' dtype."""
    a, values = arguments(node), listed(node, size)
    width = sum(size(a[n].meta["val"].shape[-1]) for n in "qv")
    return 2 * values + 6 * values // width * a["block"]


def _bidirectional(of: Mapping[str, tuple[int, ...]]) -> int:
    """Keys are read again for their sum, values for theirs, queries for the denominators; two terms, a sum and a quotient of results."""
    (b, h, n, features), (_, hk, m, dv) = of["q"], of["v"]
    return b * (hk * m * features + hk * m * dv + h * n * features + 4 * h * n * dv)


def _causal(of: Mapping[str, tuple[int, ...]]) -> int:
    """All are padded twice; pairs of a chunk are written, masked and read twice; states are written, added up, shifted and read."""
    (b, h, n, features), (_, hk, _, dv) = of["q"], of["v"]
    states = 6 * hk * features * dv // CHUNK
    rows = 6 * h if h == hk else 8 * h  # put beside each other where they share a key head
    return b * n * ((rows + 6 * hk) * features + (4 * hk + 7 * h) * dv + 5 * h * CHUNK + states)


def _hybrid(of: Mapping[str, tuple[int, ...]], a: Mapping[str, Any]) -> int:
    """As causal; the scores of what is near are masked, shifted, exponentiated and weighted, each block beside its neighbours, states of both sides."""
    (b, h, n, d), (_, hk, _, dv), features, window = of["q"], of["v"], of["fq"][-1], a["window"]
    blocks, sides = (2, 6) if a["causal"] else (3, 17)
    near = min(blocks * window, max(n, window))
    scores = (14 * h + (6 * h // hk if a["causal"] and h != hk else 0)) * near  # heads that share a key head have a mask each
    beside = (5 * blocks - 2) * hk * (d + dv)
    states = sides * hk * features * dv // window
    return b * n * (scores + beside + states + 2 * h * d + 2 * hk * (d + dv) + (4 * h + 6 * hk) * features + 8 * h * dv)
