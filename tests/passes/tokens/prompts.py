"""A small vision-language decoder for tests: an image in a prompt, grouped heads, RoPE, cached keys and values; and the same by hand, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context

SYSTEM, IMAGE, TEXT = 3, 36, 5
TOKENS = SYSTEM + IMAGE + TEXT
IMAGE_ID = 99


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv, self.d = heads, kv, width // heads
        self.q, self.k, self.v = (nn.Linear(width, n * self.d, bias=False) for n in (heads, kv, kv))
        self.o, self.gate, self.up, self.down = (nn.Linear(*n, bias=False) for n in ((width, width), (width, hidden), (width, hidden), (hidden, width)))
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v before RoPE: [B, heads, N, d]."""
        y = self.norm1(x)
        return tuple(f(y).view(*x.shape[:2], -1, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))  # type: ignore[return-value]

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
    """(last token's logits, k and v of every layer). joined: image features are concatenated between texts, or scattered to their tokens."""

    def __init__(
        self, layers: int = 6, width: int = 32, heads: int = 4, kv: int = 2, hidden: int = 64, joined: str = "cat", padded: bool = False, all_rows: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.patch = nn.Embedding(100, width), nn.Conv2d(3, width, 4, 4)
        self.layers = nn.ModuleList(Layer(width, heads, kv, hidden) for _ in range(layers))
        self.norm, self.head, self.joined, self.padded, self.all_rows = RMSNorm(width), nn.Linear(width, 50), joined, padded, all_rows
        self.register_buffer("frequencies", 100.0 ** -torch.arange(0, 1, 2 * heads / width), persistent=False)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of [..., N] positions: [..., N, d]."""
        angles = positions[..., None].float() * self.frequencies
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def enter(self, ids: Tensor, image: Tensor) -> Tensor:
        """The prompt's embeddings, [B, N, C]. ids with image tokens for "scatter", without for "cat"."""
        x, features = self.embed(ids), self.patch(image).flatten(2).transpose(1, 2)
        if self.joined == "cat":
            return torch.cat([x[:, :SYSTEM], features, x[:, SYSTEM:]], 1)
        return x.masked_scatter((ids == IMAGE_ID)[..., None].expand(x.shape), features.flatten(0, 1))

    def forward(self, ids: Tensor, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.enter(ids, image)
        n = x.shape[1]
        cos, sin = self.tables(torch.arange(n, device=x.device))
        caches: list[Tensor] = []
        for layer in self.layers:
            q, k, v = layer.project(x)
            q, k = turn(q, cos, sin), turn(k, cos, sin)
            caches += [k, v]
            k, v = (t.repeat_interleave(layer.heads // layer.kv, 1) for t in (k, v))
            seen = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()[None, None]
            seen = seen if mask is None else seen & mask.bool()[:, None, None]
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        x = self.norm(x)
        return (self.head(x if self.all_rows else x[:, n - 1 :]), *caches)


@dataclass
class State:
    """A prompt by hand in front of a layer: x [N, C], the original number of each token, the position its RoPE takes, the image's places."""

    x: Tensor
    numbers: Tensor
    positions: Tensor
    image: Tensor
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """q, k without and with RoPE of the layer before: [heads, N, d]."""


Choose = Callable[[State], Tensor]
"""Which tokens of a state stay, ascending."""


def by_hand(
    model: Decoder, x: Tensor, image: Tensor, choose: Mapping[int, Choose], real: Tensor | None = None, renumber: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """One sample, one layer after the other: logits of the last token, the caches, the original numbers of the tokens in each layer.

    x: [N, C]   image: places of the image's tokens   real: which tokens are no padding.
    """
    n = torch.arange(len(x))
    real = torch.ones(len(x), dtype=torch.bool) if real is None else real
    state, caches, numbers = State(x, n, n, image), [], []
    for i, layer in enumerate(model.layers):
        if i in choose:
            keep = choose[i](state)
            state.image = torch.isin(keep, state.image).nonzero().squeeze(1)
            state.x, state.numbers, state.positions = state.x[keep], state.numbers[keep], state.positions[keep]
            if renumber:
                state.positions = torch.arange(len(keep))
        q0, k0, v = (t[0] for t in layer.project(state.x[None]))
        cos, sin = model.tables(state.positions)
        q, k = turn(q0, cos, sin), turn(k0, cos, sin)
        caches.append((k, v))
        numbers.append(state.numbers)
        seen = torch.ones(len(k[0]), len(k[0]), dtype=torch.bool).tril() & real[state.numbers]
        out = []
        for h in range(layer.heads):
            weights = (q[h] @ k[h // (layer.heads // layer.kv)].T / layer.d**0.5).masked_fill(~seen, -1e30).softmax(-1)
            out.append(weights @ v[h // (layer.heads // layer.kv)])
        state.x = layer.finish(state.x[None], torch.stack(out)[None])[0]
        state.before = q0, k0, q, k
    return model.head(model.norm(state.x[-1:])), caches, numbers


def decoded(model: Decoder, token: Tensor, position: int, caches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of one more token [C] of one sample, given the caches [kv, tokens, d] of each layer."""
    x = token[None]
    cos, sin = model.tables(torch.tensor([position]))
    for layer, (past_k, past_v) in zip(model.layers, caches, strict=True):
        q, k, v = (t[0] for t in layer.project(x[None]))
        q, k = turn(q, cos, sin), torch.cat([past_k, turn(k, cos, sin)], 1)
        v = torch.cat([past_v, v], 1)
        k, v = (t.repeat_interleave(layer.heads // layer.kv, 0) for t in (k, v))
        x = layer.finish(x[None], F.scaled_dot_product_attention(q, k, v)[None])[0]
    return model.head(model.norm(x))


def decoder(**options) -> Decoder:
    """With fixed random weights."""
    torch.manual_seed(0)
    return Decoder(**options).eval()


def inputs(joined: str = "cat", padded: bool = False, batch: int = 2, starts: tuple[int, ...] = (SYSTEM, SYSTEM)) -> tuple[Tensor, ...]:
    """ids, image and with `padded` a mask: the second sample has two padded tokens in front. starts: of the image in each prompt, for "scatter"."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (batch, TOKENS - IMAGE if joined == "cat" else TOKENS), generator=generator)
    if joined == "scatter":
        for row, start in zip(ids, starts):
            row[start : start + IMAGE] = IMAGE_ID
    found = (ids, torch.randn(batch, 3, 24, 24, generator=generator))
    if not padded:
        return found
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[1, :2] = 0
    return *found, mask


def canonical(model: nn.Module, given: tuple[Tensor, ...], dynamic: bool = True) -> Graph:
    """Its canonical graph, with the batch dynamic or all sizes fixed."""
    graph = capture(model, given, dynamic_shapes={name: {0: "batch"} for name, _ in zip(("ids", "image", "mask"), given)} if dynamic else {})
    for p in CANONICAL:
        graph = p().run(graph, Context())
    graph.clean()
    return graph
