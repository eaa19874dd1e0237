"""Channel maps: which channel of a producer each channel of a consumer is, checked by scaling one and unscaling the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks import attention_blocks, channel_map, ffn_blocks, origin
from rewright.ir.blocks.channels import ChannelMap
from rewright.ir.graph import Graph

from .block_models import Attention, Block, blocks_of, canonical, usual

torch.set_num_threads(1)
IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1)), torch.ones(2, 6, dtype=torch.long)


def _migrates(graph: Graph, found: ChannelMap, consumer) -> float:
    """Error after each producer channel is scaled by its own factor and each consumer column by the inverse of its channel's."""
    before = graph(*IDS).detach()
    factor = torch.rand(found.producer.meta["val"].shape[-1], generator=torch.Generator().manual_seed(2)) + 0.5
    used = torch.zeros(len(factor), dtype=torch.bool)
    used[found.index[found.index >= 0]] = True
    factor = torch.where(used, factor, torch.ones(()))  # rows that feed somebody else stay
    weights = [graph.weight(w) for w in (*found.producer.args[1:3], consumer.args[1])]  # type: ignore[arg-type]
    saved = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w in weights[:-1]:
            w.mul_(factor.view(-1, *[1] * (w.dim() - 1)))
        weights[-1].div_(torch.where(found.index >= 0, factor[found.index], torch.ones(())))
        after = graph(*IDS).detach()
        for w, old in zip(weights, saved):
            w.copy_(old)
    return float((after - before).abs().max())


@pytest.mark.parametrize(("kv", "fused"), [(4, ""), (2, ""), (1, ""), (4, "thirds"), (4, "heads")])
def test_v_reaches_the_out_projection_head_by_head(kv: int, fused: str) -> None:
    graph = usual(kv=kv, fused=fused)
    (block,) = attention_blocks(graph)
    assert block.v is not None
    assert block.out is not None
    found = channel_map(graph, block.v, block.out.args[0])  # type: ignore[arg-type]
    assert isinstance(found, ChannelMap)
    assert [s.kind for s in found.steps] == ["attention"]
    assert block.to_v.rows is not None
    assert torch.equal(found.index.view(4, 8), block.to_v.rows.repeat_interleave(4 // kv, 0))
    assert _migrates(graph, found, block.out) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_up_reaches_down_through_the_gate(fused: bool) -> None:
    if fused:
        graph = usual(ffn="fused gated")
        (block,) = ffn_blocks(graph)
        found = channel_map(graph, block.up, block.down.args[0])  # type: ignore[arg-type]
        assert found == f"{block.down.args[0]} combines different channels of {block.up.name}"
        return
    graph = usual(ffn="gated")
    (block,) = ffn_blocks(graph)
    found = channel_map(graph, block.up, block.down.args[0])  # type: ignore[arg-type]
    assert isinstance(found, ChannelMap)
    assert [s.kind for s in found.steps] == ["times"]
    assert torch.equal(found.index, torch.arange(64))
    assert _migrates(graph, found, block.down) < 1e-5
    gate = channel_map(graph, block.gate, block.down.args[0])  # type: ignore[arg-type]
    assert isinstance(gate, ChannelMap)
    assert [s.kind for s in gate.steps] == ["activation", "times"]  # the caller sees that no scale passes


def test_queries_only_weigh() -> None:
    graph = usual()
    (block,) = attention_blocks(graph)
    found = channel_map(graph, block.q, block.out.args[0])  # type: ignore[arg-type, union-attr]
    assert found == f"{block.attention.name} only weighs with {block.attention.args[0]}"


def test_a_linear_between_mixes_all_channels() -> None:
    graph = usual()
    (attention,), (ffn,) = attention_blocks(graph), ffn_blocks(graph)
    found = channel_map(graph, attention.v, ffn.up.args[0])  # type: ignore[arg-type]
    assert found == f"{attention.out.name} mixes the channels of {attention.v.name}"  # type: ignore[union-attr]


def test_the_residual_stream_shows_as_an_addition() -> None:
    graph = usual()
    (attention,), (ffn,) = attention_blocks(graph), ffn_blocks(graph)
    found = channel_map(graph, attention.out, ffn.up.args[0])  # type: ignore[arg-type]
    assert isinstance(found, ChannelMap)
    assert [s.kind for s in found.steps] == ["add", "norm"]
    assert torch.equal(found.index, torch.arange(32))


def test_parts_joined_from_several_producers_say_minus_one_elsewhere() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 8), nn.Linear(32, 16), nn.Linear(24, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.b(x).flip(-1), self.a(x)], -1))

    graph = blocks_of(Block("pre-norm", Attention(), Joined()))
    a, b, c = (next(n for n in graph.nodes if n.meta["path"].endswith(f"ffn.{leaf}")) for leaf in "abc")
    first, second = (channel_map(graph, p, c.args[0]) for p in (a, b))  # type: ignore[arg-type]
    assert isinstance(first, ChannelMap)
    assert isinstance(second, ChannelMap)
    assert first.index.tolist() == [-1] * 16 + list(range(8))
    assert second.index.tolist() == [*reversed(range(16)), *[-1] * 8]
    both = origin(graph, c.args[0])  # type: ignore[arg-type]
    assert not isinstance(both, str)
    assert both.producers == (b, a)  # in graph order
    assert both.which.tolist() == [0] * 16 + [1] * 8


def test_a_depthwise_convolution_keeps_channels_apart() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.deep, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.gelu(self.deep(self.one(x))))

    graph = canonical(Depthwise(), torch.randn(2, 3, 6, 6))
    one, _, two = graph.find(torch.ops.aten.conv2d.default)
    found = channel_map(graph, one, two.args[0], axis=1)  # type: ignore[arg-type]
    assert isinstance(found, ChannelMap)
    assert torch.equal(found.index, torch.arange(8))
    assert [s.kind for s in found.steps] == ["convolution", "activation"]


def test_channels_that_differ_from_token_to_token_are_refused() -> None:
    class Staggered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    graph = canonical(Staggered(), torch.randn(2, 3, 4))
    last = graph.find(torch.ops.aten.linear.default)[-1]
    assert origin(graph, last.args[0]) == f"the channels of {last.args[0]} differ from place to place"  # type: ignore[arg-type]


def test_a_sum_over_everything_is_one_number_without_channels() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * torch.sin(x.sum()))

    graph = canonical(Model(), torch.randn(2, 8))
    (linear,) = graph.find(torch.ops.aten.linear.default)
    assert origin(graph, linear.args[0]) == "no channel of mul comes from a projection"  # type: ignore[arg-type]
