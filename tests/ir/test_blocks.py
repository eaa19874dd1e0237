"""Structural questions: which linears share a norm, what an attention is made of, where the feed-forward blocks are."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewright.ir.blocks import attention_blocks, describe, ffn_blocks, norm_linears, residual_streams
from rewright.ir.graph import Graph

from .block_models import Attention, Block, Plain, blocks_of, canonical, usual

torch.set_num_threads(1)


@pytest.mark.parametrize("norm", ["pre-norm", "post-norm", "sandwich-norm", "output-norm"])
def test_says_where_the_norms_stand(norm: str) -> None:
    (block,) = attention_blocks(usual(norm))
    assert (block.norm, block.why) == (norm, ())


def test_parallel_blocks_are_both_pre_norm_behind_one_norm() -> None:
    graph = usual("parallel")
    assert [b.norm for b in (*attention_blocks(graph), *ffn_blocks(graph))] == ["pre-norm", "pre-norm"]
    assert [len(g.linears) for g in norm_linears(graph)] == [4, 1]


def test_a_branch_added_to_its_norm_is_post_norm_even_inside_an_outer_sum() -> None:
    """x + (y + f(y)) with y = norm(x): the outer sum puts x and the inner sum in one stream."""

    class Around(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.one(x)
            x = x + (y + self.attention(y, mask))
            y = self.two(x)
            return x + (y + self.ffn(y))

    graph = blocks_of(Around("", Attention(), Plain()))
    assert [b.norm for b in (*attention_blocks(graph), *ffn_blocks(graph))] == ["post-norm", "post-norm"]


def test_finds_the_projections_and_the_facts() -> None:
    (block,) = attention_blocks(usual(kv=2))
    paths = [n.meta["path"].rpartition(".")[2] for n in (block.q, block.k, block.v, block.out) if n is not None]
    assert paths == ["q", "k", "v", "o"]
    assert (block.heads, block.kv_heads, block.head_dim, block.causal, block.window) == (4, 2, 8, True, None)
    assert block.key_mask is not None
    assert block.residual is not None
    assert block.layer == "layers.0.attention"
    assert (block.kind, block.rope, block.qk_norm) == ("self", "", False)


@pytest.mark.parametrize("fused", ["thirds", "heads"])
def test_a_fused_projection_is_one_linear_with_three_sets_of_rows(fused: str) -> None:
    graph = usual(fused=fused)
    (block,) = attention_blocks(graph)
    assert block.q is block.k is block.v
    assert block.q is not None
    first = {"thirds": [0, 32, 64], "heads": [0, 8, 16]}[fused]
    step = {"thirds": 8, "heads": 24}[fused]
    for p, start in zip((block.to_q, block.to_k, block.to_v), first):
        assert p.rows is not None
        assert torch.equal(p.rows, start + torch.arange(4)[:, None] * step + torch.arange(8))


@pytest.mark.parametrize(("kv", "fused"), [(4, ""), (2, ""), (1, ""), (4, "thirds"), (4, "heads")])
def test_the_rows_of_a_head_make_that_head(kv: int, fused: str) -> None:
    """The rows are right when zeroing them zeroes one head of q, k or v and nothing else."""
    graph = usual(kv=kv, fused=fused)
    (block,) = attention_blocks(graph)
    flat = graph.flat_inputs((torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.long)))
    for operand, p in enumerate((block.to_q, block.to_k, block.to_v)):
        assert p.linear is not None
        assert p.rows is not None
        for head, rows in enumerate(p.rows):
            saved = [graph.weight(w).detach().clone() for w in p.linear.args[1:3]]
            with torch.no_grad():
                for w in p.linear.args[1:3]:
                    graph.weight(w)[rows] = 0
            value = _value(graph, block.attention.args[operand], flat)
            with torch.no_grad():
                for w, old in zip(p.linear.args[1:3], saved):
                    graph.weight(w).copy_(old)
            assert value[:, head].abs().max() == 0
            assert (value.abs().amax(dim=(0, 2, 3)) > 0).sum() == value.shape[1] - 1


def _value(graph: Graph, node, flat: tuple) -> Tensor:
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n is node:
                seen["value"] = result
            return result

    Watch(graph.module).run(*flat, enable_io_processing=False)
    return seen["value"].detach()


def test_a_query_from_another_sequence_is_cross_attention() -> None:
    class Memory(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.memory, self.norm, self.attention = torch.nn.Embedding(50, 32), torch.nn.Embedding(50, 32), torch.nn.LayerNorm(32), Attention()

        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            x, m, a = self.embed(ids), self.memory(other), self.attention
            q, k, v = (t.view(*t.shape[:2], -1, 8).transpose(1, 2) for t in (a.q(self.norm(x)), a.k(m), a.v(m)))
            return x + a.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    (block,) = attention_blocks(canonical(Memory(), torch.ones(3, 9, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)))
    assert (block.kind, block.norm) == ("cross", "pre-norm")


def test_says_what_it_does_not_find() -> None:
    class Odd(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = x.view(*x.shape[:2], -1, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(h.exp(), h, h).transpose(1, 2).reshape(x.shape).relu()

    (block,) = attention_blocks(blocks_of(Block("output-norm", Odd(), Plain())))
    assert "q comes from exp, not from a linear" in block.why
    assert "k comes from embedding, not from a linear" in block.why
    assert "no linear reads the attention's output" in block.why


@pytest.mark.parametrize(("kind", "activation"), [("plain", "gelu"), ("gated", "silu"), ("fused gated", "silu")])
def test_finds_feed_forward_blocks(kind: str, activation: str) -> None:
    (block,) = ffn_blocks(usual(ffn=kind))
    assert (block.kind, block.width, block.hidden, block.layer, block.norm) == (kind, 32, 64, "layers.0.ffn", "pre-norm")
    assert str(block) == f"32 -> 64, {activation}"
    assert block.down.meta["path"] == "layers.0.ffn.down"
    assert block.residual is not None
    rows = {"plain": (0, None), "gated": (0, 0), "fused gated": (64, 0)}[kind]
    for found, start in zip((block.up_rows, block.gate_rows), rows):
        assert (found is None) if start is None else torch.equal(found, start + torch.arange(64))
    if kind == "gated":
        assert block.gate is not None
        assert block.gate.meta["path"] == "layers.0.ffn.gate"


def test_a_squared_relu_is_named() -> None:
    class Squared(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)).square())

    (block,) = ffn_blocks(blocks_of(Block("pre-norm", Attention(), Squared())))
    assert str(block) == "32 -> 64, relu^2"


def test_1x1_convolutions_make_a_feed_forward_block_too() -> None:
    class Convolved(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Conv1d(32, 64, 1), torch.nn.Conv1d(64, 32, 1)  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)

    graph = blocks_of(Block("pre-norm", Attention(), Convolved()))
    (block,) = ffn_blocks(graph)
    assert str(block) == "32 -> 64, gelu, as 1x1 convolutions"
    assert block.norm == "pre-norm"
    assert block.residual is not None
    assert [len(g.linears) for g in norm_linears(graph)] == [3, 1, 1]  # the convolution reads its norm through a permute


def test_a_hidden_value_with_another_reader_is_said() -> None:
    class Leaks(Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(F.gelu(h)) + h[..., :32]

    (block,) = ffn_blocks(blocks_of(Block("pre-norm", Attention(), Leaks())))
    assert block.why == ("the up projection's result has 2 readers",)


def test_a_norm_inside_a_feed_forward_block_is_said() -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.inner(F.gelu(self.up(x))))

    (block,) = ffn_blocks(blocks_of(Block("pre-norm", Attention(), Normed())))
    assert block.why == ("a norm over the hidden channels stands before the down projection",)


def test_groups_the_linears_that_share_a_norm() -> None:
    groups = norm_linears(usual(ffn="gated"))
    assert [len(g.linears) for g in groups] == [3, 2, 1]
    assert [g.layer for g in groups] == ["layers.0.one", "layers.0.two", "final"]
    assert [g.others for g in groups] == [(), (), ()]


def test_a_linear_behind_a_cast_reads_its_norm_too() -> None:
    class Half(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16()).float()

    groups = norm_linears(blocks_of(Block("pre-norm", Attention(), Half())))
    assert [(len(g.linears), g.others) for g in groups] == [(3, ()), (1, ()), (1, ())]


def test_a_post_norm_has_the_sum_among_its_readers() -> None:
    groups = norm_linears(usual("post-norm"))
    assert [[o.target.__name__ for o in g.others] for g in groups] == [["add.Tensor"], []]  # type: ignore[union-attr]


def test_tied_embeddings_are_one_weight_and_change_nothing() -> None:
    graph = usual(tied=True)
    (stream,) = residual_streams(graph)
    embedding = stream.sources[0].node
    assert len(embedding.args[0].users) == 2  # type: ignore[union-attr]
    assert describe(graph) == describe(usual())


def test_layers_that_share_their_weights_say_so() -> None:
    block = Block("pre-norm", Attention(), Plain())
    graph = blocks_of(block, block)
    assert [b.why for b in (*attention_blocks(graph), *ffn_blocks(graph))] == [("its weights serve 2 calls: an edit changes them all",)] * 4


def test_one_mask_serves_all_layers() -> None:
    graph = usual(layers=3)
    blocks = attention_blocks(graph)
    assert len({b.key_mask for b in blocks}) == 1
    assert all(b.causal for b in blocks)
    assert len(describe(graph)) == 3


def test_describes_in_sentences() -> None:
    assert describe(usual("post-norm", layers=2)) == [
        "2 post-norm attention blocks, 4 heads of 8, causal with a key mask",
        "2 plain FFNs 32 -> 64, gelu",
        "4 sums are normed at once (post-norm): no residual stream runs through",
    ]
    assert describe(usual(kv=1, ffn="gated")) == [
        "1 pre-norm attention block, 4 heads of 8 (1 key-value heads), causal with a key mask",
        "1 gated FFN 32 -> 64, silu",
        "residual stream of 32 channels: 2 writers, 3 norm readers",
    ]


def test_describes_what_it_did_not_understand() -> None:
    class Mixer(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.o(torch.cumsum(self.q(x), 1))

    said = describe(blocks_of(*(Block("pre-norm", Mixer(), Plain()) for _ in range(2))))
    assert "2 writers of the residual stream are neither attention nor FFN: layers.0.attention.o (linear), layers.1.attention.o (linear)" in said


def test_takes_milliseconds() -> None:
    graph = usual(layers=3)
    start = time.process_time()
    assert len(attention_blocks(graph)) == len(ffn_blocks(graph)) == 3
    assert time.process_time() - start < 0.5
