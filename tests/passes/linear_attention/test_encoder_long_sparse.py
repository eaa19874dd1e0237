"""The recipe encoder-long-sparse: applied where a few blocks hold the attention of a long input, refused in words where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx.session import Session
from rewright.ir.errors import PromiseBroken
from rewright.tools.optimize import optimize

torch.set_num_threads(1)
TOKENS, WIDTH, HEADS = 1024, 64, 2


class Encoder(nn.Module):
    """Two layers with a norm behind each; tokens look for those most like them."""

    def __init__(self, sharp: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sharp = sharp
        self.values, self.out = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
        self.looks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for look, value, out, norm in zip(self.looks, self.values, self.out, self.norms):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.sharp * look(x), look(x), value(x)))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            x = norm(x + out(y.transpose(1, 2).flatten(2)))
        return x


def texts(count: int) -> list[tuple[Tensor, Tensor]]:
    """Topics of 64 tokens, padded at the end; a topic lies in the same place in every text."""
    topics = 4 * torch.randn(1, TOKENS // 64, WIDTH, generator=torch.Generator().manual_seed(1)).repeat_interleave(64, 1)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, TOKENS - 9 :] = False
    return [(topics + 0.3 * torch.randn(1, TOKENS, WIDTH), mask) for _ in range(count)]


def test_a_long_encoder_with_local_attention_gets_sparse_and_exports(tmp_path: Path) -> None:
    result = optimize(Encoder(3.0), texts(1)[0], recipe="encoder-long-sparse", calibration=texts(3))
    (sparse,) = [r for r in result.records if r.name == "sparse-attention"]
    assert sparse.applied == 2 and not sparse.declined and result.verification["cosine"] > 0.98
    assert any("density 0.1" in note for note in result.graph.notes)
    result.export(tmp_path / "m.onnx")
    given = texts(1)[0]
    torch.testing.assert_close(Session(tmp_path / "m.onnx")(given)[0], result.graph.run(given)[0], rtol=1e-3, atol=1e-4)


def test_an_encoder_with_even_attention_is_refused_in_words() -> None:
    with pytest.raises(PromiseBroken, match=r"more than most_density = 0.5"):
        optimize(Encoder(0.0), texts(1)[0], recipe="encoder-long-sparse", calibration=texts(3))
