"""Attention with any mask becomes one node that says what the mask means, or stays and says why."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.nodes import arguments

B, S, H, D = 3, 11, 4, 8


class _Attention(nn.Module):
    """q, k, v: [B, S, H, D]; mask: [B, S] of 0 and 1."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.function(*(t.transpose(1, 2) for t in (q, k, v)), mask)


def _inputs(b: int = B, s: int = S, kv: int = H, padding: str = "right") -> tuple[Tensor, ...]:
    mask = torch.ones(b, s, dtype=torch.long)
    if padding == "right":
        mask[0, s - 2 :] = 0
    if padding == "holes":
        mask[0, 1::3] = 0
    return torch.randn(b, s, H, D), torch.randn(b, s, kv, D), torch.randn(b, s, kv, D), mask


def _shapes() -> dict:
    return {key: {0: "batch", 1: "sequence"} for key in ("q", "k", "v", "mask")}


def _run(canonical, function, kv: int = H):
    return canonical(_Attention(function), _inputs(kv=kv), dynamic_shapes=_shapes())


def _facts(done) -> dict:
    (node,) = done.graph.find(torch.ops.rewright.attention.default)
    return arguments(node)


def _grid(s: int) -> tuple[Tensor, Tensor]:
    return torch.arange(s)[:, None], torch.arange(s)[None, :]


def _eager(q, k, v, mask_of, scale=True):
    scores = q @ k.transpose(-1, -2)
    scores = scores / math.sqrt(D) if scale else scores
    return F.softmax(mask_of(scores), dim=-1) @ v


def causal(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i)[None, None])


def causal_and_padding(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i)[None, None] & mask.bool()[:, None, None, :])


def window(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=((j <= i) & (j > i - 4))[None, None])


def wide_window(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=((j <= i) & (j > i - 4096))[None, None])


def both_sides(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=((i - j).abs() <= 64)[None, None] & (mask != 0)[:, None, None, :])


def tril(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())


def flag(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def everything(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[0], 1, q.shape[2], q.shape[2], dtype=torch.bool))


def old_bert(q, k, v, mask):
    return _eager(q, k, v, lambda s: s + (1.0 - mask[:, None, None, :].float()) * -10000.0)


def filled(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return _eager(q, k, v, lambda s: s.masked_fill(j > i, float("-inf")).masked_fill(mask[:, None, None, :] == 0, -1e9))


def where(q, k, v, mask):
    i, j = _grid(q.shape[2])
    return _eager(q, k, v, lambda s: torch.where(j <= i, s, torch.finfo(s.dtype).min))


def unmasks_empty_rows(q, k, v, mask):
    i, j = _grid(q.shape[2])
    seen = (j <= i)[None, None] & mask.bool()[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~seen.any(-1, keepdim=True))


@pytest.mark.parametrize(
    ("function", "is_causal", "width", "padded"),
    [
        (causal, True, None, False),
        (causal_and_padding, True, None, True),
        (window, True, 4, False),
        (wide_window, True, 4096, False),
        (both_sides, False, 65, True),
        (tril, True, None, False),
        (flag, True, None, False),
        (everything, False, None, False),
        (old_bert, False, None, True),
        (filled, True, None, True),
        (where, True, None, False),
        (unmasks_empty_rows, True, None, True),
    ],
    ids=lambda p: getattr(p, "__name__", str(p)),
)
def test_names_the_mask(canonical, function, is_causal, width, padded) -> None:
    done = _run(canonical, function)
    facts = _facts(done)
    assert (facts["causal"], facts["window"], facts["key_mask"] is not None, facts["bias"]) == (is_causal, width, padded, None)
    assert done.after["softmax"] == done.after["scaled_dot_product_attention"] == 0
    for inputs in (_inputs(), _inputs(1, 7), _inputs(2, 19, padding="holes")):
        assert done.error(*inputs) < 1e-6


def test_sdpa_with_a_named_mask_stays_bit_equal(canonical) -> None:
    done = _run(canonical, causal_and_padding)
    assert done.error(*_inputs(2, 17, padding="holes")) == 0


def test_the_key_mask_is_one_node_for_all_layers(canonical) -> None:
    def two(q, k, v, mask):
        y = causal_and_padding(q, k, v, mask)
        return old_bert(y, k, v, mask)

    done = _run(canonical, two)
    assert done.after["ne"] == 1
    first, second = done.graph.find(torch.ops.rewright.attention.default)
    assert arguments(first)["key_mask"] is arguments(second)["key_mask"]


def test_a_bool_input_is_the_key_mask_itself(canonical) -> None:
    def given(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

    *qkv, mask = _inputs()
    done = canonical(_Attention(given), (*qkv, mask.bool()), dynamic_shapes=_shapes())
    assert _facts(done)["key_mask"].op == "placeholder"


def test_padding_read_off_the_token_ids_is_a_key_mask(canonical) -> None:
    def ids(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(mask != 2)[:, None, None, :])

    done = _run(canonical, ids)
    assert _facts(done)["key_mask"].target is torch.ops.aten.ne.Scalar
    assert _facts(done)["key_mask"].args[1] == 2


@pytest.mark.parametrize("form", ["expand", "repeat_interleave"])
def test_absorbs_repeated_key_value_heads(canonical, form) -> None:
    def grouped(q, k, v, mask):
        if form == "expand":
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], H, -1, D) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return causal(q, k, v, mask)

    done = _run(canonical, grouped, kv=2)
    facts = _facts(done)
    assert [facts[n].meta["val"].shape[1] for n in "qkv"] == [4, 2, 2]
    assert done.error(*_inputs(1, 7, kv=2)) == 0


