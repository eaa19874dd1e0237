"""Structural questions: which linears share a norm, what an attention is made of, where the feed-forward blocks are."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks import attention_blocks, describe, ffn_blocks, norm_linears
from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context

torch.set_num_threads(1)


class _Attention(nn.Module):
    def __init__(self, kv: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.kv, self.fused = kv, fused
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * kv), nn.Linear(32, 8 * kv)
        self.o = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(*x.shape[:2], -1, 8).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(4 // self.kv, 1) for t in (k, v))
        i = torch.arange(x.shape[1])
        seen = (i <= i[:, None])[None, None] & mask.bool()[:, None, None]
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(x.shape))


class _Gated(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(32, 128 if fused else 64)
        self.gate = nn.Identity() if fused else nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Block(nn.Module):
    def __init__(self, norm: str, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.ffn = norm, attention, ffn
        self.one, self.two, self.three = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.norm == "pre-norm":
            x = x + self.attention(self.one(x), mask)
            return x + self.ffn(self.two(x))
        if self.norm == "post-norm":
            x = self.one(x + self.attention(x, mask))
            return self.two(x + self.ffn(x))
        if self.norm == "sandwich-norm":
            x = x + self.three(self.attention(self.one(x), mask))
            return x + self.ffn(self.two(x))
        x = x + self.one(self.attention(x, mask))
        return x + self.two(self.ffn(x))


class _Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(50, 32), nn.ModuleList(blocks), nn.Linear(32, 50)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x, mask)
        return self.head(x)


def _graph(*blocks: nn.Module) -> Graph:
    graph = capture(_Model(*blocks).eval(), (torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)))
    for p in CANONICAL:
        graph = p().run(graph, Context())
    return graph


@pytest.mark.parametrize("norm", ["pre-norm", "post-norm", "sandwich-norm", "output-norm"])
def test_says_where_the_norms_stand(norm: str) -> None:
    (block,) = attention_blocks(_graph(_Block(norm, _Attention(), _Plain())))
    assert (block.norm, block.why) == (norm, ())


def test_finds_the_projections_and_the_facts() -> None:
    (block,) = attention_blocks(_graph(_Block("pre-norm", _Attention(kv=2), _Plain())))
    paths = [n.meta["path"].rpartition(".")[2] for n in (block.q, block.k, block.v, block.out) if n is not None]
    assert paths == ["q", "k", "v", "o"]
    assert (block.heads, block.kv_heads, block.head_dim, block.causal, block.window) == (4, 2, 8, True, None)
    assert block.key_mask is not None
    assert block.layer == "layers.0.attention"


def test_a_fused_projection_is_one_linear_three_times() -> None:
    (block,) = attention_blocks(_graph(_Block("pre-norm", _Attention(fused=True), _Plain())))
    assert block.q is block.k is block.v
    assert block.q is not None


def test_says_what_it_does_not_find() -> None:
    class Odd(_Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = x.view(*x.shape[:2], -1, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(h.exp(), h, h).transpose(1, 2).reshape(x.shape).relu()

    (block,) = attention_blocks(_graph(_Block("pre-norm", Odd(), _Plain())))
    assert "q comes from exp, not from a linear" in block.why
    assert "k comes from embedding, not from a linear" in block.why
    assert "no linear reads the attention's output" in block.why


@pytest.mark.parametrize(
    ("ffn", "kind", "activation"), [(_Plain, "plain", "gelu"), (_Gated, "gated", "silu"), (lambda: _Gated(fused=True), "fused gated", "silu")]
)
def test_finds_feed_forward_blocks(ffn, kind: str, activation: str) -> None:
    (block,) = ffn_blocks(_graph(_Block("pre-norm", _Attention(), ffn())))
    assert (block.kind, block.width, block.hidden, block.layer) == (kind, 32, 64, "layers.0.ffn")
    assert str(block) == f"32 -> 64, {activation}"
    assert block.down.meta["path"] == "layers.0.ffn.down"
    if kind == "gated":
        assert block.gate is not None
        assert block.gate.meta["path"] == "layers.0.ffn.gate"


def test_a_hidden_value_with_another_reader_is_said() -> None:
    class Leaks(_Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(F.gelu(h)) + h[..., :32]

    (block,) = ffn_blocks(_graph(_Block("pre-norm", _Attention(), Leaks())))
    assert block.why == (f"the hidden value {block.up.name} has 2 readers",)


def test_groups_the_linears_that_share_a_norm() -> None:
    groups = norm_linears(_graph(_Block("pre-norm", _Attention(), _Gated())))
    assert [len(g.linears) for g in groups] == [3, 2]
    assert [g.layer for g in groups] == ["layers.0.one", "layers.0.two"]


def test_describes_in_sentences() -> None:
    two = [_Block("post-norm", _Attention(), _Plain()) for _ in range(2)]
    assert describe(_graph(*two)) == ["2 post-norm attention blocks, 4 heads of 8, causal with a key mask", "2 plain FFNs 32 -> 64, gelu"]
    assert describe(_graph(_Block("pre-norm", _Attention(kv=1), _Gated()))) == [
        "1 pre-norm attention block, 4 heads of 8 (1 key-value heads), causal with a key mask",
        "1 gated FFN 32 -> 64, silu",
    ]


def test_takes_milliseconds() -> None:
    graph = _graph(*(_Block("pre-norm", _Attention(kv=2), _Gated()) for _ in range(4)))
    start = time.perf_counter()
    assert len(attention_blocks(graph)) == len(ffn_blocks(graph)) == 4
    assert time.perf_counter() - start < 0.1
