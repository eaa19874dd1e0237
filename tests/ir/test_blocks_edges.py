"""Edges: who reads a value, through what, who made it, and which of its channels are one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewright.ir.blocks import absorbers
from rewright.ir.blocks.absorbers import Absorber
from rewright.ir.blocks.channel_tracer import ChannelTracer
from rewright.ir.blocks.edges import Edge, edges
from rewright.ir.graph import Graph

from .block_models import Attention, Block, Gated, Plain, blocks_of, canonical, usual

torch.set_num_threads(1)


def layers(edge: Edge) -> list[str]:
    return [n.meta["path"].rpartition("layers.0.")[2] for n in edge.linears]


def sites(graph: Graph) -> list[str]:
    return [e.site for e in edges(graph)]


def into(found: tuple[Absorber, ...] | str) -> list[str]:
    assert not isinstance(found, str), found
    return [a.node.meta["path"].rpartition("layers.0.")[2] for a in found]


def test_a_pre_norm_block_has_four_edges() -> None:
    attention, out, up, down, head = edges(usual())
    assert [layers(e) for e in (attention, out, up, down)] == [["attention.q", "attention.k", "attention.v"], ["attention.o"], ["ffn.up"], ["ffn.down"]]
    assert [e.site for e in (attention, out, up, down, head)] == ["norm-linear", "value-output", "norm-linear", "hidden", "norm-linear"]
    assert [into(e.scale_into) for e in (attention, out, up)] == [["one"], ["attention.v"], ["two"]]
    assert not any(e.others for e in (attention, out, up, down, head))
    assert down.scale_into == "neither a factor nor a shift passes gelu"


def test_a_post_norm_feeds_its_linears_and_the_sum() -> None:
    edge = next(e for e in edges(usual("post-norm")) if layers(e) == ["ffn.up"])
    assert [str(o.target) for o in edge.others] == ["aten.add.Tensor"]
    (fork,) = edge.forks
    assert fork.value is edge.value
    assert (fork.to_linears, fork.to_others) == (edge.linears, edge.others)


def test_a_parallel_block_is_one_edge() -> None:
    edge = edges(usual("parallel"))[0]
    assert layers(edge) == ["attention.q", "attention.k", "attention.v", "ffn.up"]


def test_value_heads_tie_the_query_heads_they_serve() -> None:
    edge = next(e for e in edges(usual(kv=2)) if e.site == "value-output")
    assert torch.equal(edge.ties.view(4, 8), torch.arange(16).view(2, 8).repeat_interleave(2, 0))
    edge = next(e for e in edges(usual(kv=4)) if e.site == "value-output")
    assert torch.equal(edge.ties, torch.arange(32))


def test_fused_projections_name_the_rows_of_v() -> None:
    for fused, rows in (("thirds", torch.arange(64, 96)), ("heads", torch.arange(96).view(4, 24)[:, 16:].flatten())):
        edge = next(e for e in edges(usual(fused=fused)) if e.site == "value-output")
        assert not isinstance(edge.scale_into, str)
        (absorber,) = edge.scale_into
        assert torch.equal(absorber.index, rows)
        assert absorber.channels == 96


def test_a_gate_is_entered_on_the_side_that_is_not_activated() -> None:
    for ffn, rows in (("gated", torch.arange(64)), ("fused gated", torch.arange(64, 128))):
        edge = next(e for e in edges(usual(ffn=ffn)) if e.site == "up-down")
        assert into(edge.scale_into) == ["ffn.up"]
        assert not isinstance(edge.scale_into, str)
        assert torch.equal(edge.scale_into[0].index, rows)


def test_an_activated_side_is_left_alone_even_where_a_factor_would_pass() -> None:
    class ReGLU(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.gate(x)) * self.up(x))

    edge = next(e for e in edges(blocks_of(Block("pre-norm", Attention(), ReGLU()))) if e.site == "up-down")
    assert into(edge.scale_into) == ["ffn.up"]


def test_a_shared_row_is_a_foreign_reader() -> None:
    class KeysAreValues(Attention):
        def projections(self, x: Tensor) -> list[Tensor]:
            q, k, _ = super().projections(x)
            return [q, k, k]

    edge = next(e for e in edges(blocks_of(Block("pre-norm", KeysAreValues(), Plain()))) if e.site == "value-output")
    assert isinstance(edge.scale_into, str)
    assert "is also read by layers.0.attention" in edge.scale_into


def test_a_gate_that_reads_ups_rows_is_a_foreign_reader() -> None:
    class SelfGated(Gated):
        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return self.down(F.silu(up[..., :64]) * up[..., :64]) if self.fused else self.down(F.silu(up) * up)

    edge = next(e for e in edges(blocks_of(Block("pre-norm", Attention(), SelfGated()))) if e.site == "up-down")
    assert isinstance(edge.scale_into, str)
    assert "is also read by layers.0.ffn" in edge.scale_into


class Pooled(nn.Module):
    """One token goes to the head; with `both` all tokens go to another linear."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.norm, self.head, self.all = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(8, 3) if both else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(y[:, 0]) + (self.all(y).sum() if self.all is not None else 0)


def test_an_edge_is_where_its_linears_read() -> None:
    (edge,) = edges(canonical(Pooled(False), torch.randn(2, 3, 8)))
    assert str(edge.value.target) == "aten.select.int", "the head's input is one token, not all"
    assert edge.axis == 1
    (edge,) = edges(canonical(Pooled(True), torch.randn(2, 3, 8)))
    assert str(edge.value.target) == "aten.layer_norm.default", "both linears read what the norm makes"
    assert len(edge.linears) == 2


class Mixed(nn.Module):
    """A reshape whose result goes to a linear and to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        flat = y.reshape(-1, 8)
        return self.one(y), self.two(flat), flat.tanh()


def test_readers_part_where_their_ways_do() -> None:
    (edge,) = edges(canonical(Mixed(), torch.randn(2, 3, 8)))
    assert {f.value.name: ([n.name for n in f.to_linears], [n.name for n in f.to_others]) for f in edge.forks} == {
        "layer_norm": (["linear"], []),
        edge.forks[0].value.name: (["linear_1"], ["tanh"]),
    }


def test_images_count_their_channels_along_axis_1() -> None:
    graph = canonical(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), torch.randn(2, 3, 4, 4))
    (edge,) = edges(graph)
    assert (edge.axis, edge.width, edge.site) == (1, 8, "linear-relu-linear")
    assert into(edge.scale_into) == ["0"]


def test_tokens_mixed_by_a_linear_are_channels() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.tokens = nn.LayerNorm(8), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(self.norm(x).transpose(1, 2))

    (edge,) = edges(canonical(Mixer(), torch.randn(2, 5, 8)))
    assert edge.scale_into == "norm counts its channels along another axis"


def test_work_is_linear_in_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[fx.Node] = []
    trace, constants = ChannelTracer._trace, absorbers.channel_constants
    monkeypatch.setattr(ChannelTracer, "_trace", lambda self, node: visited.append(node) or trace(self, node))
    monkeypatch.setattr(absorbers, "channel_constants", lambda node: visited.append(node) or constants(node))

    def work(depth: int) -> int:
        graph = usual(kv=2, ffn="gated", layers=depth)
        visited.clear()
        assert len(edges(graph)) == 4 * depth + 1
        return len(visited)

    assert work(3) - work(2) == work(2) - work(1)
    assert work(2) - work(1) < 80
