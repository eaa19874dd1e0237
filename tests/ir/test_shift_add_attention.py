"""Additive attention: its products only add, its codes have a slope, padding counts for nobody, and onnxruntime agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewright.backends.onnx.export import Profile, export
from rewright.ir.capture import capture
from rewright.ir.ops import shift_add_attention as op

torch.set_num_threads(1)
F64 = torch.float64
CASES = range(3)


def case(i: int, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return [tuple(c) for c in op.cases(dtype, "cpu")][i]


def run(*arguments: Any) -> Tensor:
    return torch.ops.rewright.shift_add_attention(*arguments)


# -- meaning ------------------------------------------------------------------------------------------------------------


def bits(row: list[float]) -> list[bool]:
    return [x > math.fsum(row) / len(row) for x in row]


def sums_by_adding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Bq (Bk^T v) with additions alone: a token's value goes to the sums of its key's bits, a query's bits choose among those sums."""
    b, h, n, d = q.shape
    out = torch.zeros(b, h, n, v.shape[-1], dtype=v.dtype)
    for i in range(b):
        for head in range(h):
            sums = torch.zeros(d, v.shape[-1], dtype=v.dtype)
            for t in range(n):
                if mask is None or mask[i, t]:
                    sums.index_add_(0, torch.tensor(bits(k[i, head, t].tolist())).nonzero().squeeze(1), _rows(v[i, head, t], k[i, head, t]))
            for t in range(n):
                for c in torch.tensor(bits(q[i, head, t].tolist())).nonzero().squeeze(1).tolist():
                    out[i, head, t] += sums[c]
    return out


def _rows(value: Tensor, key: Tensor) -> Tensor:
    return value.expand(sum(bits(key.tolist())), -1)


@pytest.mark.parametrize("i", CASES)
def test_both_products_are_additions_bit_for_bit(i: int) -> None:
    q, k, v, _, _, mask = case(i)
    whole = (v * 8).round()  # integers: sums of any order are the same
    found = op.sums_over_codes(q, k, whole if mask is None else whole.masked_fill(~mask[:, None, :, None], 0))
    assert torch.equal(found, sums_by_adding(q, k, whole, mask))
    assert found.abs().max() > 0