def test_does_not_absorb_heads_repeated_in_another_order(canonical) -> None:
    def tiled(q, k, v, mask):
        return causal(q, *(t.repeat(1, 2, 1, 1) for t in (k, v)), mask)

    done = _run(canonical, tiled, kv=2)
    assert _facts(done)["k"].meta["val"].shape[1] == 4
    assert done.error(*_inputs(1, 7, kv=2)) == 0


def test_absorbs_the_scale_wherever_it_is(canonical) -> None:
    def on_q(q, k, v, mask):
        return _eager(q * 0.125, k, v, lambda s: s, scale=False)

    def on_both(q, k, v, mask):
        return F.scaled_dot_product_attention(q / 2, k * 0.5, v, scale=0.5)

    assert _facts(_run(canonical, on_q))["scale"] == 0.125
    assert _facts(_run(canonical, on_both))["scale"] == 0.125
    assert _facts(_run(canonical, lambda q, k, v, m: _eager(q, k, v, lambda s: s, scale=False)))["scale"] == 1.0
    assert _facts(_run(canonical, flag))["scale"] is None


def test_keeps_a_factor_on_a_value_with_two_roles(canonical) -> None:
    done = _run(canonical, lambda q, k, v, m: (lambda h: F.scaled_dot_product_attention(h, h, h, scale=0.5))((q.transpose(1, 2) * 3).transpose(1, 2)))
    assert _facts(done)["scale"] == 0.5
    assert done.error(*_inputs(1, 7)) == 0


def test_raises_the_softcap(canonical) -> None:
    def capped(q, k, v, mask):
        i, j = _grid(q.shape[2])
        return _eager(q, k, v, lambda s: (torch.tanh(s / 5.0) * 5.0).masked_fill(j > i, torch.finfo(s.dtype).min))

    done = _run(canonical, capped)
    assert (_facts(done)["softcap"], _facts(done)["causal"]) == (5.0, True)
    assert done.error(*_inputs(2, 9)) < 1e-6


def test_a_float_term_without_a_name_is_a_bias_and_its_padding_a_key_mask(canonical) -> None:
    def alibi(q, k, v, mask):
        i, j = _grid(q.shape[2])
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=-(i - j).abs() * slopes + (1.0 - mask.float())[:, None, None, :] * torch.finfo(q.dtype).min)

    done = _run(canonical, alibi)
    facts = _facts(done)
    assert facts["bias"] is not None
    assert facts["key_mask"] is not None
    for inputs in (_inputs(), _inputs(1, 7), _inputs(2, 19, padding="holes")):
        assert done.error(*inputs) < 1e-6


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=((_grid(q.shape[2])[0] - _grid(q.shape[2])[1]) % 2 == 0)), "at the sizes tried"),
        (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=(q.sum(-1) > 0)[..., None]), "depends on the values of the input q"),
        (lambda q, k, v, m: (lambda p: p @ v + p.sum())((q @ k.transpose(-1, -2)).softmax(-1)), "are also read by sum"),
        (lambda q, k, v, m: _eager(q, k, v, lambda s: s.relu()), "its scores come from relu, not from matmul"),
        (lambda q, k, v, m: (q @ k.transpose(-1, -2)).softmax(-2) @ v, "its softmax runs over axis -2"),
        (lambda q, k, v, m: _eager(q[:, 0], k[:, 0], v[:, 0], lambda s: s), "q, k, v are of rank 3, 3, 3, not 4"),
        (lambda q, k, v, m: _eager(q, k, v, lambda s: (s + m[:, None, None, :] * -1e9) * 2), "its scores come from add"),
    ],
    ids=["odd mask", "mask of activations", "weights read", "relu", "axis", "rank", "scaled mask"],
)
def test_declines_and_says_why(canonical, function, why) -> None:
    done = _run(canonical, function)
    assert done.after["attention"] == 0
    assert any(why in reason for reason in done.reasons), done.reasons
    assert done.error(*_inputs(2, 9)) < 1e-6


