"""Feature maps: the formula of each, its first parameters, what it does to zeros and to large numbers, and what it imitates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.cost import node_costs
from rewright.ir.feature_maps import KINDS, initial, named, width

torch.set_num_threads(1)
OPS = torch.ops.rewright


def double(kind: str, heads: int = 3, d: int = 16, features: int | None = None) -> list[Tensor]:
    """First parameters, moved a little so that each one matters."""
    torch.manual_seed(0)
    return [p.double() + 0.1 * torch.randn_like(p).double() for p in initial(kind, heads, d, 0, features)]


def by_hand(kind: str, x: Tensor, p: list[Tensor], query: bool) -> Tensor:
    """Of one vector x [d] of one head, whose parameters are p."""
    d, scaled = len(x), x / len(x) ** 0.25
    match kind:
        case "elu1":
            return torch.stack([v + 1 if v > 0 else v.exp() for v in x])
        case "relu":
            return torch.stack([max(v, v * 0) for v in x])
        case "exp":
            return (x - x.max()).exp() if query else x.exp()
        case "taylor2":
            pairs = [scaled[i] * scaled[j] for i in range(d) for j in range(i + 1, d)]
            return torch.stack([torch.ones((), dtype=x.dtype), *scaled, *(scaled**2 / math.sqrt(2)), *pairs])
        case "performer":
            exponents = torch.stack([row @ scaled - scaled @ scaled / 2 for row in p[0]])
            return (exponents - exponents.max() if query else exponents).exp()
        case "t2r":
            return (p[0] @ x + p[1]).clamp(min=0)
        case "hedgehog_softmax":
            y = p[0] @ x
            return torch.cat([y.exp() / y.exp().sum(), (-y).exp() / (-y).exp().sum()])
        case "hedgehog_exp":
            y = torch.cat([p[0] @ x, -p[0] @ x])
            return (y - y.max() if query else y).exp()
        case "focused":
            y = (x.clamp(min=0) + 1e-6) / (1 + p[0].exp()).log()
            return y.norm() * y**3 / (y**3).norm()
        case "nala" if query:
            y = x / x.norm()
            return torch.cat([y.clamp(min=0), (-y).clamp(min=0)]) ** (3 * (0.5 + torch.tanh(x.norm())))
        case "nala":
            return torch.cat([x.clamp(min=0), (-x).clamp(min=0)]) ** 3
    raise AssertionError(kind)


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_map_is_its_formula(kind: str, query: bool) -> None:
    p = double(kind)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    found = OPS.feature_map(x, p, kind, query)
    assert found.shape == (2, 3, 5, width(kind, 16))
    for s, head, i in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        own = p if kind == "performer" else [t[head] for t in p]
        torch.testing.assert_close(found[s, head, i], by_hand(kind, x[s, head, i], own, query), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_not_negative(kind: str) -> None:
    assert named(kind).nonnegative
    q, k = 3 * torch.randn(2, 2, 3, 40, 16, dtype=torch.float64)
    p = double(kind)
    weights = OPS.feature_map(q, p, kind, True) @ OPS.feature_map(k, p, kind).mT
    assert weights.min() >= 0


def weights(kind: str, q: Tensor, k: Tensor, p: list[Tensor]) -> Tensor:
    products = OPS.feature_map(q, p, kind, True) @ OPS.feature_map(k, p, kind).mT
    return products / products.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].scaled])
def test_what_stands_for_softmax_comes_near_to_it(kind: str) -> None:
    """Second order for small products; random features: the nearer the more of them."""
    torch.manual_seed(0)
    q, k = 0.4 * torch.randn(2, 1, 2, 30, 16, dtype=torch.float64)
    exact = (q @ k.mT / 4).softmax(-1)

    def error(features: int | None) -> float:
        p = [t.double() for t in initial(kind, 2, 16, 1, features)]
        return float((weights(kind, q, k, p) - exact).norm() / exact.norm())

    if kind == "taylor2":
        assert error(None) < 5e-3
        return
    assert error(4096) < 0.5 * error(64)
    assert error(4096) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_and_zeros_stay_finite_with_finite_gradients(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for query in (False, True):
            x = torch.randn(1, 3, 6, 16, dtype=dtype)
            x[:, :, 1], x[:, :, 2], x[:, :, 3] = 0, x[:, :, 2] * 40, -30.0
            p = [t.to(dtype).requires_grad_() for t in double(kind)]
            y = OPS.feature_map(x.requires_grad_(), p, kind, query)
            assert y.dtype == dtype and y.isfinite().all()
            gradients = torch.autograd.grad(y.float().sum() * 1e-12, [x, *p])
            assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", ["exp", "hedgehog_exp", "performer"])
def test_a_query_loses_its_maximum_and_keys_no_share_of_theirs(kind: str) -> None:
    """The largest feature of a query is 1; two keys keep the ratio of their features however large they are."""
    p = [t.double() for t in initial(kind, 1, 8)]
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    x[..., 0, 0], x[..., 1, 0] = 3.0, 5.0
    queries, keys = OPS.feature_map(x, p, kind, True), OPS.feature_map(x, p, kind)
    torch.testing.assert_close(queries.amax(-1), torch.ones(1, 1, 2, dtype=torch.float64))
    if kind != "performer":
        torch.testing.assert_close(keys[0, 0, 1, 0] / keys[0, 0, 0, 0], torch.tensor(math.exp(2.0), dtype=torch.float64))
    torch.testing.assert_close(queries, keys / keys.amax(-1, keepdim=True))


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_confirmed_by_finite_differences(kind: str, query: bool) -> None:
    """Away from the corners of relu and of the maximum."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64).requires_grad_()
    p = [t.requires_grad_() for t in double(kind, 2, 4)]
    assert torch.autograd.gradcheck(lambda x, *p: OPS.feature_map(x, list(p), kind, query), (x, *p))


