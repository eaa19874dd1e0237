"""Linear attention is what the masked matrix of the same features gives: both directions, chunks, decays, decoding, and softmax near by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir import ops
from rewright.ir.capture import capture
from rewright.ir.cost import node_costs
from rewright.ir.ops.linear_attention import CHUNK, EPS
from rewright.ir.ops.linear_attention_step import empty

torch.set_num_threads(1)
OPS = torch.ops.rewright
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
"""Of float64: the same sums in another order, over 200 tokens."""


def tensors(b: int = 2, h: int = 4, hk: int = 2, n: int = 70, m: int | None = None, d: int = 6, dv: int = 5, dtype: torch.dtype = torch.float64):
    """Features without zeros, so that nothing is at a kink, and values."""
    m = n if m is None else m
    return torch.rand(b, h, n, d, dtype=dtype) + 0.1, torch.rand(b, hk, m, d, dtype=dtype) + 0.1, torch.randn(b, hk, m, dv, dtype=dtype)


def quadratic(q, k, v, weights=None, causal=False, decay=None, normalize="sum"):
    """The matrix of every query with every key, decays by loops over pairs."""
    b, h, n, _ = q.shape
    k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
    a = q @ k.mT
    if normalize == "sum":
        a = a + EPS
    if weights is not None:
        a = a * weights[:, None, None].to(a.dtype)
    if causal:
        a = a.tril()
    if decay is not None:
        decay = decay[None, :, None].expand(b, decay.shape[0], n) if decay.dim() == 1 else decay
        decay = decay.repeat_interleave(h // decay.shape[1], 1)
        factors = [[decay[..., j + 1 : i + 1].sum(-1).exp() for j in range(n)] for i in range(n)]
        a = a * torch.stack([torch.stack(row, -1) for row in factors], -2)
    o = a @ v
    if normalize == "sum":
        o = o / a.sum(-1, keepdim=True)
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) if normalize == "rms" else o


@pytest.mark.parametrize("normalize", ["sum", "none", "rms"])
@pytest.mark.parametrize(("n", "m"), [(9, 9), (5, 31), (31, 5)])
def test_bidirectional_is_the_matrix_of_the_same_features(n: int, m: int, normalize: str) -> None:
    q, k, v = tensors(n=n, m=m)
    torch.testing.assert_close(OPS.linear_attention(q, k, v, normalize=normalize), quadratic(q, k, v, normalize=normalize), **DOUBLE)


def test_float32_agrees_to_1e_5() -> None:
    q, k, v = tensors(n=300, dtype=torch.float32)
    for causal in (False, True):
        expected = quadratic(q.double(), k.double(), v.double(), causal=causal)
        torch.testing.assert_close(OPS.linear_attention(q, k, v, None, causal).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["sum", "none", "rms"])
@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_causal_is_the_lower_triangle(n: int, normalize: str) -> None:
    q, k, v = tensors(n=n)
    torch.testing.assert_close(OPS.linear_attention(q, k, v, None, True, None, normalize), quadratic(q, k, v, None, True, None, normalize), **DOUBLE)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2, 140), (2, 4, 140)])
@pytest.mark.parametrize("normalize", ["sum", "none"])
def test_decays_are_those_between_query_and_key(shape: tuple[int, ...], normalize: str) -> None:
    q, k, v = tensors(n=140)
    decay = -torch.rand(shape, dtype=torch.float64) * 0.1
    torch.testing.assert_close(OPS.linear_attention(q, k, v, None, True, decay, normalize), quadratic(q, k, v, None, True, decay, normalize), **DOUBLE)


def test_strong_decays_neither_overflow_nor_forget_what_is_near() -> None:
    """e^(-G) alone would be e^60000; and after a strong stretch the sums are large, the differences of a weak one small."""
    q, k, v = tensors(1, 1, 1, n=600, dtype=torch.float32)
    decay = torch.full((1, 1, 600), -100.0)
    decay[..., 300:] = -1e-3
    found = OPS.linear_attention(q, k, v, None, True, decay)
    torch.testing.assert_close(found[:, :, :300], v[:, :, :300], rtol=1e-5, atol=1e-5)  # each token sees itself alone
    torch.testing.assert_close(found.double(), quadratic(*(t.double() for t in (q, k, v)), None, True, decay.double()), rtol=3e-5, atol=3e-5)


def test_a_decay_above_0_counts_as_0() -> None:
    q, k, v = tensors()
    decay = torch.full((2,), 3.0, dtype=torch.float64)
    assert torch.equal(OPS.linear_attention(q, k, v, None, True, decay), OPS.linear_attention(q, k, v, None, True, torch.zeros_like(decay)))


def test_alibi_is_a_decay() -> None:
    """exp(q.k - slope (i - j)) over any features: here the exponential kernel's own, so that softmax with the bias is the reference."""
    n, slopes = 90, torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    points = 2 * torch.rand(1, 4, n, 1, dtype=torch.float64) - 1
    powers = torch.arange(25, dtype=torch.float64)
    phi = points**powers * (-0.5 * torch.lgamma(powers + 1)).exp()  # phi(x).phi(y) = exp(x y), to 25 terms of |x y| <= 1
    v = torch.randn(1, 4, n, 5, dtype=torch.float64)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = (points @ points.mT - slopes[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
    torch.testing.assert_close(
        OPS.linear_attention(phi, phi, v, None, True, -slopes), scores.softmax(-1) @ v, rtol=0, atol=3e-5
    )  # eps = 1e-6 beside weights of 1/e


@pytest.mark.parametrize("causal", [False, True])
def test_sizes_are_copies(causal: bool) -> None:
    q, k, v = tensors(n=20)
    sizes = torch.randint(0, 4, (20,))
    sizes[0] = 2
    if not causal:
        copies = OPS.linear_attention(q, k.repeat_interleave(sizes, 2), v.repeat_interleave(sizes, 2))
        torch.testing.assert_close(OPS.linear_attention(q, k, v, sizes.expand(2, 20).double()), copies, **DOUBLE)
        return
    copies = OPS.linear_attention(*(t.repeat_interleave(sizes, 2) for t in (q, k, v)), None, True)
    last = sizes.cumsum(0) - 1  # the last copy of a token sees all copies of it
    there = sizes > 0
    torch.testing.assert_close(OPS.linear_attention(q, k, v, sizes.expand(2, 20), True)[:, :, there], copies[:, :, last[there]], **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_matter(causal: bool) -> None:
    q, k, v = tensors(n=CHUNK + 20)
    mask = torch.ones(2, CHUNK + 20, dtype=torch.bool)
    mask[0, 50:] = mask[1, 70:] = False
    before = OPS.linear_attention(q, k, v, mask, causal)
    k, v = (torch.where(mask[:, None, :, None], t, 100 * torch.randn_like(t)) for t in (k, v))
    after = OPS.linear_attention(q, k, v, mask, causal)
    assert torch.equal(before, after)
    torch.testing.assert_close(after[:1, :, :50], OPS.linear_attention(q[:1, :, :50], k[:1, :, :50], v[:1, :, :50], None, causal), **DOUBLE)


def test_a_text_of_padding_alone_gives_zeros() -> None:
    q, k, v = tensors(n=7)
    for causal in (False, True):
        assert torch.equal(OPS.linear_attention(q, k, v, torch.zeros(2, 7), causal), torch.zeros(2, 4, 7, 5, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_constant_values_stay(causal: bool) -> None:
    q, k, v = tensors(n=100, dtype=torch.float32)
    q[0, 0, 3] = 0
    decay = torch.tensor([-0.1, -0.2]) if causal else None
    weights = torch.randint(1, 4, (2, 100))
    found = OPS.linear_attention(q, k, torch.full_like(v, 3.0), weights, causal, decay)
    torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_of_zeros_takes_the_mean_of_what_it_sees(causal: bool) -> None:
    q, k, v = tensors(n=80, h=2)
    found = OPS.linear_attention(torch.zeros_like(q), k, v, None, causal)
    mean = v.cumsum(2) / torch.arange(1, 81)[:, None] if causal else v.mean(2, keepdim=True).expand(-1, -1, 80, -1)
    torch.testing.assert_close(found, mean, **DOUBLE)


def test_outputs_are_linear_in_the_values() -> None:
    q, k, v = tensors()
    other = torch.randn_like(v)
    for causal in (False, True):
        sum_of_both = 2 * OPS.linear_attention(q, k, v, None, causal) + OPS.linear_attention(q, k, other, None, causal)
        torch.testing.assert_close(OPS.linear_attention(q, k, 2 * v + other, None, causal), sum_of_both, **DOUBLE)


def test_tokens_have_no_order_in_the_bidirectional_form() -> None:
    q, k, v = tensors()
    order = torch.randperm(70)
    torch.testing.assert_close(OPS.linear_attention(*(t[:, :, order] for t in (q, k, v))), OPS.linear_attention(q, k, v)[:, :, order], **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
def test_shared_key_heads_are_repeated_ones(causal: bool) -> None:
    q, k, v = tensors(h=6, hk=2)
    repeated = (t.repeat_interleave(3, 1) for t in (k, v))
    torch.testing.assert_close(OPS.linear_attention(q, k, v, None, causal), OPS.linear_attention(q, *repeated, None, causal), **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
def test_65536_tokens_in_half_precision_stay_finite(causal: bool) -> None:
    q, k = 4 * torch.rand(2, 1, 1, 65536, 8, dtype=torch.float16)
    v = torch.rand(1, 1, 65536, 8, dtype=torch.float16) + 1
    found = OPS.linear_attention(q, k, v, None, causal)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found[:, :, -1], v.float().mean(2).half(), rtol=0.01, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_matrix(causal: bool) -> None:
    q, k, v = tensors(n=CHUNK + 9)
    decay = -torch.rand(2, 2, CHUNK + 9, dtype=torch.float64) * 0.1 if causal else None
    weights = torch.randint(1, 4, (2, CHUNK + 9)).double()
    operands = [t.requires_grad_() for t in (q, k, v, weights, decay) if t is not None]
    toward = torch.randn(2, 4, CHUNK + 9, 5, dtype=torch.float64)
    found = torch.autograd.grad((OPS.linear_attention(q, k, v, weights, causal, decay) * toward).sum(), operands)
    expected = torch.autograd.grad((quadratic(q, k, v, weights, causal, decay) * toward).sum(), operands)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradients_are_finite_where_nothing_is_seen() -> None:
    """Also beyond the last token of a ragged chunk."""
    q, k, v = (t.requires_grad_() for t in tensors(n=10))
    for causal in (False, True):
        for weights in (None, torch.zeros(2, 10), torch.tensor([[0.0] * 5 + [1.0] * 5] * 2)):
            for gradient in torch.autograd.grad(OPS.linear_attention(q, k, v, weights, causal).sum(), (q, k, v)):
                assert gradient.isfinite().all()


@pytest.mark.parametrize("normalize", ["sum", "none", "rms"])
@pytest.mark.parametrize("decays", [None, (2,), (4,), (2, 4, 150)])
def test_decoding_after_a_prefill_is_the_prefill_of_all(decays: tuple[int, ...] | None, normalize: str) -> None:
    """A prompt of 140 tokens in pieces of 70, five single tokens, then five at once."""
    q, k, v = tensors(n=150, dtype=torch.float32)
    decay = None if decays is None else -torch.rand(decays) * 0.1
    expected = OPS.linear_attention(q, k, v, None, True, decay, normalize)
    state, sums = empty(2, 4 if decays and 4 in decays else 2, 6, 5, normalize)
    start = 0
    for n in (70, 70, 1, 1, 1, 1, 1, 5):
        of = slice(start, start + n)
        g = decay if decay is None or decay.dim() == 1 else decay[:, :, of]
        o, state, sums = OPS.linear_attention_step(q[:, :, of], k[:, :, of], v[:, :, of], state, sums, g, normalize)
        torch.testing.assert_close(o, expected[:, :, of], rtol=1e-5, atol=2e-4 if normalize == "none" else 1e-5)
        start += n
    assert state.dtype == sums.dtype == torch.float32


def test_states_stay_float32_for_half_precision() -> None:
    """Ones added up in half precision stop at 2048."""
    state, sums = empty(1, 1, 2, 2)
    assert state.dtype == sums.dtype == torch.float32
    ones = torch.ones(1, 1, 64, 2, dtype=torch.float16)
    for _ in range(64):
        o, state, sums = OPS.linear_attention_step(ones, ones, ones, state, sums)
    assert o.dtype == torch.float16 and state.dtype == torch.float32
    assert torch.equal(sums, torch.full((1, 1, 3), 4096.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalize": "mean"}, "normalize must be one of sum, none, rms"),
        ({"decay": torch.zeros(2)}, "a decay needs an order"),
        ({"decay": torch.zeros(3), "causal": True}, "fits neither 4 query heads nor 2 key heads"),
        ({"k": torch.rand(2, 3, 70, 6)}, "4 query heads can't share 3 key heads"),
        ({"k": torch.rand(2, 2, 70, 7)}, "queries have 6 features and keys 7"),
        ({"q": torch.rand(2, 4, 5, 6), "causal": True}, "as many queries as keys, got 5 and 70"),
    ],
)
def test_says_what_does_not_fit(change: dict, words: str) -> None:
    given = dict(zip("qkv", tensors(dtype=torch.float32))) | change
    with pytest.raises(ValueError, match=words):
        OPS.linear_attention(**given)


def test_a_state_of_another_shape_is_refused_with_the_right_one() -> None:
    q, k, v = tensors(n=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"the state must be \[2, 2, 7, 5\] and the sums \[2, 2, 7\], got \[2, 2, 6, 5\]"):
        OPS.linear_attention_step(q, k, v, *empty(2, 2, 6, 5, "none"))


class Layer(nn.Module):
    """One call, with what it is called."""

    def __init__(self, name: str, *rest: object, **options: object) -> None:
        super().__init__()
        self.name, self.rest, self.options = name, rest, options

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
        return getattr(OPS, self.name)(*tensors, *self.rest, **self.options)


def flops(name: str, given: tuple[Tensor, ...], *rest: object, **options: object) -> int:
    (found,) = [c for c in node_costs(capture(Layer(name, *rest, **options), (given,))) if c.op == name]
    return found.cost.flops


def test_costs_grow_with_tokens_not_with_pairs() -> None:
    """2 products of n d dv multiply-adds and the denominator's of n d; causal adds a chunk's pairs; grouped keys have one state."""
    for h, hk in ((4, 4), (4, 2)):
        q, k, v = tensors(2, h, hk, 128, d=16, dv=8, dtype=torch.float32)
        n = 2 * 128
        bidirectional = 2 * n * 16 * 8 * (h + hk) + 2 * n * 16 * h
        assert flops("linear_attention", (q, k, v)) == bidirectional
        assert flops("linear_attention", (q, k, v), causal=True) == bidirectional + 2 * n * CHUNK * (16 + 8) * h
    assert flops("linear_attention_step", (*(t[:, :, :1] for t in (q, k, v)), *empty(2, 2, 16, 8))) == 2 * (2 * 17 * 8 * (4 + 2) + 2 * 17 * 4)


def near_and_far(q, k, v, fq, fk, gamma, key_mask, window, causal, scale=None):
    """By loops over queries."""
    b, h, n, d = q.shape
    k, v, fk = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v, fk))
    out = torch.zeros(b, h, n, v.shape[-1], dtype=torch.float64)
    for s in range(b):
        for head in range(h):
            for i in range(n):
                visible = [j for j in range(i + 1 if causal else n) if key_mask is None or key_mask[s, j]]
                near = [j for j in visible if j // window in ((i // window - 1, i // window) if causal else range(i // window - 1, i // window + 2))]
                far = [j for j in visible if j not in near]
                weights = torch.zeros(n, dtype=torch.float64)
                if near:
                    scores = k[s, head, near] @ q[s, head, i] * (d**-0.5 if scale is None else scale)
                    weights[near] = gamma[head] * (scores - scores.max()).exp()
                if far:
                    weights[far] = fk[s, head, far] @ fq[s, head, i] + EPS
                if visible:
                    out[s, head, i] = weights @ v[s, head] / weights.sum()
    return out


def hybrid_tensors(b: int = 2, h: int = 4, hk: int = 2, n: int = 29) -> tuple[Tensor, ...]:
    widths = (h, 6), (hk, 6), (hk, 5), (h, 7), (hk, 7)
    q, k, v, fq, fk = (torch.randn(b, heads, n, width, dtype=torch.float64) for heads, width in widths)
    return q, k, v, fq.abs(), fk.abs(), torch.rand(h, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "window"), [(29, 4), (32, 8), (5, 8), (30, 16)])
def test_hybrid_is_what_loops_over_queries_compute(n: int, window: int, masked: bool, causal: bool) -> None:
    given = hybrid_tensors(n=n)
    mask = torch.rand(2, n) < 0.6 if masked else None
    torch.testing.assert_close(OPS.hybrid_attention(*given, mask, window, causal, 0.7), near_and_far(*given, mask, window, causal, 0.7), **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [29, 64, 15])
def test_hybrid_with_everything_near_is_softmax_attention(window: int, causal: bool) -> None:
    """Two blocks are near each other too."""
    q, k, v, *features = hybrid_tensors()
    torch.testing.assert_close(OPS.hybrid_attention(q, k, v, *features, None, window, causal), OPS.attention(q, k, v, None, causal), **DOUBLE)


def test_hybrid_without_gamma_and_without_the_far_is_still_softmax_attention() -> None:
    q, k, v, fq, fk, gamma = hybrid_tensors()
    found = OPS.hybrid_attention(q, k, v, fq, fk, torch.zeros_like(gamma), None, 64)
    torch.testing.assert_close(found, OPS.attention(q, k, v), **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
def test_hybrid_without_gamma_is_linear_attention_to_the_far(causal: bool) -> None:
    *given, gamma = hybrid_tensors(n=40)
    _, _, v, fq, fk = given
    a = (fq @ fk.repeat_interleave(2, 1).mT + EPS).view(2, 4, 10, 4, 10, 4)
    blocks = torch.arange(10)
    apart = blocks[:, None] - blocks
    far = apart > 1 if causal else apart.abs() > 1
    a = (a * far[:, None, :, None]).view(2, 4, 40, 40)[:, :, 8:]  # causal: the first two blocks have nothing far
    expected = a @ v.repeat_interleave(2, 1) / a.sum(-1, keepdim=True)
    torch.testing.assert_close(OPS.hybrid_attention(*given, torch.zeros_like(gamma), None, 4, causal)[:, :, 8:], expected, **DOUBLE)


@pytest.mark.parametrize("causal", [False, True])
def test_hybrid_gradients_are_confirmed_by_finite_differences(causal: bool) -> None:
    """The near part's maximum among them: it changes what the near weigh."""
    given = tuple(t.requires_grad_() for t in hybrid_tensors(1, 2, 1, 13))
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[0, 10:] = False
    assert torch.autograd.gradcheck(lambda *t: OPS.hybrid_attention(*t, mask, 3, causal), given, fast_mode=True)


def test_hybrid_gradients_are_finite_where_nothing_is_seen() -> None:
    given = tuple(t.requires_grad_() for t in hybrid_tensors(n=10))
    for causal in (False, True):
        out = OPS.hybrid_attention(*given, torch.zeros(2, 10, dtype=torch.bool), 3, causal)
        assert torch.equal(out, torch.zeros_like(out))
        for gradient in torch.autograd.grad(out.sum(), given, allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 0}, "at least one token, got 0"),
        ({"q": torch.rand(2, 4, 5, 6)}, "as many queries as keys, got 5 and 29"),
        ({"k": torch.rand(2, 3, 29, 6)}, "4 query heads can't share 3 key heads"),
        ({"fk": torch.rand(2, 2, 29, 8)}, "are not those of queries"),
    ],
)
def test_hybrid_says_what_does_not_fit(change: dict, words: str) -> None:
    given = dict(zip(("q", "k", "v", "fq", "fk", "gamma"), hybrid_tensors())) | change
    with pytest.raises(ValueError, match=words):
        OPS.hybrid_attention(**given)


def test_hybrid_costs_grow_with_tokens_not_with_pairs() -> None:
    given = tuple(t.float() for t in hybrid_tensors(2, 4, 2, 128))
    for causal, near in ((False, 3 * 16), (True, 2 * 16)):
        expected = 2 * 128 * near * (6 + 5) * 4 + 2 * 128 * 7 * 5 * (4 + 2) + 2 * 128 * 7 * 4
        assert flops("hybrid_attention", given, None, 16, causal) == 2 * expected


@pytest.mark.parametrize("name", ["linear_attention", "linear_attention_step", "hybrid_attention"])
def test_every_case_is_the_same_on_a_second_run(name: str) -> None:
    torch.manual_seed(0)
    for case in getattr(ops, name).cases(torch.float32, "cpu"):
        first, second = (getattr(OPS, name)(*case) for _ in range(2))
        pairs = zip(first, second) if isinstance(first, tuple) else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs)