@pytest.mark.parametrize("i", CASES)
def test_the_op_is_what_loops_over_tokens_compute(i: int) -> None:
    q, k, v, conv, gain, mask = case(i)
    taps, sums = conv.shape[-1], sums_by_adding(q, k, v, mask)
    found = run(q, k, v, conv, gain, mask)
    for b in range(q.shape[0]):
        real = [t for t in range(q.shape[2]) if mask is None or mask[b, t]]
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                own = v[b, h, t] if t in real else torch.zeros_like(v[b, h, t])
                o = 0.5 * own + sums[b, h, t] / math.pi
                length = float(o.norm())
                local = sum((conv[h, :, s - t + taps // 2] * v[b, h, s] for s in real if abs(s - t) <= taps // 2), torch.zeros_like(own))
                expected = (o / length if length else o) * gain[h] + local
                torch.testing.assert_close(found[b, h, t], expected, rtol=1e-6, atol=1e-6)


class Products(TorchDispatchMode):
    """The operands of every product that sums over tokens or channels."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[list[Tensor]] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("mm", "bmm", "addmm", "baddbmm", "matmul", "dot", "mv", "addmv", "einsum", "linear"):
            self.operands.append([a.detach().clone() for a in args if isinstance(a, Tensor)])
        self.others.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("i", CASES)
def test_every_product_over_tokens_or_channels_has_an_operand_of_zeros_and_ones(i: int) -> None:
    with torch.no_grad(), Products() as seen:
        run(*case(i, torch.float32))
    assert len(seen.operands) == 2
    for operands in seen.operands:
        codes = [a for a in operands if bool(((a == 0) | (a == 1)).all())]
        assert len(codes) == 1 and 0 < codes[0].mean() < 1
    assert {"softmax", "_softmax", "exp"}.isdisjoint(seen.others)


def test_the_filter_is_the_only_weighted_sum_and_is_over_nine_neighbours_of_one_channel() -> None:
    q, k, v, conv, gain, _ = case(1)
    other = v.clone()
    other[0, 1, 20, 3] += 1  # head 1, token 20, channel 3
    alone = [run(torch.zeros_like(q), torch.zeros_like(k), x, conv, torch.zeros_like(gain)) for x in (v, other)]
    moved = (alone[0] != alone[1]).nonzero()
    assert {tuple(place) for place in moved[:, [0, 1, 3]].tolist()} == {(0, 1, 3)}
    assert moved[:, 2].tolist() == list(range(16, 25))


def test_padding_counts_for_nobody_and_does_not_shift_the_filter() -> None:
    q, k, v, conv, gain, _ = case(2, torch.float32)
    mask = torch.ones(3, 19, dtype=torch.bool)
    mask[:, 12:] = False
    short = run(*(t[:, :, :12] for t in (q, k, v)), conv, gain)
    for junk in (1.0, 1e4):
        padded = [torch.cat([t[:, :, :12], junk * torch.randn(3, 2, 7, 16)], 2) for t in (q, k, v)]
        torch.testing.assert_close(run(*padded, conv, gain, mask)[:, :, :12], short, rtol=1e-5, atol=1e-5)


# -- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", CASES)
def test_values_filter_and_gain_have_the_gradients_finite_differences_confirm(i: int) -> None:
    q, k, v, conv, gain, mask = case(i)
    v = v + (v == 0) * 0.1  # a row of length 0 has no slope
    inputs = tuple(t.clone().requires_grad_() for t in (v, conv, gain))
    real = None if mask is None else torch.ones_like(mask).index_fill(1, torch.tensor([1]), False)
    keep = slice(None) if real is None else slice(2, None)
    assert torch.autograd.gradcheck(lambda v, conv, gain: run(q, k, v, conv, gain, real)[:, :, keep].double(), inputs, rtol=1e-3, atol=1e-4, eps=1e-4)


def test_codes_are_zero_and_one_with_and_without_a_gradient_and_learn_within_a_deviation_of_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 16, requires_grad=True)
    codes = op.code(x)
    assert torch.equal(codes.detach(), op.code(x.detach())) and set(codes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(op.code(x.detach() * 7), op.code(x.detach())), "the length of a row is no matter"
    assert op.code(torch.zeros(1, 8)).sum() == 0
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((codes * direction).sum(), x)
    row = x.detach().requires_grad_()
    apart = (row - row.mean(-1, keepdim=True)) / row.std(-1, keepdim=True, correction=0)
    inside = apart.detach().abs() < 1
    assert 0.5 < inside.double().mean() < 0.9
    (expected,) = torch.autograd.grad((0.5 * apart * inside * direction).sum(), row)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_queries_and_keys_learn_what_their_codes_cost() -> None:
    """Steps along the straight-through gradient lower a loss that only the codes can lower."""
    torch.manual_seed(0)
    q, k, v, conv, gain = (*torch.randn(3, 1, 2, 33, 16), torch.zeros(2, 16, 9), torch.ones(2))
    wanted = run(*torch.randn(2, 1, 2, 33, 16), v, conv, gain)
    q, k = q.requires_grad_(), k.requires_grad_()
    optimizer = torch.optim.Adam([q, k], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (run(q, k, v, conv, gain) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert q.grad is not None and k.grad is not None and q.grad.abs().max() > 0 and k.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]


# -- onnxruntime --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gain = nn.Parameter(torch.randn(heads, width, 9) / 9), nn.Parameter(torch.rand(heads) + 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.ops.rewright.shift_add_attention(q, k, v, self.conv, self.gain, None if mask is None else mask != 0)


@pytest.mark.parametrize("profile", ["ort", "pure"])
@pytest.mark.parametrize("masked", [False, True])
def test_onnxruntime_computes_the_same_at_several_sizes_with_two_plain_products_of_codes(profile: Profile, masked: bool, tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    inputs = (*torch.randn(3, 2, 2, 12, 16), *([(torch.arange(12) < 9).long().expand(2, -1).contiguous()] if masked else []))
    names = ("q", "k", "v", *(["mask"] if masked else []))
    graph = capture(Attention(2, 16), inputs, dynamic_shapes={n: {0: "batch", (1 if n == "mask" else 2): "tokens"} for n in names})
    done = export(graph, tmp_path / "m.onnx", [inputs], profile)
    assert done.parity is not None and done.parity.relative_error < 1e-5 and done.parity.inputs > 1
    ops = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("MatMul") == 2 and ops.count("Conv") == 1 and ops.count("Greater") == 2
    assert len(ops) < 45, "no slope of the codes is written"
