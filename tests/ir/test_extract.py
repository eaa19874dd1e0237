"""A part of a program as a program of its own."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rewright.ir.capture import capture
from rewright.ir.extract import extract
from rewright.ir.graph import Graph

aten = torch.ops.aten


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(x)
        z = nn.functional.silu(self.gate(h)) * self.up(h)
        return h + self.down(z.reshape(h.shape[0], -1, 16)) * y


def captured() -> tuple[Graph, dict[str, fx.Node], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    graph = capture(Gated(), (x, y))
    return graph, {n.meta["path"]: n for n in graph.find(aten.linear.default)}, (x, y)


def test_a_part_computes_what_the_program_computes_there_with_the_same_names_and_weights() -> None:
    graph, linears, _ = captured()
    part = extract(graph, [linears["first"]], [linears["down"]])
    assert isinstance(part, Graph)
    assert {n.name for n in part.nodes} < {n.name for n in graph.nodes} and part.inputs[0].name == linears["first"].name
    assert set(part.weights()) == {f"{m}.{w}" for m in ("gate", "up", "down") for w in ("weight", "bias")}
    assert all(t is graph.weights()[name] for name, t in part.weights().items())
    assert set(part.dims) == set(graph.dims)  # a batch and a length
    model = graph.module
    for size in ((3, 5), (1, 9)):
        h = torch.randn(*size, 8)
        want = linear(model, "down", nn.functional.silu(linear(model, "gate", h)) * linear(model, "up", h))
        assert torch.equal(part.run((h,))[0], want) and torch.equal(part(h)[0], want)


def linear(model: nn.Module, name: str, x: Tensor) -> Tensor:
    m: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
    return nn.functional.linear(x, m.weight, m.bias).detach()


def test_a_part_can_be_edited_and_the_program_stays_as_it_was() -> None:
    graph, linears, flat = captured()
    before, code = graph.run(flat)[0], graph.module.code
    part = extract(graph, [linears["first"]], [linears["gate"], linears["up"]])
    assert isinstance(part, Graph)
    gate = part.find(aten.linear.default)[0]
    weight = part.add_weight("halved", lambda w: w / 2, str(gate.args[1].target), like=gate)  # type: ignore[union-attr]
    gate.args = (gate.args[0], weight, gate.args[2])
    part.clean()
    part.propagate()
    assert len(part.run((flat[0],))) == 2
    graph.recompile()
    assert torch.equal(graph.run(flat)[0], before) and graph.module.code == code


def test_a_part_that_needs_another_value_is_refused_with_its_name() -> None:
    graph, linears, _ = captured()
    assert extract(graph, [linears["first"]], list(graph.output.all_input_nodes)) == f"y is read besides {linears['first'].name}"


def test_a_size_that_no_input_has_is_refused_with_what_it_is_of() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x.sum(1, keepdim=True) * 2).expand(-1, y.shape[1], -1)

    graph = capture(Model(), (torch.randn(3, 5, 8), torch.zeros(3, 7, dtype=torch.long)))
    pooled = next(n for n in graph.nodes if n.name.startswith("mul"))
    said = extract(graph, [pooled], list(graph.output.all_input_nodes))
    assert said == f"y is read besides {pooled.name}"
