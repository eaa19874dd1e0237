"""linear_attention on a GPU: sums over spans of keys first, then, causal ones added up in order, every span of queries with its sums."""

# A jitted function is launched with other arguments than it declares:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir.ops.linear_attention import EPS, RMS_EPS, refuse
from ._tiles import FLOAT32, upcast


class Sizes(NamedTuple):
    """Of one program."""

    chunk: int
    """Tokens a step; of a causal sum, a span."""
    features: int
    values: int
    """Most value channels; where the output is divided by a norm over them a program takes all."""
    warps: int


HALF, WIDE = Sizes(64, 64, 128, 4), Sizes(32, 32, 64, 4)
"""For half precision, and for float32, whose products are three each."""
PARTS = 64
"""The sums of a bidirectional one are found in at most so many parts."""
BLOCK = 512
"""Numbers of the sums a program adds up over spans."""


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UP: tl.constexpr):
    if UP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=FLOAT32)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _decays(G, row, at, n, EACH: tl.constexpr):
    # log decays of tokens, 0 beyond the end; `row` is the first of a head's, or the head's one
    g = tl.load(G + row + at, mask=at < n, other=0) if EACH else tl.where(at < n, tl.load(G + row), 0.0)
    return tl.minimum(g.to(tl.float32), 0.0)


