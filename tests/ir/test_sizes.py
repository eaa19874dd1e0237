"""Dynamic dims fixed: the same program for one size, with nothing left to compute of it; inputs filled up or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.errors import UsageError
from rewright.ir.graph import Graph
from rewright.ir.sizes import filled, fixed, in_batches, may_pad, token_count
from rewright.ir.verify import check_structure
from rewright.tools.models import at_length
from rewright.tools.optimize import capture

from ..passes.encoder import encoder, example


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(encoder(), (), example())


def test_a_fixed_program_gives_the_same_bits_and_computes_no_sizes(graph: Graph) -> None:
    short = fixed(graph, {"sequence": 9})
    assert list(short.dims) == ["batch"] and list(graph.dims) == ["batch", "sequence"]
    assert [tuple(n.meta["val"].shape)[1] for n in short.inputs] == [9, 9]
    sizes = [n for n in short.nodes if n.target is torch.ops.aten.sym_size.int]
    assert {n.args[1] for n in sizes} == {0} and any(n.args[1] == 1 for n in graph.nodes if n.target is torch.ops.aten.sym_size.int)
    check_structure(short)
    for rows in (1, 3):
        flat = tuple(t[:rows] for t in example().values())
        assert torch.equal(short.run(flat)[0], graph.run(flat)[0])


def test_all_dims_can_be_fixed(graph: Graph) -> None:
    whole = fixed(graph, {"sequence": 9, "batch": 3})
    assert not whole.dims and not [n for n in whole.nodes if n.target is torch.ops.aten.sym_size.int]
    assert torch.equal(whole(**example()), graph(**example()))


def test_a_dim_that_is_not_there_and_a_size_that_is_not_taken_are_said(graph: Graph) -> None:
    with pytest.raises(UsageError, match="no dynamic dim 'sequense' to fix at 9; Did you mean 'sequence'.* the model has batch, sequence"):
        fixed(graph, {"sequense": 9})

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table[: x.shape[1]]

    table = capture(Short(), (torch.randn(2, 5, 4),), dynamic_shapes={"x": {1: "n"}})
    with pytest.raises(UsageError, match="n can't be fixed at 13: the model takes 1 to 12"):
        fixed(table, {"n": 13})


def test_shorter_texts_are_filled_up_behind_the_mask_and_nothing_else_is(graph: Graph) -> None:
    short = fixed(graph, {"sequence": 9})
    assert may_pad(short) and token_count(short) == 9 and token_count(graph) is None and token_count(graph, {"sequence": 4}) == 4
    ids, mask = (t[:, :6] for t in example().values())
    found = filled(short, (ids, mask))
    assert [t.shape for t in found] == [(3, 9), (3, 9)] and not found[1][:, 6:].any()
    held = mask.clone().index_fill_(1, torch.tensor([0]), 1)
    a, b = short.run(filled(short, (ids, held)))[0][:, :6], graph.run((ids, held))[0]
    assert torch.allclose(a[held != 0], b[held != 0], atol=2e-6)
    with pytest.raises(UsageError, match=r"input_ids is of shape \[3, 12\], and the model takes \['any', 9\]"):
        filled(short, (torch.ones(3, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)))


def test_without_a_mask_nothing_is_filled_up() -> None:
    bare = fixed(capture(nn.Embedding(10, 4), (torch.zeros(2, 5, dtype=torch.long),)), {"sequence": 8})
    assert not may_pad(bare)
    with pytest.raises(UsageError, match="is of shape"):
        filled(bare, (torch.zeros(2, 5, dtype=torch.long),))


def test_a_fixed_batch_takes_its_rows_and_leaves_out_the_rest(graph: Graph) -> None:
    pairs = fixed(graph, {"batch": 2})
    found = list(in_batches(pairs, [tuple(example().values())] * 2))
    assert [flat[0].shape for flat in found] == [(2, 9), (2, 9)]
    assert torch.equal(found[0][0], example()["input_ids"][:2])


def test_a_runner_of_a_fixed_length_gives_outputs_of_the_texts_own() -> None:
    def run(batch: dict[str, Tensor]) -> Tensor:
        assert batch["input_ids"].shape[1] == 9
        return (batch["input_ids"] * batch["attention_mask"])[..., None].float()

    text = {name: t[:, :4] for name, t in example().items()}
    assert torch.equal(at_length(run, 9)(text), (text["input_ids"] * text["attention_mask"])[..., None].float())
    with pytest.raises(UsageError, match="takes 3 tokens, and the data has 4"):
        at_length(run, 3)(text)
    with pytest.raises(UsageError, match="no mask to hide"):
        at_length(run, 9)({"input_ids": text["input_ids"]})
