"""The matcher: spellings that must not matter, and misses that say why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.ir.pattern import Match, Miss, Pattern

torch.set_num_threads(1)


def _graph(forward: Callable[..., Any], *inputs: Tensor) -> Graph:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x, y):
            return forward(self, x, y)

    return capture(Small(), inputs or (torch.randn(3, 8), torch.randn(3, 8)))


def _matches(graph: Graph, pattern: Callable[..., Any]) -> list[Match]:
    compiled = Pattern(pattern)
    return [m for n in compiled.candidates(graph) if isinstance(m := compiled.match(graph, n), Match)]


def _miss(graph: Graph, pattern: Callable[..., Any]) -> Miss:
    compiled = Pattern(pattern)
    found = compiled.match(graph, compiled.candidates(graph)[-1])
    assert isinstance(found, Miss)
    return found


def _silu(op, x):
    return op.mul(x, op.sigmoid(x))


def test_operands_of_commutative_ops_match_in_either_order() -> None:
    assert len(_matches(_graph(lambda m, x, y: x * x.sigmoid()), _silu)) == 1
    assert len(_matches(_graph(lambda m, x, y: x.sigmoid() * x), _silu)) == 1
    assert not _matches(_graph(lambda m, x, y: y - x.sigmoid()), lambda op, x, y: op.sub(op.sigmoid(x), y))


def test_a_wildcard_used_twice_must_be_one_value() -> None:
    miss = _miss(_graph(lambda m, x, y: y * x.sigmoid()), _silu)
    assert miss.fitted == 2
    assert miss.why == "x is the input y in one place and the input x in another"


def test_no_ops_are_looked_through_and_casts_where_the_pattern_says_so() -> None:
    assert len(_matches(_graph(lambda m, x, y: x * x.sigmoid().contiguous().view(x.shape)), _silu)) == 1
    halved = _graph(lambda m, x, y: (x * x.sigmoid()).to(torch.float16) * y.to(torch.float16))
    assert not _matches(halved, lambda op, x, y: op.mul(op.mul(x, op.sigmoid(x)), y))
    assert len(_matches(halved, lambda op, x, y: op.mul(op.maybe_cast(op.mul(x, op.sigmoid(x))), y))) == 1
    assert len(_matches(_graph(lambda m, x, y: x * x.sigmoid() * y), lambda op, x, y: op.mul(op.maybe_cast(op.mul(x, op.sigmoid(x))), y))) == 1


def test_what_a_pattern_leaves_out_must_have_its_default() -> None:
    assert len(_matches(_graph(lambda m, x, y: torch.add(x, y)), lambda op, x, y: op.add(x, y))) == 1
    miss = _miss(_graph(lambda m, x, y: torch.add(x, y, alpha=2)), lambda op, x, y: op.add(x, y))
    assert miss.why == "add has alpha=2, the pattern has the default"
    assert miss.node is not None
    assert miss.node.name == "add"


def test_literals_match_to_seven_digits_and_in_one_element_weights() -> None:
    assert len(_matches(_graph(lambda m, x, y: x * 0.70710678), lambda op, x: op.mul(x, 0.5**0.5))) == 1
    assert len(_matches(_graph(lambda m, x, y: x.pow(3.0)), lambda op, x: op.pow(x, 3))) == 1
    assert len(_matches(_graph(lambda m, x, y: x * torch.tensor([0.5])), lambda op, x: op.mul(x, 0.5))) == 1
    assert "stands where 0.5 was expected" in _miss(_graph(lambda m, x, y: x * 0.51), lambda op, x: op.mul(x, 0.5)).why


def test_lists_match_item_by_item() -> None:
    def pattern(op, x, y):
        return op.cat([op.neg(x), y], -1)

    assert len(_matches(_graph(lambda m, x, y: torch.cat([-x, y], -1)), pattern)) == 1
    assert _miss(_graph(lambda m, x, y: torch.cat([-x, y, y], -1)), pattern).why.endswith("stands where a list of 2 was expected")


def test_shape_arguments_take_no_part() -> None:
    graph = _graph(lambda m, x, y: x.reshape(-1, 2, 4).relu())
    assert len(_matches(graph, lambda op, x: op.relu(op.reshape(x, op.anything)))) == 0  # the capture says view
    assert len(_matches(graph, lambda op, x: op.relu(op.view(x, op.anything)))) == 1


def test_several_outputs_are_found_from_the_first() -> None:
    def pattern(op, x, y):
        h = op.add(x, y)
        return op.relu(h), h

    graph = _graph(lambda m, x, y: ((h := x + y).relu(), h * 2))
    (m,) = _matches(graph, pattern)
    assert [n.name for n in m.outputs] == ["relu", "add"]
    assert (m.x.name, m.y.name) == ("x", "y")


def test_items_of_a_call_with_several_results_match_by_index() -> None:
    def pattern(op, x):
        parts = op.split(x, 4, -1)
        return op.mul(parts[0], op.sigmoid(parts[1]))

    assert len(_matches(_graph(lambda m, x, y: (lambda a, b: a * b.sigmoid())(*x.chunk(2, -1))), pattern)) == 1
    assert not _matches(_graph(lambda m, x, y: (lambda a, b: b * a.sigmoid())(*x.chunk(2, -1))), pattern)


def test_a_weight_can_be_asked_for() -> None:
    def pattern(op, x, w):
        return op.add(op.relu(x), op.weight(w))

    assert len(_matches(_graph(lambda m, x, y: x.relu() + m.w), pattern)) == 1
    assert _miss(_graph(lambda m, x, y: x.relu() + y), pattern).why == "the input y stands where a weight was expected"


def test_either_tries_spellings_in_order() -> None:
    def pattern(op, x):
        return op.either(op.square(x), op.pow(x, 2), op.mul(x, x))

    for spelling in (torch.square, lambda x: x**2, lambda x: x * x):
        assert len(_matches(_graph(lambda m, x, y, f=spelling: f(x)), pattern)) == 1


def test_the_nearest_miss_names_the_node_and_the_reason() -> None:
    def pattern(op, x):
        return op.mul(x, op.sigmoid(op.mul(x, 1.702)))

    miss = _miss(_graph(lambda m, x, y: x * torch.sigmoid(x * 1.7)), pattern)
    assert miss.fitted == 3
    assert miss.why == "1.7 stands where 1.702 was expected"
    assert str(miss).endswith("(3 calls fitted)")


def test_matching_is_linear_in_the_nodes() -> None:
    def chain(length: int) -> float:
        graph = _graph(lambda m, x, y: x.relu())
        node = graph.nodes[-1]
        for _ in range(length):
            node = graph.insert(torch.ops.aten.relu.default, node, before=graph.output)
        graph.output.args = ((node,),)
        compiled = Pattern(lambda op, x: op.relu(op.relu(x)))
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            assert sum(isinstance(compiled.match(graph, n), Match) for n in compiled.candidates(graph)) == length
            best = min(best, time.perf_counter() - start)
        return best

    assert chain(2000) < 25 * chain(200) + 0.01  # quadratic would be 100 times


def test_every_matched_call_is_reported_once() -> None:
    (m,) = _matches(_graph(lambda m, x, y: x * x.sigmoid()), _silu)
    assert [n.name for n in m.nodes] == ["sigmoid", m.anchor.name]
    assert isinstance(m.anchor, fx.Node)