def test_a_float_mask_of_zero_and_one_ids_is_not_mistaken(canonical) -> None:
    """`1 - ids` equals "ids != 0" nowhere: a term that weighs what it shows stays a bias."""

    def weighs(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].float())

    done = _run(canonical, weighs)
    assert _facts(done)["bias"] is not None
    assert _facts(done)["key_mask"] is None
    assert done.error(*_inputs(2, 9)) < 1e-6


def test_a_window_made_of_a_constant_tensor_is_found(canonical) -> None:
    def lifted(q, k, v, mask):
        i, j = _grid(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=((j <= i) & (i - j < torch.tensor(512)))[None, None])

    assert _facts(_run(canonical, lifted))["window"] == 512


def _merged_heads(q, k, v, mask):
    """BLOOM: batch and heads on one axis, ALiBi added by baddbmm."""
    b, h, s, d = q.shape
    alibi = (mask.cumsum(-1) * mask)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])[:, None]
    q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
    scores = torch.baddbmm(alibi.reshape(b * h, 1, s), q, k.transpose(1, 2), beta=1.0, alpha=d**-0.5)
    i, j = _grid(s)
    seen = (j <= i)[None, None] & mask.bool()[:, None, None]
    weights = torch.softmax(scores.view(b, h, s, s).masked_fill(~seen, torch.finfo(scores.dtype).min), -1)
    return torch.bmm(weights.view(b * h, s, s), v).view(b, h, s, d)


def test_merged_heads_with_a_term_in_the_product_are_unmerged(canonical) -> None:
    done = _run(canonical, _merged_heads)
    facts = _facts(done)
    assert (facts["causal"], facts["scale"], facts["bias"].meta["val"].shape[1:3]) == (True, D**-0.5, (H, 1))
    assert done.after["bmm"] == done.after["baddbmm"] == done.after["softmax"] == 0
    for b, s, padding in ((B, S, "right"), (1, 5, "right"), (2, 9, "right")):
        assert done.error(*_inputs(b, s, padding=padding)) < 1e-6


def test_a_scaled_term_in_the_product_stays_and_says_why(canonical) -> None:
    def half(q, k, v, mask):
        b, h, s, d = q.shape
        q, k, v = (t.reshape(b * h, s, d) for t in (q, k, v))
        scores = torch.baddbmm(mask.float().repeat_interleave(h, 0)[:, None], q, k.transpose(1, 2), beta=0.5)
        return torch.bmm(torch.softmax(scores, -1), v).view(b, h, s, d)

    assert [w for w in _run(canonical, half).reasons if "scales the term it adds" in w]


def test_a_multihead_attention_module_is_one_attention(canonical) -> None:
    class Pooled(nn.Module):
        """SigLIP's pooling head: a learned query, sequence first inside the module."""

        def __init__(self) -> None:
            super().__init__()
            self.probe, self.attention = nn.Parameter(torch.randn(1, 2, 32)), nn.MultiheadAttention(32, H, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.probe.repeat(x.shape[0], 1, 1), x, x)[0]

    done = canonical(Pooled(), (torch.randn(B, S, 32),), dynamic_shapes={"x": {0: "batch"}})
    assert done.after["attention"] == 1
    assert done.after["bmm"] == done.after["split_with_sizes"] == 0
    for b in (B, 1):
        assert done.error(torch.randn(b, S, 32)) < 1e-6
