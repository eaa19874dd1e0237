"""A diff shows what a rewrite did and nothing else: ops, weights, costs, the lines that changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.diff import diff
from rewright.ir.graph import Graph

aten = torch.ops.aten


@pytest.fixture(scope="module")
def graph() -> Graph:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    return capture(Model().eval(), (torch.randn(2, 4),))


def test_a_graph_and_its_clone_are_equal(graph: Graph) -> None:
    found = diff(graph, graph.clone())
    assert found.equal
    assert (found.ops, found.text) == ({}, "")


def test_a_replaced_op_is_counted_and_shown(graph: Graph) -> None:
    edited = graph.clone()
    relu = edited.find(aten.relu.default)[0]
    relu.replace_all_uses_with(edited.insert(aten.gelu.default, relu.args[0], before=relu))
    edited.clean()
    found = diff(graph, edited)
    assert found.ops == {"gelu": (0, 1), "relu": (1, 0)}
    assert found.calls == (3, 3)
    changed = [line for line in found.text.splitlines()[2:] if line[0] in "+-"]
    assert [line.split(" = ")[0] for line in changed] == ["-relu", "-linear_1", "+gelu", "+linear_1"]
    assert changed[0] == "-relu = relu(linear)  # f32[batch, 8]"
    assert not found.equal


def test_new_and_gone_weights_are_named(graph: Graph) -> None:
    edited = graph.clone()
    up = edited.find(aten.linear.default)[0]
    up.update_arg(2, edited.add_constant("up.other", torch.ones(8, dtype=torch.float64)))
    edited.clean()
    found = diff(graph, edited)
    assert (found.removed_weights, found.added_weights) == (("up.bias",), ("up.other",))
    assert found.weight_bytes[1] - found.weight_bytes[0] == 8 * 8 - 8 * 4
    assert found.flops[0] == found.flops[1]
