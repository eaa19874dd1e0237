"""8-bit tables: rows come back within half a step, small and tied tables stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.quantization.quantize_embedding import QuantizeEmbedding
from rewright.tools.optimize import capture


def run(module: nn.Module, **options: int) -> Outcome:
    graph = capture(module, (torch.randint(0, 50, (2, 5)),))
    return Pipeline([QuantizeEmbedding(**options)]).run(graph, [(torch.randint(0, 50, (2, 5)),)])


def test_rows_come_back_within_half_a_step_and_take_a_quarter() -> None:
    table = nn.Embedding(50, 64, padding_idx=0)
    outcome = run(table, min_weights=1)
    assert outcome.records[-1].applied == 1
    ids = torch.arange(50)[None]
    step = table.weight.detach().abs().amax(1) / 127
    assert ((outcome.graph.module(ids) - table(ids)).abs() <= step[None, :, None] / 2 + 1e-6).all()
    assert outcome.graph.weight_bytes() == 50 * 64 + 50 * 4


def test_small_tied_and_half_tables_stay_with_a_sentence() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.embed(ids), self.embed.weight)

    sentences = [
        run(m, **o).records[-1].declined[0].why
        for m, o in ((nn.Embedding(50, 8), {}), (Tied(), {"min_weights": 1}), (nn.Embedding(50, 8).half(), {"min_weights": 1}))
    ]
    assert sentences[0] == "its 400 weights are fewer than min_weights = 1,048,576"
    assert "is also read by linear" in sentences[1]
    assert "torch.float16" in sentences[2]
