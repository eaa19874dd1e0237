"""Verification sees what is wrong: drift in every measure, untrue metadata, changed signatures, ties that came apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.errors import PromiseBroken
from rewright.ir.graph import Graph
from rewright.ir.verify import Drift, check_structure, compare, drift, example_inputs, first_divergence, local_error, tolerance

aten = torch.ops.aten
NAN, INF = math.nan, math.inf


class Two(nn.Module):
    """Two linears with a relu between, over [batch, sequence, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def captured() -> Graph:
    torch.manual_seed(0)
    return capture(Two().eval(), (torch.randn(2, 5, 4),), dynamic_shapes={"x": {0: "batch", 1: "sequence"}})


@pytest.fixture
def graph(captured: Graph) -> Graph:
    return captured.clone()


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_equal_outputs_have_no_drift_also_with_nan_and_infinity() -> None:
    values = torch.tensor([[1.0, NAN, INF], [0.0, -INF, 2.0]])
    assert drift([values, 3], [values.clone(), 3]) == Drift(inputs=1)


def test_drift_is_measured_in_every_measure() -> None:
    found = drift([torch.tensor([[3.0, 4.0], [0.0, 2.0]])], [torch.tensor([[4.0, 3.0], [0.0, 2.0]])])
    assert not found.bit_equal
    assert (found.max_error, found.relative_error) == (1.0, 0.25)
    assert found.cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.agreement == 0.5


def test_a_tiny_error_next_to_large_values_is_seen_as_not_bit_equal() -> None:
    a = torch.tensor([1.0, 1e8])
    found = drift([a], [torch.tensor([1.0 + 2**-20, 1e8])])
    assert not found.bit_equal
    assert found.relative_error == pytest.approx(2**-20 / 1e8)


@pytest.mark.parametrize(("a", "b"), [(1.0, NAN), (NAN, 1.0), (INF, -INF), (1.0, INF)])
def test_a_value_that_is_not_finite_on_one_side_is_infinitely_wrong(a: float, b: float) -> None:
    found = drift([torch.tensor([a, 1.0])], [torch.tensor([b, 1.0])])
    assert found.max_error == found.relative_error == INF


def test_rows_of_zeros_agree_with_themselves() -> None:
    found = drift([torch.tensor([[0.0, 0.0], [1.0, 0.0]])], [torch.tensor([[0.0, 0.0], [1.0, 1e-3]])])
    assert found.cosine > 0.999


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([torch.ones(2)], [], "0 outputs where the original has 1"),
        ([torch.ones(2)], [torch.ones(3)], r"output 0 is torch.float32\[3\] where the original gives torch.float32\[2\]"),
        ([torch.ones(2)], [torch.ones(2).half()], r"output 0 is torch.float16\[2\]"),
        ([torch.ones(2), 3], [torch.ones(2), 4], "output 1 is 4 where the original gives 3"),
    ],
)
def test_other_shapes_dtypes_and_constants_break_the_promise(a: list, b: list, said: str) -> None:
    with pytest.raises(PromiseBroken, match=said):
        drift(a, b)


def test_drifts_add_up_to_the_worst() -> None:
    a, b = Drift(False, 1.0, 0.1, 0.9, 1.0, 1), Drift(True, 0.0, 0.0, 1.0, 0.5, 2)
    assert a & b == Drift(False, 1.0, 0.1, 0.9, 0.5, 3)


def test_the_tolerance_grows_with_depth_and_the_coarsest_dtype(graph: Graph) -> None:
    assert tolerance(graph) == pytest.approx(8 * torch.finfo(torch.float32).eps * math.sqrt(2))
    graph.add_constant("coarse", torch.ones(1, dtype=torch.bfloat16))
    assert tolerance(graph) > 1e-2


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_made_at_batch_one_and_other_sizes_of_every_dim(graph: Graph) -> None:
    made = list(example_inputs(graph, (torch.randn(2, 5, 4),)))
    assert [tuple(flat[0].shape) for flat in made] == [(2, 5, 4), (1, 4, 4), (3, 8, 4), (3, 2, 4)]
    assert compare(graph.run, graph.run, made).bit_equal


def test_made_ids_stay_within_the_given_ones() -> None:
    graph = capture(nn.Embedding(10, 4).eval(), (torch.tensor([[7, 9], [8, 7]]),))
    for flat in example_inputs(graph, (torch.tensor([[7, 9], [8, 7]]),)):
        assert set(flat[0].flatten().tolist()) <= {7, 8, 9}


def test_a_static_graph_is_tried_at_its_one_size() -> None:
    graph = capture(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), dynamic_shapes={})
    assert len(list(example_inputs(graph, (torch.ones(2, 4),)))) == 1


# -- structure --------------------------------------------------------------------------------------------------------


def test_an_untouched_and_a_truly_edited_graph_pass(graph: Graph) -> None:
    check_structure(graph, graph)
    edited = graph.clone()
    relu = edited.find(aten.relu.default)[0]
    relu.replace_all_uses_with(edited.insert(aten.gelu.default, relu.args[0], before=relu))
    edited.clean()
    check_structure(edited, graph)


