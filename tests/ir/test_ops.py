"""Every op of ours: its cases run, differentiate, and stay one node through torch.export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rewright.ir import ops

torch.set_num_threads(1)


def _cases(name: str, dtype: torch.dtype = torch.float32) -> list[tuple]:
    torch.manual_seed(0)
    return list(getattr(ops, name).cases(dtype, "cpu"))


def _call(name: str, case: tuple) -> tuple[Tensor, ...]:
    out = getattr(torch.ops.rewright, name)(*case)
    return out if isinstance(out, tuple) else (out,)


class _One(nn.Module):
    def __init__(self, name: str, case: tuple) -> None:
        super().__init__()
        self.name, self.case = name, case

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return _call(self.name, pytree.tree_map_only(Tensor, lambda _: next(given), self.case))


def _tensors(case: tuple) -> tuple[Tensor, ...]:
    return tuple(a for a in pytree.tree_leaves(case) if isinstance(a, Tensor))


MATCHES = ("token_match", "token_match_energy", "token_places")  # their results are numbers of tokens
RING = {3: torch.bool, 4: torch.float32, 5: torch.float32, 6: torch.int64}  # what of hybrid_attention_step's state is of no operand's dtype


@pytest.mark.parametrize("name", ops.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_runs_and_is_finite(name: str, dtype: torch.dtype) -> None:
    for case in _cases(name, dtype):
        for i, out in enumerate(_call(name, case)):
            sizes = name in ("token_merge", "linear_attention_step") and i > 0  # stay float32: counts above 256, and sums
            own = RING.get(i, dtype) if name == "hybrid_attention_step" else dtype
            assert out.dtype == (torch.int64 if name in MATCHES else torch.float32 if sizes else own)
            assert out.isfinite().all()


@pytest.mark.parametrize("name", ops.OPS)
def test_every_case_stays_one_node_through_export_and_decomposition(name: str) -> None:
    case = _cases(name)[-1]
    exported = torch.export.export(_One(name, case), _tensors(case), strict=False).run_decompositions({})
    calls = [n for n in exported.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
    assert [str(n.target) for n in calls] == [f"rewright.{name}.default"]


@pytest.mark.parametrize("name", ops.OPS)
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(name: str) -> None:
    mode = FakeTensorMode()
    for case in _cases(name):
        with mode:
            fakes = _call(name, pytree.tree_map_only(Tensor, mode.from_tensor, case))
        for fake, real in zip(fakes, _call(name, case), strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


ROUNDED = ("linear_fp8", "linear_int8_dynamic", "linear_int8_static", "linear_token", "shift_linear", "shift_linear_ps", "shift_linear_q")
# what is rounded has no useful slope: tests/ir/test_quantized_ops.py, tests/ir/test_shift_ops.py
CODED = ("shift_add_attention",)  # nor have the codes of its q and k: tests/ir/test_shift_add_attention.py
SMOOTH = [name for name in ops.OPS if name not in (*ROUNDED, *CODED, *MATCHES)]
# the case in which every operand has a gradient: a bias, both means, sizes above 0, a decay, parameters
DIFFERENTIABLE = {"attention": 9, "feature_map": 2, "linear_attention": 9, "token_merge": 2}


@pytest.mark.parametrize("name", SMOOTH)
def test_every_float_operand_has_a_gradient_that_finite_differences_confirm(name: str) -> None:
    dtype = torch.float64 if name == "hybrid_attention_step" else torch.float32  # beside its sums a change of its output is small
    case = _cases(name, dtype)[DIFFERENTIABLE.get(name, 1)]
    tensors = [a for a in _tensors(case) if a.is_floating_point()]
    for i, tensor in enumerate(tensors):
        x = tensor.clone().requires_grad_(True)
        direction = torch.randn_like(x) * x.detach().abs().mean()

        def loss(value: Tensor, x: Tensor = tensor) -> Tensor:
            given = pytree.tree_map(lambda a: value if a is x else a, case)
            return sum((o.square() * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in _call(name, given))  # type: ignore[return-value]

        (gradient,) = torch.autograd.grad(loss(x), x)
        step = 1e-3
        with torch.no_grad():
            slope = (loss(tensor + step * direction) - loss(tensor - step * direction)) / (2 * step)
        expected = (gradient * direction).sum()
        assert gradient.abs().max() > 0, f"operand {i} of {name} has no gradient"
        assert abs(slope - expected) <= 0.02 * abs(expected) + 0.02 * gradient.norm() * direction.norm(), f"operand {i} of {name}"


def test_rms_norm_rounds_to_the_input_dtype_before_the_weight() -> None:
    x, w = torch.randn(64, 100, dtype=torch.bfloat16), torch.randn(100, dtype=torch.bfloat16)
    f = x.float()
    normal = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(torch.ops.rewright.rms_norm(x, w, 1e-5), w * normal.to(torch.bfloat16))
    assert not torch.equal(torch.ops.rewright.rms_norm(x, w, 1e-5), (w.float() * normal).to(torch.bfloat16))


def test_add_rms_norm_is_bit_equal_to_add_and_rms_norm() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for x, r, w, eps in _cases("add_rms_norm", dtype):
            y, h = torch.ops.rewright.add_rms_norm(x, r, w, eps)
            assert torch.equal(h, x + r)
            assert torch.equal(y, torch.ops.rewright.rms_norm(x + r, w, eps))


def test_rope_turns_pairs_of_the_two_halves() -> None:
    x = torch.randn(1, 1, 3, 8)
    angle = torch.randn(3, 4)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], -1).contiguous()) * torch.polar(torch.ones(3, 4), angle)
    torch.testing.assert_close(torch.ops.rewright.rope(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


def _naive_attention(q, k, v, key_mask, causal, window, scale, softcap, bias, sizes=None):
    """Loops over queries and keys, in float64."""
    b, h, rows, d = q.shape
    columns, group = k.shape[2], h // k.shape[1]
    scale = d**-0.5 if scale is None else scale
    bias = torch.zeros(1, 1, 1, 1) if bias is None else bias
    bias = bias.expand(b, h, rows, columns).double()
    out = torch.zeros(b, h, rows, v.shape[3], dtype=torch.float64)
    for n in range(b):
        for head in range(h):
            keys, values = k[n, head // group].double(), v[n, head // group].double()
            for i in range(rows):
                s = keys @ q[n, head, i].double() * scale
                s = softcap * torch.tanh(s / softcap) if softcap is not None else s
                s = s + bias[n, head, i] + (0 if sizes is None else sizes[n].double().log())
                for j in range(columns):
                    distance = i + columns - rows - j
                    hidden = key_mask is not None and not key_mask[n, j] or causal and distance < 0 or window is not None and abs(distance) >= window
                    s[j] = float("-inf") if hidden else s[j]
                if not s.isinf().all():
                    out[n, head, i] = s.softmax(-1) @ values
    return out


@pytest.mark.parametrize("case", range(12))
def test_attention_is_what_loops_over_queries_and_keys_compute(case: int) -> None:
    arguments = _cases("attention")[case]
    torch.testing.assert_close(torch.ops.rewright.attention(*arguments).double(), _naive_attention(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_is_bit_equal_to_the_sdpa_call_it_replaces(causal: bool, masked: bool) -> None:
    q, k, v = torch.randn(2, 8, 33, 16), torch.randn(2, 2, 33, 16), torch.randn(2, 2, 33, 16)
    key_mask = torch.rand(2, 33) < 0.7
    key_mask[:, 0] = True
    mask = torch.ones(33, 33, dtype=torch.bool).tril() if causal else torch.ones(33, 33, dtype=torch.bool)
    mask = mask & key_mask[:, None, None] if masked else mask[None, None]
    repeated = (t.repeat_interleave(4, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    assert torch.equal(torch.ops.rewright.attention(q, k, v, key_mask if masked else None, causal), expected)


def test_attention_of_a_query_that_sees_nothing_is_finite() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    for softcap, bias in [(None, None), (2.0, None), (None, torch.randn(1, 2, 5, 5))]:
        assert torch.ops.rewright.attention(q, k, v, nothing, softcap=softcap, bias=bias).isfinite().all()
