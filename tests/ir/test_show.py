"""A graph prints as Python a person can read: calls, shapes by the names of their dims, the module beside them."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.ir.show import kind, show


class Model(nn.Module):
    """A linear layer, its argmax and a half-precision copy, joined end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = self.layer(x).max(-1)
        return torch.cat([values, values]).half(), places


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Model().eval(), (torch.randn(2, 4),))


def test_the_program_reads_as_python(graph: Graph) -> None:
    text = show(graph)
    assert ast.parse(text.replace("f32[batch, 4]", "object"))
    assert text.startswith("def forward(x: f32[batch, 4]):\n")
    assert text.splitlines()[1].strip().startswith('linear = linear(x, W["layer.weight"], W["layer.bias"])')
    assert text.splitlines()[1].endswith("layer")
    assert "getitem = max_1[0]" in text
    assert "cat = cat([getitem, getitem])" in text
    assert text.splitlines()[-1].strip().startswith("return (")


def test_shapes_carry_the_names_of_dims_also_in_expressions(graph: Graph) -> None:
    assert "# f32[batch, 3]" in show(graph)
    assert "# (f32[batch], i64[batch])" in show(graph)
    assert "# f32[2*batch]" in show(graph)


def test_a_prefix_shows_one_module(graph: Graph) -> None:
    lines = show(graph, "layer").splitlines()
    assert len(lines) == 3
    assert "linear(" in lines[1]
    assert "linear(" not in show(graph, "lay")


def test_kinds_of_values() -> None:
    assert kind(torch.ones(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert kind((torch.ones(1), torch.ones((), dtype=torch.bool))) == "(f32[1], bool[])"
    assert kind(3) == "int"
