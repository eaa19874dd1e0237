"""Residual streams: their writers, readers and sources, and where there is none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewright.ir.blocks import residual_streams
from rewright.passes.fusion.add_layer_norm import FuseAddLayerNorm
from rewright.passes.rewrite import Context

from .block_models import Attention, Block, Plain, blocks_of, usual

torch.set_num_threads(1)


def _paths(nodes) -> list[str]:
    return [n.meta["path"].removeprefix("layers.") for n in nodes]


def test_one_stream_runs_through_a_pre_norm_model() -> None:
    (stream,) = residual_streams(usual(ffn="gated", layers=2))
    assert stream.width == 32
    assert _paths(s.node for s in stream.sources) == ["embed"]
    assert _paths(w.node for w in stream.writers) == ["0.attention.o", "0.ffn.down", "1.attention.o", "1.ffn.down"]
    assert _paths(stream.norms) == ["0.one", "0.two", "1.one", "1.two", "final"]
    assert stream.bypasses == ()
    assert stream.last is stream.values[-1]
    assert not stream.is_post_norm


def test_a_norm_between_writer_and_sum_is_on_the_way() -> None:
    (stream,) = residual_streams(usual("sandwich-norm"))
    assert [[n.target.__name__ for n in w.through] for w in stream.writers] == [["layer_norm.default"], []]  # type: ignore[union-attr]


def test_a_post_norm_model_has_a_short_stream_a_sum() -> None:
    streams = residual_streams(usual("post-norm", layers=2))
    assert [s.is_post_norm for s in streams] == [True] * 4
    assert sorted(_paths(s.writers[0].node for s in streams)) == ["0.attention.o", "0.ffn.down", "1.attention.o", "1.ffn.down"]


def test_readers_without_a_norm_are_named() -> None:
    (stream,) = residual_streams(usual("output-norm"))
    assert _paths(stream.bypasses) == ["0.attention.q", "0.attention.k", "0.attention.v", "0.ffn.up"]


def test_positions_added_to_the_embedding_are_sources() -> None:
    class Placed(Block):
        def __init__(self) -> None:
            super().__init__("pre-norm", Attention(), Plain())
            self.place = nn.Embedding(9, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x + self.place(torch.arange(x.shape[1])), mask)

    (stream,) = residual_streams(blocks_of(Placed()))
    assert sorted(_paths(s.node for s in stream.sources)) == ["0.place", "embed"]
    assert len(stream.writers) == 2


def test_a_layer_scale_is_on_the_way_and_its_sum_is_found() -> None:
    class Scaled(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32) * 0.1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, mask) * self.scale

    (stream,) = residual_streams(blocks_of(Block("pre-norm", Scaled(), Plain())))
    assert _paths(w.node for w in stream.writers) == ["0.attention.o", "0.ffn.down"]
    assert [len(w.through) for w in stream.writers] == [1, 0]


def test_a_fused_residual_norm_stays_in_the_stream() -> None:
    graph = usual(layers=3).clone()
    (before,) = residual_streams(graph)
    fused = FuseAddLayerNorm().run(graph, Context())
    fused.clean()
    (after,) = residual_streams(fused)
    assert len(fused.find(torch.ops.rewright.add_layer_norm.default)) == 6
    assert _paths(w.node for w in after.writers) == _paths(w.node for w in before.writers)
    assert len(after.norms) == len(before.norms)
