"""Block-structured linears: what they mean by loops, by matrices and by einsum, what they cost, and that every road takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir import ops
from rewright.ir.blocks import ffn_blocks
from rewright.ir.capture import capture
from rewright.ir.cost import Cost, node_costs
from rewright.ir.graph import Graph
from rewright.ir.save import load_graph, save_graph

torch.set_num_threads(1)
OPS = torch.ops.rewright


def _cases(name: str, dtype: torch.dtype = torch.float64) -> list[tuple]:
    torch.manual_seed(0)
    return list(getattr(ops, name).cases(dtype, "cpu"))


# -- meanings -----------------------------------------------------------------------------------------------------------


def by_loops(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One middle value after the other, by the indices of specs/structured_ffn.md 6.1: x [n] -> y [l s]."""
    (k, q, p), (outs, s, _) = w1.shape, w2.shape
    x, y = F.pad(x, (0, k * p - len(x))), torch.zeros(outs * s, dtype=x.dtype)
    for t in range(k * q):
        (c, u), (rho, a) = divmod(t, q), divmod(t, outs)
        z = w1[c, u] @ x[c * p : (c + 1) * p]
        for i in range(s):
            y[i * outs + a] += w2[a, i, rho] * z
    return y


def by_matrices(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Block-diagonal matrices and permutation matrices."""
    (k, q, p), (outs, s, r) = w1.shape, w2.shape
    between = torch.zeros(k * q, k * q, dtype=x.dtype)
    behind = torch.zeros(outs * s, outs * s, dtype=x.dtype)
    for a in range(outs):
        for rho in range(r):
            between[a * r + rho, rho * outs + a] = 1
        for i in range(s):
            behind[i * outs + a, a * s + i] = 1
    x = F.pad(x, (0, k * p - x.shape[-1]))
    return x @ (behind @ torch.block_diag(*w2) @ between @ torch.block_diag(*w1)).T


def by_einsum(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    (k, _, p), (outs, _, r) = w1.shape, w2.shape
    x = F.pad(x, (0, k * p - x.shape[-1])).unflatten(-1, (k, p))
    middle = torch.einsum("...kp,kqp->...kq", x, w1).flatten(-2).unflatten(-1, (r, outs))
    return torch.einsum("...ra,asr->...sa", middle, w2).flatten(-2)


@pytest.mark.parametrize("case", range(4))
def test_a_shuffle_is_what_loops_matrices_and_einsum_compute(case: int) -> None:
    x, w1, w2, b = _cases("block_shuffle_linear")[case]
    y = OPS.block_shuffle_linear(x, w1, w2, b)
    rows = x.reshape(-1, x.shape[-1])
    for expected in (torch.stack([by_loops(row, w1, w2) for row in rows]), by_matrices(rows, w1, w2), by_einsum(rows, w1, w2)):
        expected = expected if b is None else expected[:, : len(b)] + b
        torch.testing.assert_close(y, expected.reshape(y.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", range(4))
def test_block_dense_is_a_block_diagonal_matrix_and_a_dense_one(case: int) -> None:
    x, v, u, b = _cases("block_dense_linear")[case]
    first = torch.block_diag(*v)[:, : x.shape[-1]]
    torch.testing.assert_close(OPS.block_dense_linear(x, v, u, b), F.linear(F.linear(x, first), u, b), rtol=1e-12, atol=1e-12)


def test_block_dense_is_a_shuffle_with_one_block_of_outputs() -> None:
    x, v, u, b = _cases("block_dense_linear")[1]
    torch.testing.assert_close(OPS.block_shuffle_linear(x, v, u[None], b), OPS.block_dense_linear(x, v, u, b), rtol=1e-12, atol=1e-12)


# -- roads --------------------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A feed-forward layer of both ops, 20 -> 36 -> 20."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(3, 12, 8))
        self.v, self.u = nn.Parameter(torch.randn(2, 7, 18)), nn.Parameter(torch.randn(20, 14))
        self.b = nn.Parameter(torch.randn(36))

    def forward(self, x: Tensor) -> Tensor:
        return x + OPS.block_dense_linear(F.gelu(OPS.block_shuffle_linear(x, self.w1, self.w2, self.b)), self.v, self.u)


@pytest.fixture(scope="module")
def model() -> Hidden:
    torch.manual_seed(0)
    return Hidden().eval()


@pytest.fixture(scope="module")
def graph(model: Hidden) -> Graph:
    return capture(model, (torch.randn(2, 5, 20),))


def test_the_compiled_ops_compute_the_same(model: Hidden) -> None:
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_a_captured_graph_takes_other_sizes_and_comes_back_from_a_file(model: Hidden, graph: Graph, tmp_path: Path) -> None:
    assert [n.target for n in graph.nodes if "block" in str(n.target)] == [OPS.block_shuffle_linear.default, OPS.block_dense_linear.default]
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    for shape in ((2, 5, 20), (1, 1, 20), (3, 9, 20)):
        x = torch.randn(shape)
        assert torch.equal(graph(x), model(x))
        assert torch.equal(loaded(x), model(x))


def test_a_captured_graph_trains(graph: Graph) -> None:
    module = graph.module
    module(torch.randn(2, 5, 20)).square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert set(gradients) == {"w1", "w2", "v", "u", "b"}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_feed_forward_blocks_have_them_as_projections(graph: Graph) -> None:
    (block,) = ffn_blocks(graph)
    assert (block.up.target, block.down.target, block.hidden) == (OPS.block_shuffle_linear.default, OPS.block_dense_linear.default, 36)


def test_costs_are_those_of_the_two_products(graph: Graph) -> None:
    costs = {c.op: c.cost for c in node_costs(graph)}
    assert costs["block_shuffle_linear"] == Cost(
        bytes=4 * (10 * 20 + 4 * 6 * 5 + 3 * 12 * 8 + 36 + 10 * 36), flops=2 * 10 * (4 * 6 * 5 + 3 * 12 * 8), launches=1
    )
    assert costs["block_dense_linear"] == Cost(bytes=4 * (10 * 36 + 2 * 7 * 18 + 20 * 14 + 10 * 20), flops=2 * 10 * (2 * 7 * 18 + 20 * 14), launches=1)