@pytest.mark.parametrize("kind", KINDS)
def test_first_parameters_are_the_same_for_queries_keys_and_heads(kind: str) -> None:
    for heads in (1, 4):
        first, again, other = initial(kind, heads, 16, 3), initial(kind, 2 * heads, 16, 3), initial(kind, heads, 16, 4)
        for a, b, c in zip(first, again, other, strict=True):
            if kind != "performer":  # one for all heads
                a, b, c = a[:1], b[2 * heads - 1 :], c[:1]
            assert torch.equal(a, b)
            assert kind not in ("performer", "t2r") or not a.abs().sum() or not torch.equal(a, c)
    assert named(kind).learned == (kind in ("t2r", "hedgehog_softmax", "hedgehog_exp", "focused"))


def test_performers_rows_are_orthogonal_in_blocks_and_of_normal_length() -> None:
    (w,) = initial("performer", 2, 32, 0, 320)
    for block in w.view(10, 32, 32):
        products = block @ block.t()
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-4)
    assert w.norm(dim=-1).mean() == pytest.approx(math.sqrt(32), rel=0.02)  # of a row of normal numbers
    assert w.norm(dim=-1).std() > 0.3


def test_hedgehog_starts_from_the_channels_themselves() -> None:
    x = torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(OPS.feature_map(x, initial("hedgehog_softmax", 2, 8), "hedgehog_softmax"), torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))


def test_hedgehogs_features_are_never_quite_zero() -> None:
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 200
    assert OPS.feature_map(x, initial("hedgehog_softmax", 1, 8), "hedgehog_softmax").min() > 9e-13


@pytest.mark.parametrize("kind", [k for k in KINDS if KINDS[k].projected])
def test_the_number_of_features_is_free_where_there_is_a_matrix(kind: str) -> None:
    x = torch.randn(2, 3, 5, 16)
    for features in (4, 24):
        y = OPS.feature_map(x, initial(kind, 3, 16, 0, features), kind)
        assert y.shape[-1] == width(kind, 16, features) == features * (2 if "hedgehog" in kind else 1)


def test_an_unknown_kind_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no feature map named 'cosine'; there are elu1, relu"):
        OPS.feature_map(torch.randn(1, 1, 2, 4), [], "cosine")


class Mapped(nn.Module):
    """One map with its parameters."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.p = kind, nn.ParameterList(initial(kind, 3, 16, 0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return OPS.feature_map(x, list(self.p), self.kind)


@pytest.mark.parametrize(("kind", "projection"), [("t2r", 8), ("hedgehog_exp", 8), ("performer", 8), ("focused", 0), ("relu", 0)])
def test_costs_count_the_matrix(kind: str, projection: int) -> None:
    x = torch.randn(2, 3, 5, 16)
    (found,) = [c for c in node_costs(capture(Mapped(kind), (x,))) if c.op == "feature_map"]
    assert found.cost.flops == 2 * x.numel() * projection + 8 * 30 * width(kind, 16, 8)


def test_focused_does_not_underflow_behind_a_large_scale() -> None:
    y = OPS.feature_map(torch.zeros(1, 1, 1, 8), [torch.full((1, 8), 50.0)], "focused")
    torch.testing.assert_close(y, torch.full_like(y, 1e-6 / 50), rtol=1e-4, atol=0)


def test_relu_is_torchs() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(OPS.feature_map(x, [], "relu"), F.relu(x))
