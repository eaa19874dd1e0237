"""A small post-norm text encoder for tests: key mask, packed heads, plain FFN, as BERT has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(b, n, -1)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, width: int = 64, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def example() -> dict[str, Tensor]:
    """Three texts of nine tokens, two of them padded: on the right, and on the left with a hole."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, :3], mask[2, 5] = 0, 0, 0
    return {"input_ids": torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0)), "attention_mask": mask}


def encoder(**options: int) -> Encoder:
    """With fixed random weights."""
    torch.manual_seed(0)
    return Encoder(**options).eval()
