"""Bytes counted for attention without a kernel are those its meaning moves when it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewright.ir.capture import capture
from rewright.ir.cost import VIEWS, node_costs
from rewright.ir.feature_maps import KINDS, initial
from rewright.ir.intermediates import PASSES

torch.set_num_threads(1)
ours = torch.ops.rewright
CLOSE = 0.25
"""Relative: small sums, and the copies that only some backends make, are not counted one by one."""


class Moved(TorchDispatchMode):
    """Bytes of the operands and results of every op that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] not in {*VIEWS, "_unsafe_view"}:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        return result


class Layer(nn.Module):
    def __init__(self, op: str, heads: int, kind: str = "", **options: Any) -> None:
        super().__init__()
        self.op, self.kind, self.options = op, kind, options
        self.parameters_of = nn.ParameterList(initial(kind, heads, 64) if kind else [])
        self.gamma = nn.Parameter(torch.ones(heads))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor) -> Tensor:
        if self.op == "feature_map":
            return ours.feature_map(q, list(self.parameters_of), self.kind, **self.options)
        if self.op == "hybrid_attention":
            return ours.hybrid_attention(q, k, v, fq, fk, self.gamma, **self.options)
        return ours.linear_attention(fq, fk, v, **self.options)


def given(heads: int = 4, kv_heads: int = 4, tokens: int = 512, features: int = 64, width: int = 64) -> tuple[Tensor, ...]:
    shapes = (heads, 64), (kv_heads, 64), (kv_heads, width), (heads, features), (kv_heads, features)
    return tuple(torch.rand(1, h, tokens, d) for h, d in shapes)


def both(layer: Layer, tensors: tuple[Tensor, ...]) -> tuple[int, int]:
    """Bytes counted and bytes moved."""
    with torch.no_grad(), Moved() as moved:
        layer(*tensors)
    (found,) = [c for c in node_costs(capture(layer, tensors, dynamic_shapes={})) if c.op == layer.op]
    return found.cost.bytes, moved.bytes


WIDE: dict[str, Any] = {"features": 256, "width": 32}
PAIRS: dict[str, Any] = {"features": 4, "width": 4, "tokens": 1024}
STATES: dict[str, Any] = {"features": 256, "width": 256}
"""Shapes at which one term or another is most of the sum."""


@pytest.mark.parametrize("shapes", [{}, WIDE, PAIRS, STATES, {"features": 16, "width": 128}], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_linear_attention_moves_what_is_counted(options: dict[str, Any], shapes: dict[str, Any]) -> None:
    counted, moved = both(Layer("linear_attention", 4, **options), given(**shapes))
    assert counted == pytest.approx(moved, rel=CLOSE)


@pytest.mark.parametrize("shapes", [{}, PAIRS, STATES], ids=str)
@pytest.mark.parametrize("options", [{"window": w, "causal": c} for w in (32, 128) for c in (False, True)], ids=str)
def test_hybrid_attention_moves_what_is_counted(options: dict[str, Any], shapes: dict[str, Any]) -> None:
    counted, moved = both(Layer("hybrid_attention", 4, **options), given(**shapes))
    assert counted == pytest.approx(moved, rel=CLOSE)


@pytest.mark.parametrize("shapes", [{}, WIDE, STATES], ids=str)
@pytest.mark.parametrize("op", ["linear_attention", "hybrid_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_key_heads_that_are_shared_are_counted_once(op: str, causal: bool, shapes: dict[str, Any]) -> None:
    counted, moved = both(Layer(op, 8, causal=causal), given(8, 1, **shapes))
    assert counted == pytest.approx(moved, rel=CLOSE)


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_map_moves_what_is_counted(kind: str, query: bool) -> None:
    counted, moved = both(Layer("feature_map", 4, kind, query=query), given())
    assert counted == pytest.approx(moved, rel=CLOSE)


def test_every_feature_map_says_how_often_it_writes_its_features() -> None:
    assert set(PASSES) == set(KINDS)


def test_half_precision_is_computed_in_float32_and_counted_so() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = tuple(t.to(dtype) for t in given(tokens=128))
        layer = Layer("linear_attention", 4)
        (cost,) = [c for c in node_costs(capture(layer, tensors, dynamic_shapes={})) if c.op == "linear_attention"]
        found.append(cost.cost.bytes - 4 * tensors[0].nbytes)
    assert found[0] == found[1] and found[2] == 2 * found[0]


def test_block_attention_copies_the_blocks_it_sees_and_passes_over_their_scores() -> None:
    """8 blocks of 8 queries see 2 blocks of keys each: 4 heads * 8 * 16 keys of 8 + 8 channels, and 8 scores for each of those keys."""

    class Blocks(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
            return ours.block_attention(q, k, v, blocks, 8)

    q, k, v = torch.rand(3, 1, 4, 64, 8).unbind(0)
    blocks = torch.arange(8)[None, :, None].repeat(4, 1, 2)
    (found,) = [c for c in node_costs(capture(Blocks(), (q, k, v, blocks), dynamic_shapes={})) if c.op == "block_attention"]
    keys = 4 * 8 * 16
    assert found.cost.bytes == 4 * q.nbytes + blocks.nbytes + (2 * keys * 16 + 6 * keys * 8) * 4
    assert found.cost.flops == 2 * keys * 8 * 16
