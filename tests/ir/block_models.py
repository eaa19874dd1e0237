"""Ten-line transformers for the structural questions: every norm position, grouped heads, fused projections in several orders."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context


class Attention(nn.Module):
    """4 heads of 8. fused: "thirds" ([q, k, v]) or "heads" (GPT-NeoX: q, k and v of a head side by side)."""

    def __init__(self, kv: int = 4, fused: str = "") -> None:
        super().__init__()
        self.kv, self.fused = kv, fused
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * kv), nn.Linear(32, 8 * kv)
        self.o = nn.Linear(32, 32)

    def projections(self, x: Tensor) -> list[Tensor]:
        """q, k, v: [B, heads, S, 8]."""
        if self.fused == "heads":
            return list(self.qkv(x).view(*x.shape[:2], 4, 24).transpose(1, 2).chunk(3, -1))
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(*x.shape[:2], -1, 8).transpose(1, 2) for t in (q, k, v))
        return [q, *(t.repeat_interleave(4 // self.kv, 1) for t in (k, v))]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        seen = (i <= i[:, None])[None, None] & mask.bool()[:, None, None]
        q, k, v = self.projections(x)
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).reshape(x.shape))


class Gated(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(32, 128 if fused else 64)
        self.gate = nn.Identity() if fused else nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, norm: str, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.ffn = norm, attention, ffn
        self.one, self.two, self.three = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.norm == "pre-norm":
            x = x + self.attention(self.one(x), mask)
            return x + self.ffn(self.two(x))
        if self.norm == "parallel":
            y = self.one(x)
            return x + self.attention(y, mask) + self.ffn(y)
        if self.norm == "post-norm":
            x = self.one(x + self.attention(x, mask))
            return self.two(x + self.ffn(x))
        if self.norm == "sandwich-norm":
            x = x + self.three(self.attention(self.one(x), mask))
            return x + self.ffn(self.two(x))
        x = x + self.one(self.attention(x, mask))
        return x + self.two(self.ffn(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(50, 32), nn.ModuleList(blocks), nn.Linear(32, 50, bias=False)
        self.final = nn.LayerNorm(32)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x, mask)
        return self.head(self.final(x))


def canonical(model: nn.Module, *inputs: Tensor) -> Graph:
    """The canonical graph of a model; token ids [3, 9] and a mask without inputs."""
    graph = capture(model.eval(), inputs or (torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)))
    for p in CANONICAL:
        graph = p().run(graph, Context())
    return graph


@cache
def usual(norm: str = "pre-norm", kv: int = 4, fused: str = "", ffn: str = "plain", layers: int = 1, tied: bool = False) -> Graph:
    """A language model of equal blocks, captured once for all tests: they may change weights for a while, but not nodes.

    ffn: "plain", "gated" or "fused gated".
    """

    def block() -> Block:
        return Block(norm, Attention(kv, fused), Plain() if ffn == "plain" else Gated(fused=ffn == "fused gated"))

    return blocks_of(*(block() for _ in range(layers)), tied=tied)


def blocks_of(*blocks: nn.Module, tied: bool = False) -> Graph:
    """The canonical graph of a language model of these blocks."""
    torch.manual_seed(0)
    return canonical(Model(*blocks, tied=tied))
