"""Graphs in which each absorber occurs, and one way to migrate all their edges by random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewright.ir.blocks.edges import Edge, edges
from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.outliers.migrate import Explicit, Road, migrate, road, tied
from rewright.passes.rewrite import Context, Pass

torch.set_num_threads(1)

C = 16
X = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(2))
IMAGE = torch.randn(2, C, 6, 6, generator=torch.Generator().manual_seed(3))


def lively(module: nn.Module) -> nn.Module:
    """Vectors off their zeros and ones, where a forgotten one would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.5)
    return module.eval()


def canonical(module: nn.Module, *inputs: Tensor, then: tuple[Pass, ...] = ()) -> Graph:
    """The canonical graph of a module, its vectors made lively."""
    graph = capture(lively(module), inputs)
    for p in (*(kind() for kind in CANONICAL), *then):
        graph = p.run(graph, Context())
    graph.clean()
    return graph


@dataclass
class Migrated:
    """What became of a graph: relative error of its outputs, whether they are bit-equal, and the edges with what was done to them."""

    graph: Graph
    error: float
    bit_equal: bool
    done: list[tuple[Edge, Road, bool]]
    """Edge, road, whether it was shifted."""


def numbers(edge: Edge, seed: int, powers: bool) -> tuple[Tensor, Tensor]:
    """Random s between about 1/10 and 10, and z."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.exp(torch.randn(edge.width, generator=generator, dtype=torch.float64))
    z = torch.randn(edge.width, generator=generator, dtype=torch.float64)
    return torch.exp2(torch.log2(s).round()) if powers else s, z


def migrate_all(graph: Graph, *inputs: Any, explicit: Explicit = "never", powers: bool = False, named: dict[str, Tensor] | None = None) -> Migrated:
    """Every edge of a copy that can be, by random s and z; with `powers` by powers of two alone."""
    copy, done = graph.clone(), []
    for i, edge in enumerate(edges(copy)):
        way = road(edge, explicit)
        if isinstance(way.scale, str):
            continue
        s, z = numbers(edge, i, powers)
        if way.tied:
            s, z = tied(s, edge.ties, "amax"), tied(z, edge.ties, "amax")
        shifted = not powers and not isinstance(way.shift, str)
        migrate(copy, edge, s, z if shifted else None, explicit)
        done.append((edge, way, shifted))
    copy.clean()
    with torch.no_grad():
        before, after = (pytree.tree_leaves(g(*inputs, **(named or {}))) for g in (graph, copy))
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    error = max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)
    return Migrated(copy, error, all(torch.equal(a, b) for a, b in pairs), done)


# -- the graphs --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """8 heads of 2. fused: "" (q, k, v apart), "thirds" (timm's [3, heads, dim]) or "heads" (GPT-NeoX's [heads, 3, dim])."""

    def __init__(self, kv: int = 8, fused: str = "", bias: bool = True) -> None:
        super().__init__()
        self.kv, self.fused = kv, fused
        self.qkv = nn.Linear(C, 3 * C, bias) if fused else nn.Linear(C, C + 4 * kv, bias)
        self.o = nn.Linear(C, C, bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:2]
        if self.fused == "thirds":
            q, k, v = self.qkv(x).view(*shape, 3, 8, 2).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.fused == "heads":
            q, k, v = self.qkv(x).view(*shape, 8, 6).transpose(1, 2).chunk(3, -1)
        else:
            q, k, v = (t.view(*shape, -1, 2).transpose(1, 2) for t in self.qkv(x).split([C, 2 * self.kv, 2 * self.kv], -1))
            k, v = (t.repeat_interleave(8 // self.kv, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*shape, C))


class Gated(nn.Module):
    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed, self.up, self.gate, self.down = packed, nn.Linear(C, 48 if packed else 24), nn.Linear(C, 24), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Top-1 of 3 gated experts behind one norm: the router and all experts read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(C, eps=1e-6), nn.Linear(C, 3, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(3, C, 48) / 4), nn.Parameter(torch.randn(3, 24, C) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).reshape(-1, C)
        order = self.router(y).argmax(-1).sort()
        ends = torch.nn.functional.one_hot(order.values, 3).sum(0).cumsum(0).to(torch.int32)
        rows = y[order.indices]
        gate, up = torch.ops.rewright.grouped_linear(rows, self.up, ends).chunk(2, -1)
        made = torch.ops.rewright.grouped_linear(F.silu(gate) * up, self.down, ends)
        return made[order.indices.argsort()].view(x.shape) + x


class Residual(nn.Module):
    """x + r, normed: fused by the fusion passes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(C, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.flip(1)
        return torch.cat([self.linear(self.norm(h)), h], -1)


class PostNorm(nn.Module):
    """BERT's block: the norm feeds the linears and the next residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.attention = nn.LayerNorm(C), nn.LayerNorm(C), Attention()
        self.up, self.down = nn.Linear(C, 24), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.two(x + self.attention(x))
        return x + self.down(F.gelu(self.up(x)))


class Parallel(nn.Module):
    """GPT-J's block: one norm feeds attention and the feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up, self.down = nn.LayerNorm(C), Attention(fused="thirds"), nn.Linear(C, 24), nn.Linear(24, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y) + self.down(F.relu(self.up(y)))


class OnePlus(nn.Module):
    """Gemma's norm: the stored weight is w - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(C) * 0.1), nn.Linear(C, 8)

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.linear((normed * (1.0 + self.weight.float())).type_as(x))


class Function(nn.Module):
    """linear2(f(linear1(x)))."""

    def __init__(self, f: Callable[[Tensor], Tensor], constants: int = 0) -> None:
        super().__init__()
        self.f, self.one, self.two = f, nn.Linear(C, C), nn.Linear(C, 8)
        self.constants = nn.ParameterList(nn.Parameter(torch.rand(C) + 0.5) for _ in range(constants))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.f(self.one(x), *self.constants))


class Embedded(nn.Module):
    """A linear reads a table's rows, or the sum of two tables'."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        self.words, self.places, self.linear = nn.Embedding(20, C), nn.Embedding(5, C) if positions else None, nn.Linear(C, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.linear(x if self.places is None else x + self.places(torch.arange(ids.shape[1])))


def image_norm(norm: nn.Module) -> nn.Module:
    """A convolution, a norm over its channels, ReLU and max pooling, a convolution."""
    return nn.Sequential(nn.Conv2d(C, C, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(C, 8, 1))