def test_an_edit_without_metadata_is_found_out(graph: Graph) -> None:
    relu = graph.find(aten.relu.default)[0]
    relu.target = aten.sum.default
    with pytest.raises(PromiseBroken, match=r"relu \(no module\) claims torch.float32\[batch|relu .* claims torch.float32\[.*\] and gives torch.float32\[\]"):
        check_structure(graph)


def test_a_lie_about_a_value_is_found_out(graph: Graph) -> None:
    relu = graph.find(aten.relu.default)[0]
    relu.meta["val"] = relu.meta["val"].half()
    with pytest.raises(PromiseBroken, match="claims torch.float16"):
        check_structure(graph)


def test_operands_a_call_does_not_take_are_found_out(graph: Graph) -> None:
    linear = graph.find(aten.linear.default)[0]
    linear.update_arg(1, graph.add_constant("wrong", torch.ones(3, 3)))
    with pytest.raises(PromiseBroken, match=r"linear \(first\) does not take its operands"):
        check_structure(graph)


def test_a_use_before_the_definition_is_found_out(graph: Graph) -> None:
    first, second = graph.find(aten.linear.default)
    first.update_arg(0, second)
    with pytest.raises(PromiseBroken, match="malformed graph"):
        check_structure(graph)


def test_a_changed_output_is_found_out(graph: Graph) -> None:
    edited = graph.clone()
    last = edited.find(aten.linear.default)[-1]
    edited.output.update_arg(0, (edited.insert(aten.sum.default, last, before=edited.output),))
    with pytest.raises(PromiseBroken, match="output 0 was .* and is now"):
        check_structure(edited, graph)


def test_a_dynamic_size_that_became_static_is_found_out(graph: Graph) -> None:
    edited = graph.clone()
    last = edited.find(aten.linear.default)[-1]
    fixed = edited.insert(aten.slice.Tensor, last, 1, 0, 1, before=edited.output)
    edited.output.update_arg(0, (edited.insert(aten.expand.default, fixed, [-1, 5, -1], before=edited.output),))
    with pytest.raises(PromiseBroken, match="output 0 was"):
        check_structure(edited, graph)


def test_a_dynamic_dim_taken_for_a_number_is_found_out() -> None:
    graph = capture(Two().eval(), (torch.randn(2, 5, 4),), dynamic_shapes={"x": {0: "batch", 1: "sequence"}})
    check_structure(graph, graph)
    assert graph.symbols["sequence"] == 5  # a question that torch answers by fixing the size
    with pytest.raises(PromiseBroken, match=r"a dynamic dim was taken for its example's size: sequence = 5"):
        check_structure(graph, graph)


def test_another_signature_is_found_out(graph: Graph) -> None:
    other = capture(Two().eval(), (torch.randn(2, 5, 4),), dynamic_shapes={"x": {0: "batch", 1: "sequence"}})
    with pytest.raises(PromiseBroken, match="the signature changed"):
        check_structure(other, graph)


def test_tied_weights_that_came_apart_are_found_out(graph: Graph) -> None:
    graph.module.second.weight = graph.module.first.weight
    edited = graph.clone()
    check_structure(edited, graph)
    edited.module.second.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(PromiseBroken, match=r"the tied weights first.weight, second.weight came apart"):
        check_structure(edited, graph)


# -- the place --------------------------------------------------------------------------------------------------------


def test_the_first_wrong_value_is_named_with_its_layer(graph: Graph) -> None:
    flat = (torch.randn(2, 5, 4),)
    edited = graph.clone()
    assert first_divergence(graph, edited, flat, 1e-6) is None
    edited.module.second.bias = nn.Parameter(edited.module.second.bias + 1)
    found = first_divergence(graph, edited, flat, 1e-6)
    assert found is not None
    assert found[:2] == ("linear_1", "second")


class Quantized(nn.Module):
    """An activation between layers, the second in 8 bits: spelt out, with some rounding error, as torch has it, or by tanh."""

    def __init__(self, how: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.how, self.up = how, nn.Linear(32, 64)
        self.up.weight.data = torch.randn(64, 32, generator=generator)
        self.register_buffer("w", torch.randint(-127, 128, (16, 64), generator=generator, dtype=torch.int8))
        self.register_buffer("scale", torch.full((16,), 0.01))
        self.register_buffer("step", torch.tensor(0.1))
        self.register_buffer("zero", torch.tensor(2, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        gelu = nn.functional.gelu(x, approximate="tanh" if self.how == "tanh" else "none")
        x = x * 0.500001 * (1 + torch.erf(x / math.sqrt(2.0))) if self.how == "parts" else gelu
        return torch.ops.rewright.linear_int8_static(x, self.step, self.zero, self.w, self.scale, None)


def test_what_a_rounding_layer_reads_is_compared_before_it_is_rounded() -> None:
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    bias = torch.randn(64)
    graphs = []
    for how in ("parts", "gelu", "tanh"):
        model = Quantized(how).eval()
        model.up.bias.data = bias
        graphs.append(capture(model, (x,)))
    parts, gelu, tanh = graphs
    step = float(drift(parts.run((x,)), gelu.run((x,))).relative_error)
    assert step > 1e-4, "some codes are others"
    assert local_error(parts, gelu, (x,)) < 3e-6
    assert local_error(parts, tanh, (x,)) > 1e-5, "another function is found out"
