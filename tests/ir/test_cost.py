"""Costs are counted as written down: each operand read once, each result written once, two FLOPs a multiply-add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir import ops
from rewright.ir.capture import capture
from rewright.ir.cost import Cost, cost, node_costs
from rewright.ir.graph import Graph


@pytest.fixture(scope="module")
def graph() -> Graph:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x).view(x.shape[0], 2, 8))

    return capture(Model().eval(), (torch.randn(4, 8),))


def by_op(graph: Graph, **sizes: int) -> dict[str, Cost]:
    return {c.op: c.cost for c in node_costs(graph, sizes)}


def test_a_linear_reads_its_weight_once_and_counts_two_flops_a_multiply_add(graph: Graph) -> None:
    assert by_op(graph)["linear"] == Cost(bytes=4 * (4 * 8 + 16 * 8 + 16 + 4 * 16), flops=2 * 4 * 16 * 8, launches=1)


def test_views_cost_nothing(graph: Graph) -> None:
    assert set(by_op(graph)) == {"linear", "relu"}


def test_other_sizes_are_counted_without_another_capture(graph: Graph) -> None:
    assert by_op(graph, batch=40)["linear"].flops == 10 * by_op(graph)["linear"].flops
    assert by_op(graph, batch=40)["relu"].bytes == 10 * by_op(graph)["relu"].bytes


def test_the_total_is_the_sum_of_the_nodes(graph: Graph) -> None:
    total = by_op(graph)["linear"] + by_op(graph)["relu"]
    assert cost(graph) == total
    assert cost(graph) - total == Cost()


def test_a_node_knows_its_layer_and_weight_bytes(graph: Graph) -> None:
    linear = next(iter(node_costs(graph)))
    assert (linear.layer, linear.weight_bytes, linear.dtype) == ("linear", 4 * (16 * 8 + 16), torch.float32)


def test_an_embedding_reads_rows_not_the_table() -> None:
    graph = capture(nn.Embedding(1000, 8).eval(), (torch.zeros(2, 3, dtype=torch.long),))
    assert cost(graph).bytes == 2 * (6 * 8 * 4) + 6 * 8


class Nibbles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.zeros(1000, 2, 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(1000, 2))
        self.register_buffer("out", torch.zeros(10, 2, 8, dtype=torch.uint8))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.ops.rewright.embedding_nbits(ids, self.w, self.scale, None, 4, 16)
        return torch.ops.rewright.linear_nbits(x, self.out, self.scale[:10], None, None, 4, 16)


def test_codes_of_4_bits_are_half_a_byte_and_their_products_those_of_floats() -> None:
    found = {c.op: c for c in node_costs(capture(Nibbles().eval(), (torch.zeros(2, 3, dtype=torch.long),)))}
    assert found["embedding_nbits"].cost.bytes == 6 * (8 + 32 / 2 + 2 * 4) + 6 * 32 * 4
    product = found["linear_nbits"]
    assert product.cost == Cost(bytes=4 * 6 * 32 + 10 * 32 // 2 + 10 * 2 * 4 + 4 * 6 * 10, flops=2 * 6 * 10 * 32, launches=1)
    assert product.dtype == torch.float32


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("linear_int8_dynamic", torch.int8), ("linear_int8_static", torch.int8), ("linear_token", torch.int8), ("linear_fp8", torch.float8_e4m3fn)],
)
def test_a_product_of_two_quantized_operands_counts_in_their_arithmetic(op: str, dtype: torch.dtype) -> None:
    case = next(getattr(ops, op).cases(torch.float32, "cpu"))
    others = case[1:]
    graph = capture(_Call(op, others), (case[0],))
    (found,) = node_costs(graph)
    assert found.dtype == dtype
    assert found.cost.flops == 2 * case[0].numel() * others[-1 if op != "linear_token" else -2].numel()


class _Call(nn.Module):
    def __init__(self, op: str, others: tuple) -> None:
        super().__init__()
        self.op, self.others = op, others
        for i, other in enumerate(others):
            if isinstance(other, Tensor):
                self.register_buffer(f"_{i}", other)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.rewright, self.op)(x, *(getattr(self, f"_{i}") if isinstance(o, Tensor) else o for i, o in enumerate(self.others)))


def test_attention_counts_both_products() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, kv = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    assert cost(capture(Attend().eval(), (q, kv, kv), dynamic_shapes={})).flops == 2 * (2 * 2 * 3 * 5 * 7 * 8)


def test_all_forms_of_attention_are_one_kind_and_causal_ones_another() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, ...]:
            packed = q.transpose(1, 2).flatten(2)
            ours, sdpa = torch.ops.rewright, nn.functional.scaled_dot_product_attention
            return sdpa(q, q, q), ours.attention(q, q, q), ours.multi_head_attention(packed, packed, packed, 3, 3), sdpa(q, q, q, is_causal=True)

    kinds = [c.kind for c in node_costs(capture(Attend().eval(), (torch.randn(2, 3, 5, 8),))) if "attention" in c.op]
    assert kinds == ["attention"] * 3 + ["attention_causal"]


class Matches(nn.Module):
    def forward(self, x: Tensor, candidates: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        default, own = torch.ops.rewright.token_match(x, 3, 1), torch.ops.rewright.token_match(x, 3, 1, None, candidates, targets)
        return *default, *own, *torch.ops.rewright.token_match_energy(x, 3, 1)


def test_a_match_counts_the_products_of_the_pairs_it_compares() -> None:
    graph = capture(Matches(), (torch.randn(2, 12, 8), torch.arange(1, 9), torch.arange(9, 12)), dynamic_shapes={"x": {0: "batch"}})
    flops = [c.cost.flops for c in node_costs(graph)]
    assert flops == [2 * 2 * 8 * 6 * 5, 2 * 2 * 8 * 8 * 3, 2 * 2 * 8 * 11 * 11]
    assert [c.cost.flops for c in node_costs(graph, {"batch": 6})] == [3 * f for f in flops]


class Weighed(nn.Module):
    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return torch.ops.rewright.multi_head_attention(x, x, x, 2, 2, sizes=sizes)


def test_sizes_add_no_product_to_attention() -> None:
    assert cost(capture(Weighed(), (torch.randn(2, 5, 8), torch.ones(2, 5)))).flops == 2 * (2 * 2 * 5 * 5 * 8)


def test_a_convolution_counts_its_window() -> None:
    graph = capture(nn.Conv2d(3, 6, 5, padding=2).eval(), (torch.randn(1, 3, 9, 9),), dynamic_shapes={})
    assert cost(graph).flops == 2 * (6 * 9 * 9) * (3 * 5 * 5)


def test_costs_need_no_weights() -> None:
    with torch.device("meta"):
        graph = capture(nn.Linear(8, 16).eval(), (torch.empty(4, 8),))
    assert cost(graph).flops == 2 * 4 * 16 * 8