@triton.jit
def _sums(
    K, V, W, G, S, heads, shared, m, D, DV, width, parts, span, g_batch, g_head,
    WEIGHTED: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a span of keys adds, for one state head: k^T v, the sums of k and of v, and of ones, weighted and decayed to the span's end."""
    part, head = tl.program_id(0) % parts, tl.program_id(0) // parts  # of batch * heads
    d, v_at = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2) * BV + tl.arange(0, BV)
    batch = head // heads
    key_row = (batch * (heads // shared) + head % heads // shared).to(tl.int64) * m
    state = tl.zeros((BD, BV), tl.float32)
    keys, values, count = tl.zeros((BD,), tl.float32), tl.zeros((BV,), tl.float32), 0.0
    for start in range(part * span, tl.minimum((part + 1) * span, m), C):
        at = start + tl.arange(0, C)
        k = tl.load(K + (key_row + at)[:, None] * D + d[None, :], mask=(at[:, None] < m) & (d[None, :] < D), other=0)
        v = tl.load(V + (key_row + at)[:, None] * DV + v_at[None, :], mask=(at[:, None] < m) & (v_at[None, :] < DV), other=0)
        weight = (at < m).to(tl.float32)
        if WEIGHTED:
            weight *= tl.load(W + batch.to(tl.int64) * m + at, mask=at < m, other=0).to(tl.float32)
        if DECAY != "none":
            g = _decays(G, batch.to(tl.int64) * g_batch + head % heads * g_head, at, m, DECAY == "each")
            later = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
            weight *= tl.exp(tl.sum(tl.where(later, g[:, None], 0.0), 0))  # e^(g_(j+1) + ... + g_last)
        heavy = k.to(tl.float32) * weight[:, None]
        if WEIGHTED or DECAY != "none":
            state += _dot(tl.trans(heavy), v.to(tl.float32), PRECISION, UP)
        else:
            state += _dot(tl.trans(k), v, PRECISION, UP)
        keys += tl.sum(heavy, 0)
        values += tl.sum(v.to(tl.float32) * weight[:, None], 0)
        count += tl.sum(weight, 0)
    out = S + (head.to(tl.int64) * parts + part) * width
    tl.store(out + d[:, None] * DV + v_at[None, :], state, mask=(d[:, None] < D) & (v_at[None, :] < DV))
    if tl.program_id(2) == 0:
        tl.store(out + D * DV + d, keys, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(out + D * DV + D + v_at, values, mask=v_at < DV)
        tl.store(out + width - 1, count)  # the same from every one of these


@triton.jit
def _before(S, G, heads, parts, width, n, span, g_batch, g_head, DECAY: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of spans [heads, parts, width] become, in place, those of the spans before each: one program a head and a block of the width."""
    head, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, parts, num_stages=4):
        place = S + (head.to(tl.int64) * parts + part) * width + at
        own = tl.load(place, mask=at < width, other=0)
        tl.store(place, total, mask=at < width)
        if DECAY != "none":
            g = _decays(G, (head // heads).to(tl.int64) * g_batch + head % heads * g_head, part * span + tl.arange(0, C), n, DECAY == "each")
            total *= tl.exp(tl.sum(g, 0))
        total += own


@triton.jit
def _outputs(
    Q, K, V, W, G, S, Y, h, hk, heads, n, D, DV, width, parts, g_batch, g_head, eps, rms_eps,
    NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr, UP: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One span of queries of one head: the sums before it (of all keys, bidirectional), and, causal, its own keys pair by pair."""
    chunk, head = tl.program_id(0), tl.program_id(1)  # of batch * h
    v_at = tl.program_id(2) * BV + tl.arange(0, BV)
    batch = head // h
    row, at = head.to(tl.int64) * n, chunk * C + tl.arange(0, C)
    key_row = (batch * hk + head % h // (h // hk)).to(tl.int64) * n
    state_head = head % h // (h // heads)
    sums = S + ((batch * heads + state_head).to(tl.int64) * parts + (chunk if CAUSAL else 0)) * width
    o, total = tl.zeros((C, BV), tl.float32), tl.zeros((C,), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        q = tl.load(Q + (row + at)[:, None] * D + d[None, :], mask=(at[:, None] < n) & (d[None, :] < D), other=0)
        state = tl.load(sums + d[:, None] * DV + v_at[None, :], mask=(d[:, None] < D) & (v_at[None, :] < DV), other=0)
        o += _dot(q.to(tl.float32), state, PRECISION, UP)
        total += tl.sum(q.to(tl.float32) * tl.load(sums + D * DV + d, mask=d < D, other=0)[None, :], 1)
        if CAUSAL:
            k = tl.load(K + (key_row + at)[None, :] * D + d[:, None], mask=(at[None, :] < n) & (d[:, None] < D), other=0)
            pairs += _dot(q, k, PRECISION, UP)
    o += eps * tl.load(sums + D * DV + D + v_at, mask=v_at < DV, other=0)[None, :]
    total += eps * tl.load(sums + width - 1)
    if CAUSAL:
        i = tl.arange(0, C)
        pairs = tl.where(i[:, None] >= i[None, :], pairs + eps, 0.0)
        if WEIGHTED:
            pairs *= tl.load(W + batch.to(tl.int64) * n + at, mask=at < n, other=0).to(tl.float32)[None, :]
        if DECAY != "none":
            g = _decays(G, batch.to(tl.int64) * g_batch + state_head * g_head, at, n, DECAY == "each")
            since = tl.cumsum(tl.where(i[:, None] > i[None, :], g[:, None], 0.0), 0)  # added up, not subtracted: small after large is exact too
            pairs *= tl.exp(since)
            kept = tl.exp(tl.cumsum(g, 0))
            o *= kept[:, None]
            total *= kept
        v = tl.load(V + (key_row + at)[:, None] * DV + v_at[None, :], mask=(at[:, None] < n) & (v_at[None, :] < DV), other=0)
        o += _dot(pairs, v.to(tl.float32), PRECISION, UP)
        total += tl.sum(pairs, 1)
    if NORMALIZE == "sum":
        o = o / tl.where(total == 0, 1.0, total)[:, None]
    elif NORMALIZE == "rms":
        o = o * tl.rsqrt(tl.sum(o * o, 1) / DV + rms_eps)[:, None]
    tl.store(Y + (row + at)[:, None] * DV + v_at[None, :], o.to(Y.dtype.element_ty), mask=(at[:, None] < n) & (v_at[None, :] < DV))


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    causal: bool = False,
    decay: Tensor | None = None,
    normalize: str = "sum",
) -> Tensor:
    """[b, h, n, dv] of the op. Products with sums are in TF32 for half precision, and three of them for float32."""
    refuse(q, k, v, causal, decay, normalize)
    dtype = v.dtype
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), dtype)
    q, k, v = (t.to(common).contiguous() for t in (q, k, v))
    (b, h, n, d), (hk, m, dv) = q.shape, v.shape[1:]
    heads = hk if decay is None else decay.shape[-1 if decay.dim() == 1 else 1]
    weights, decay = (None if t is None else t.contiguous() for t in (weights, decay))
    kind = "none" if decay is None else "one" if decay.dim() == 1 else "each"
    g_batch, g_head = (0, 1) if decay is None or decay.dim() == 1 else (heads * n if decay.shape[0] > 1 else 0, n)
    sizes = WIDE if common == torch.float32 else HALF
    chunk = sizes.chunk
    span = chunk if causal else triton.cdiv(triton.cdiv(m, chunk), PARTS) * chunk
    parts = triton.cdiv(m, span)
    width = triton.cdiv(d * dv + d + dv + 1, 16) * 16  # state, sums of keys and of values, and in the last place their number
    bd, whole = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    bd, bv = min(bd, sizes.features), min(whole, sizes.values)
    form = {
        "WEIGHTED": weights is not None,
        "DECAY": kind,
        "PRECISION": "tf32x3" if common == torch.float32 else "tf32",
        "UP": upcast(common),
        "C": chunk,
        "BD": bd,
    }
    options = {"num_warps": sizes.warps, "num_stages": 2}
    y = torch.empty(b, h, n, dv, dtype=dtype, device=q.device)
    sums = torch.empty(b * heads, parts, width, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        grid = (b * heads * parts, triton.cdiv(d, bd), triton.cdiv(dv, bv))
        _sums[grid](k, v, weights, decay, sums, heads, heads // hk, m, d, dv, width, parts, span, g_batch, g_head, **form, BV=bv, **options)
        if causal:
            _before[(b * heads, triton.cdiv(width, BLOCK))](
                sums, decay, heads, parts, width, n, span, g_batch, g_head, DECAY=kind, C=chunk, BLOCK=BLOCK, num_warps=4
            )
        elif parts > 1:
            sums, parts = sums.sum(1), 1
        eps = EPS if normalize == "sum" else 0.0
        bv = whole if normalize == "rms" else bv
        _outputs[(triton.cdiv(n, chunk), b * h, triton.cdiv(dv, bv))](
            q, k, v, weights, decay, sums, y, h, hk, heads, n, d, dv, width, parts, g_batch, g_head, eps, RMS_EPS,
            NORMALIZE=normalize, CAUSAL=causal, **form, BV=bv, **options,
        )  # fmt: skip
    return y


def examples(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Both kinds at 64 and at 128 channels; more features and channels than a program takes; several parts; decays a head and a token; weights."""

    def tensors(b: int, h: int, hk: int, n: int, d: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (torch.rand(b, heads, n, d, dtype=dtype, device=device) for heads in (h, hk))
        return q, k, torch.randn(b, hk, n, dv, dtype=dtype, device=device)

    yield *tensors(1, 2, 2, 192, 64, 64), None, True
    yield *tensors(1, 2, 1, 96, 128, 128), None, True
    yield *tensors(1, 1, 1, 65, 80, 144), torch.rand(1, 65, dtype=dtype, device=device), True, None, "none"
    yield *tensors(1, 2, 2, 192, 64, 64), None, True, -torch.rand(2, dtype=dtype, device=device)
    yield *tensors(1, 4, 2, 100, 64, 64), torch.rand(1, 100, dtype=dtype, device=device), True, -torch.rand(1, 4, 100, dtype=dtype, device=device), "rms"
    yield *tensors(1, 2, 1, 160, 64, 64), None
    yield *tensors(1, 2, 2, 130, 80, 144), torch.rand(1, 130, dtype=dtype, device=device), False, None, "rms"
    yield *tensors(1, 1, 1, PARTS * WIDE.chunk + 70, 16, 16), None
