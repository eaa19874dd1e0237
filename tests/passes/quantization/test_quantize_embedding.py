"""8- and 4-bit tables: rows come back within half a step, small and tied tables stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.errors import RecipeError
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.quantization.quantize_embedding import QuantizeEmbedding
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.tools.optimize import capture


def run(module: nn.Module, *more: Any, **options: Any) -> Outcome:
    graph = capture(module, (torch.randint(0, 50, (2, 5)),))
    return Pipeline([QuantizeEmbedding(**options), *more]).run(graph, [(torch.randint(0, 50, (2, 5)),)])


def test_rows_come_back_within_half_a_step_and_take_a_quarter() -> None:
    table = nn.Embedding(50, 64, padding_idx=0)
    outcome = run(table, min_weights=1)
    assert outcome.records[-1].applied == 1
    ids = torch.arange(50)[None]
    step = table.weight.detach().abs().amax(1) / 127
    assert ((outcome.graph.module(ids) - table(ids)).abs() <= step[None, :, None] / 2 + 1e-6).all()
    assert outcome.graph.weight_bytes() == 50 * 64 + 50 * 4


@pytest.mark.parametrize(("weights", "bits"), [("int8-group", 8), ("int4-group", 4)])
@pytest.mark.parametrize(("width", "group"), [(64, 32), (48, 16)])
def test_groups_of_a_row_have_a_scale_and_a_zero_point_each(weights: Any, bits: int, width: int, group: int) -> None:
    table = nn.Embedding(50, width)
    with torch.no_grad():
        table.weight[:, ::3] += 4  # nothing around 0
    outcome = run(table, min_weights=1, weights=weights, group_size=32)
    assert outcome.records[-1].applied == 1
    ids = torch.arange(50)[None]
    parts = table.weight.detach().unflatten(1, (-1, group))
    step = (parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)) / (2**bits - 1)
    error = (outcome.graph.module(ids) - table(ids))[0].unflatten(1, (-1, group)).abs()
    assert (error <= step[..., None] + 1e-6).all() and error.mean() < 0.3 * step.mean()  # a zero point is a whole step
    groups = width // group
    assert outcome.graph.weight_bytes() == 50 * (width * bits // 8 + groups * 4 + -(-groups * bits // 8))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(ids), self.embed.weight)


def test_small_tied_and_half_tables_and_ragged_rows_stay_with_a_sentence() -> None:
    sentences = [
        run(m, **o).records[-1].declined[0].why
        for m, o in (
            (nn.Embedding(50, 8), {}),
            (Tied(), {"min_weights": 1}),
            (nn.Embedding(50, 8).half(), {"min_weights": 1}),
            (nn.Embedding(50, 40), {"min_weights": 1, "weights": "int4-group"}),
        )
    ]
    assert sentences[0] == "its 400 weights are fewer than min_weights = 1,048,576"
    assert sentences[1] == 'its table embed.weight is also read by linear; tied = "copy" gives it codes of its own'
    assert "torch.float16" in sentences[2]
    assert sentences[3] == "its rows of 40 channels are no whole number of groups of 16 or more"
    with pytest.raises(RecipeError, match="group_size must be a power of two from 16 on, got 24"):
        QuantizeEmbedding(group_size=24)


def test_both_readers_of_a_tied_table_get_codes_of_their_own_when_asked() -> None:
    model = Tied()
    outcome = run(model, QuantizeLinear(weights="int4-group", activations="none", min_weights=1), min_weights=1, tied="copy")
    assert [r.applied for r in outcome.records[-2:]] == [1, 1]
    assert "embed.weight" not in outcome.graph.weights()
    assert outcome.graph.notes[1:] == ["embed has quantized codes of its own; embed.weight stays as it is for linear"]
    assert outcome.total is not None and 0.98 < outcome.total.cosine < 1
