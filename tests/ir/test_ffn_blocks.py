"""Feed-forward blocks with a batch norm inside, with biases picked for each token, and the residual stream around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks import ffn_blocks
from rewright.passes.fusion.add_layer_norm import FuseAddLayerNorm
from rewright.passes.rewrite import Context

from .block_models import canonical, usual


@pytest.mark.parametrize("after", [True, False])
def test_a_batch_norm_stands_inside_a_block(after: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            up = self.up(x)
            return x + self.down(self.norm(F.relu(up)) if after else F.relu(self.norm(up)))

    (block,) = ffn_blocks(canonical(Normed(), torch.randn(4, 8)))
    assert (block.hidden, block.act, block.why) == (16, "relu", ())


def test_biases_of_experts_picked_for_each_token_leave_the_block_a_block() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 3)
            self.up, self.bias, self.down = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 8, 32), (3, 32), (3, 16, 8)))

        def forward(self, x: Tensor) -> Tensor:
            chosen, order = self.router(x).argmax(-1).sort()
            ends = (chosen[None] <= torch.arange(3)[:, None]).sum(1).to(torch.int32)
            both = torch.ops.rewright.grouped_linear(x[order], self.up, ends) + self.bias[chosen]
            y = torch.ops.rewright.grouped_linear(F.silu(both[:, ::2]) * both[:, 1::2], self.down, ends)
            return x + torch.zeros_like(x).index_copy(0, order, y)

    (block,) = ffn_blocks(canonical(Experts(), torch.randn(12, 8)))
    assert (block.kind, block.hidden, block.experts, block.why) == ("fused gated", 16, 3, ())
    assert block.gate_rows is not None
    assert block.gate_rows.tolist() == list(range(0, 32, 2))


@pytest.mark.parametrize("norm", ["pre-norm", "post-norm", "sandwich-norm", "output-norm"])
def test_the_terms_of_the_residual_addition_are_told_apart(norm: str) -> None:
    (block,) = ffn_blocks(usual(norm))
    terms = block.residual_terms
    assert terms is not None
    start, branch, total = terms
    assert {start, branch} == set(block.residual.args[:2])  # type: ignore[union-attr]
    assert total is block.residual
    assert (branch is block.down) == (norm != "output-norm")
    assert start < block.up


def test_of_an_addition_fused_with_a_norm_the_sum_is_the_second_result() -> None:
    graph = FuseAddLayerNorm().run(usual("pre-norm", layers=2).clone(), Context())
    block = ffn_blocks(graph)[0]
    terms = block.residual_terms
    assert terms is not None
    assert terms[1] is block.down
    assert (terms[2].args[0], terms[2].args[1]) == (block.residual, 1)


def test_a_block_that_stands_alone_has_no_terms() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    (block,) = ffn_blocks(canonical(Alone(), torch.randn(4, 8)))
    assert block.residual is None
    assert block.residual_terms is None
