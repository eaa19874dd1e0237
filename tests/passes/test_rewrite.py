"""The driver: what it refuses to tear apart, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.errors import PromiseBroken
from rewright.ir.graph import Graph
from rewright.passes.rewrite import Context, Rewrite, near_misses

torch.set_num_threads(1)


class ToSiLU(Rewrite):
    """x * sigmoid(x) -> silu(x)"""

    name = "to-silu"

    def pattern(self, op, x):
        return op.mul(x, op.sigmoid(x))

    def rewrite(self, op, m):
        return op.silu(m.x)


class AddRelu(Rewrite):
    """(relu(x + y), x + y) -> (relu(z), z) with z = 1 (x + y), to see two outputs move together."""

    name = "add-relu"
    once = True

    def pattern(self, op, x, y):
        h = op.add(x, y)
        return op.relu(h), h

    def rewrite(self, op, m):
        z = op.mul(op.add(m.x, m.y), 1.0)
        return op.relu(z), z


def _capture(module: nn.Module) -> Graph:
    return capture(module, (torch.randn(3, 8), torch.randn(3, 8)))


def _module(function: Any) -> nn.Module:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, y):
            return function(self, x, y)

    return Small()


def _equal(module: nn.Module, graph: Graph) -> bool:
    graph.recompile()
    x, y = torch.randn(1, 8), torch.randn(1, 8)
    with torch.no_grad():
        a, b = module(x, y), graph(x, y)
    pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in pairs)


def _targets(graph: Graph) -> list[str]:
    return [str(n.target).removeprefix("aten.").split(".")[0] for n in graph.nodes]


def test_applies_and_logs_the_module_path() -> None:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = Act()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.act(x) + y

    module, context = Outer(), Context()
    graph = ToSiLU().run(_capture(module), context)
    assert _targets(graph) == ["silu", "add"]
    assert (context.matched, context.applied, context.declined) == (1, ["act"], [])
    assert graph.nodes[0].meta["path"] == "act"
    assert _equal(module, graph)


def test_declines_an_inner_value_that_is_read_elsewhere_and_names_the_reader() -> None:
    module, context = _module(lambda m, x, y: x * (s := x.sigmoid()) + s.relu()), Context()
    graph = ToSiLU().run(_capture(module), context)
    assert "silu" not in _targets(graph)
    assert [d.why for d in context.declined] == ["sigmoid is also read by relu"]


def test_declines_an_inner_value_that_is_an_output_of_the_model() -> None:
    module, context = _module(lambda m, x, y: (x * (s := x.sigmoid()), s)), Context()
    ToSiLU().run(_capture(module), context)
    assert [d.why for d in context.declined] == ["sigmoid is also an output of the model"]


def test_a_dead_cast_of_an_inner_value_goes_with_the_match() -> None:
    module = _module(lambda m, x, y: x * x.sigmoid().contiguous())
    graph = ToSiLU().run(_capture(module), Context())
    assert _targets(graph) == ["silu"]


def test_two_outputs_with_a_reader_between_them_are_both_replaced() -> None:
    module, context = _module(lambda m, x, y: ((h := x + y), h.exp() + h.relu(), h * 2)[1:]), Context()
    graph = AddRelu().run(_capture(module), context)
    assert len(context.applied) == 1
    assert _targets(graph).count("relu") == 1
    assert _equal(module, graph)


def test_applies_to_a_fixpoint_and_once_when_asked() -> None:
    class Collapse(Rewrite):
        name = "collapse"

        def pattern(self, op, x):
            return op.neg(op.neg(op.neg(x)))

        def rewrite(self, op, m):
            return op.neg(m.x)

    class Grow(Rewrite):
        name = "grow"
        once = True

        def pattern(self, op, x):
            return op.neg(x)

        def rewrite(self, op, m):
            return op.neg(op.abs(m.x))

    module, context = _module(lambda m, x, y: x.neg().neg().neg().neg().neg().neg().neg()), Context()
    assert _targets(Collapse().run(_capture(module), Context())) == ["neg"]
    assert _targets(Grow().run(_capture(module), context)) == ["abs", "neg"] * 7


def test_a_replacement_of_another_shape_breaks_its_promise() -> None:
    class Wrong(ToSiLU):
        def rewrite(self, op, m):
            return op.sum(m.x, [0], True)

    with pytest.raises(PromiseBroken, match=r"to-silu at mul.*: .* was torch.float32\[s\d+, 8\], its replacement is torch.float32\[1, 8\]"):
        Wrong().run(_capture(_module(lambda m, x, y: x * x.sigmoid())), Context())


def test_a_replacement_of_another_dtype_breaks_its_promise() -> None:
    class Wrong(ToSiLU):
        def rewrite(self, op, m):
            return op.gt(m.x, 0.0)

    with pytest.raises(PromiseBroken, match=r"its replacement is torch.bool"):
        Wrong().run(_capture(_module(lambda m, x, y: x * x.sigmoid())), Context())


def test_a_rewrite_that_returns_too_few_values_breaks_its_promise() -> None:
    class Wrong(AddRelu):
        def rewrite(self, op, m):
            return op.relu(m.x)

    with pytest.raises(PromiseBroken, match="the pattern returns 2 values, the rewrite 1"):
        Wrong().run(_capture(_module(lambda m, x, y: ((h := x + y), h.relu())[1])), Context())


def test_why_not_is_logged_with_node_and_layer() -> None:
    class Never(ToSiLU):
        def why_not(self, m):
            return "it is Sunday"

    context = Context()
    Never().run(_capture(_module(lambda m, x, y: m.inner(x) * m.inner(x).sigmoid() + x * x.sigmoid())), context)
    assert [d.why for d in context.declined] == ["it is Sunday"]
    assert context.declined[0].node.startswith("mul")


def test_a_lossy_rewrite_leaves_what_the_user_asked_to_leave() -> None:
    class Lossy(Rewrite):
        name = "lossy"
        exact = False

        def pattern(self, op, x, w, b):
            return op.linear(x, w, b)

        def rewrite(self, op, m):
            return op.mul(op.linear(m.x, m.w, m.b), 1.0)

    Lossy.once = True
    context = Context(ignore=("inner",))
    Lossy().run(_capture(_module(lambda m, x, y: m.inner(x))), context)
    assert [d.why for d in context.declined] == ["the user asked to leave inner alone"]
    context = Context(ignore=("inn",))
    Lossy().run(_capture(_module(lambda m, x, y: m.inner(x))), context)
    assert context.declined == []


def test_near_misses_come_closest_first() -> None:
    graph = _capture(_module(lambda m, x, y: x * y + x.sigmoid() * y))
    misses = near_misses(graph, ToSiLU())
    assert [m.fitted for m in misses] == [2, 1]
    assert "in one place and" in misses[0].why
