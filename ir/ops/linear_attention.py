"""o_i = sum_j a_ij v_j / sum_j a_ij,  a_ij = w_j (q_i.k_j + eps) e^(G_i - G_j)        q: [b, h, n, D]   k: [b, hk, m, D]   v: [b, hk, m, dv]   w: [b, m]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic

# In onnxruntime this meaning is the fast form in both directions; com.microsoft.LinearAttention with a channel of ones for the sums takes 1.6 times as long
# at 512 tokens and 1.3 at 2048 (1.31.1, 1 thread, 12 heads of 64; without those sums, or with packed heads, as long at 2048).
CHUNK = 64
"""Tokens that see each other by products of pairs; earlier chunks are seen through their states."""

EPS = 1e-6
"""What every product of features has added: a query whose features are all zero takes the mean of the values it sees (specs/attention_tokens.md 7.2)."""

RMS_EPS = 1e-6

NORMALIZE = ("sum", "none", "rms")


@semantic("linear_attention(Tensor q, Tensor k, Tensor v, Tensor? weights=None, bool causal=False, Tensor? decay=None, str normalize='sum') -> Tensor")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    causal: bool = False,
    decay: Tensor | None = None,
    normalize: str = "sum",
) -> Tensor:
    """Attention over features q and k (`feature_map`): time and memory linear in tokens. Returns [b, h, n, dv].

    hk divides h: key head i serves the query heads i*h/hk ... (i+1)*h/hk - 1, which share one state.
    weights: [b, m], how many equal keys each one stands for: sizes of merged tokens, or 0 for padding and 1.
    causal: query i sees keys 0 ... i; as many queries as keys.
    decay: log decays, causal only. [heads] or [b, heads, n], heads being hk or h (a state each then). What key j adds is weaker by e^(G_i - G_j) for
    query i, G the running sum over tokens (RetNet, ALiBi: minus the slope). None above 0: those count as 0.
    normalize: "sum" as above. "none": the sum of q_i.k_j v_j alone. "rms": that divided by its root mean square over dv (TransNormer).
    Sums are kept in float32 at least. Negative products of features are for models trained so: a sum near 0 is divided by as it is.
    """
    refuse(q, k, v, causal, decay, normalize)
    dtype = v.dtype
    q, k, v = (wide(t) for t in (q, k, v))
    given = None if weights is None else weights.to(k.dtype)[:, None, :, None]
    o = _causal(q, k, v, given, decay, normalize) if causal else _bidirectional(q, k, v, given, normalize)
    return o.to(dtype)


def refuse(q: Tensor, k: Tensor, v: Tensor, causal: bool, decay: Tensor | None, normalize: str) -> None:
    """What does not fit together, in words."""
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if decay is not None and not causal:
        raise ValueError("a decay needs an order: causal=True")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads can't share {k.shape[1]} key heads evenly")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"queries have {q.shape[-1]} features and keys {k.shape[-1]}: both need the same map")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal linear attention takes as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if decay is not None and decay.shape[-1 if decay.dim() == 1 else 1] not in (q.shape[1], k.shape[1]):
        raise ValueError(f"a decay of shape {list(decay.shape)} fits neither {q.shape[1]} query heads nor {k.shape[1]} key heads")


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def normalized(o: Tensor, normalize: str) -> Tensor:
    """What "rms" divides by, for the other kinds nothing."""
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + RMS_EPS) if normalize == "rms" else o


def _bidirectional(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, normalize: str) -> Tensor:
    """Two products. eps' part is the same for all queries: eps times the sum of the values."""
    shape = (*q.shape[:-1], v.shape[-1])
    rows = q.reshape(k.shape[0], k.shape[1], -1, q.shape[-1])  # of the heads that share a state, one after the other
    keys = k if weights is None else k * weights
    o = rows @ (keys.transpose(-1, -2) @ v)
    if normalize == "sum":
        values = v if weights is None else v * weights
        count = torch.ones_like(k[:, :1, :, :1]).sum(-2, keepdim=True) if weights is None else weights.sum(-2, keepdim=True)
        total = rows @ keys.sum(-2)[..., None] + EPS * count
        o = (o + EPS * values.sum(-2, keepdim=True)) / (total if weights is None else nonzero(total))
    return normalized(o, normalize).reshape(shape)


def nonzero(total: Tensor) -> Tensor:
    """1 for a 0: where no key is seen the sum of values is 0 too."""
    return torch.where(total == 0, 1.0, total)


def _causal(q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, decay: Tensor | None, normalize: str) -> Tensor:
    _, h, n, _ = q.shape
    q, k = with_eps(q, k, normalize)
    k = k if weights is None else k * weights
    k, v, g = per_state(q, k, v, decay)
    hk = k.shape[1]
    count = (n + CHUNK - 1) // CHUNK
    missing = count * CHUNK - n
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(2, (count, CHUNK)) for t in (q, k, v))
    rows = q.unflatten(1, (hk, h // hk)).transpose(2, 3).flatten(3, 4)  # [b, hk, count, h / hk * CHUNK, D]
    g = None if g is None else F.pad(g, (0, missing)).unflatten(2, (count, CHUNK))
    state, total = states(k, v, g)
    o, z = within(rows, k, v, before(state, g), before(total, g), g)
    if normalize == "sum":
        o = o / nonzero(z)  # of the rows that fill the last chunk, too: a NaN there would reach the gradients
    o = normalized(o, normalize).unflatten(3, (h // hk, CHUNK)).transpose(2, 3)  # [b, hk, h / hk, count, CHUNK, dv]
    return o.flatten(3, 4).flatten(1, 2)[:, :, :n]


def with_eps(q: Tensor, k: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """One feature more, eps of a query and 1 of a key, where sums are divided by: their product adds eps to every other."""
    if normalize != "sum":
        return q, k
    return F.pad(q, (0, 1), value=EPS), F.pad(k, (0, 1), value=1.0)


def per_state(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with a head a state, and the log decays [b or 1, heads, n] of the states, none above 0."""
    if decay is None:
        return k, v, None
    g = wide(decay).to(k.dtype).clamp(max=0)
    g = g[None, :, None].expand(1, g.shape[0], k.shape[2]) if g.dim() == 1 else g
    repeats = g.shape[1] // k.shape[1]
    return (k, v, g) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), g)


def states(k: Tensor, v: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a chunk's keys add to the sums after it: [..., D, dv] and [..., D]. k: [..., c, D]   v: [..., c, dv]   g: [..., c]"""
    if g is not None:
        k = k * between(g)[..., -1, :].exp()[..., None]
    return k.transpose(-1, -2) @ v, k.sum(-2)


def before(x: Tensor, g: Tensor | None) -> Tensor:
    """[b, heads, chunks, ...]: the sums over the chunks before each one, decayed by the chunks in between."""
    if g is None:
        return F.pad(x.cumsum(2), (0, 0) * (x.dim() - 3) + (1, 0))[:, :, :-1]
    since = F.pad(between(g.sum(-1)), (0, 0, 1, 0))[..., :-1, :]  # row i, column j: by chunks j + 1 ... i - 1
    earlier = torch.ones(since.shape[-2:], device=g.device, dtype=g.dtype).tril(-1)
    return ((since.exp() * earlier) @ x.flatten(3)).view_as(x)


def between(g: Tensor) -> Tensor:
    """[..., c, c]: row i, column j: g_(j+1) + ... + g_i, 0 where j >= i. Added up, not subtracted: small ones after large ones are exact too."""
    c = g.shape[-1]
    return (g[..., None] * torch.ones(c, c, device=g.device, dtype=g.dtype).tril(-1)).cumsum(-2)


def within(q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numerators [..., rows, dv] and denominators [..., rows, 1] of one chunk (of every chunk): `state` and `total` stand for the tokens before it.

    q: [..., c * heads, D], the chunk's tokens once a head.   k: [..., c, D]   v: [..., c, dv]   state: [..., D, dv]   total: [..., D]   g: [..., c]
    """
    c = k.shape[-2]
    heads = q.shape[-2] // c
    seen = torch.ones(c, c, device=q.device, dtype=q.dtype).tril()
    if g is not None:
        seen = seen * between(g).exp()
        kept = g.cumsum(-1).exp()[..., None]
        kept = kept if heads == 1 else torch.cat([kept] * heads, -2)
    seen = seen if heads == 1 else torch.cat([seen] * heads, -2)
    products = (q @ k.transpose(-1, -2)) * seen
    earlier = q if g is None else q * kept
    return earlier @ state + products @ v, earlier @ total[..., None] + products.sum(-1, keepdim=True)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """Both kinds of attention and of decay, grouped heads with a state a key head and a query head, other numbers of queries and of value channels,
    fewer tokens than a chunk, several chunks, weights with zeros, padding alone, queries of zeros, every normalisation."""

    def tensors(b: int, h: int, hk: int, n: int, m: int, d: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (torch.rand(s, device=device, dtype=dtype) for s in ((b, h, n, d), (b, hk, m, d)))
        q[0, 0, 0] = 0
        return q, k, torch.randn(b, hk, m, dv, device=device, dtype=dtype)

    def weights(b: int, m: int) -> Tensor:
        found = torch.randint(4, (b, m), device=device).to(dtype)
        found[0, 0] = 2
        return found

    def decay(*shape: int) -> Tensor:
        return -torch.rand(shape, device=device, dtype=dtype)

    yield *tensors(2, 2, 2, 9, 9, 8, 8), None
    yield *tensors(2, 4, 2, 7, 21, 8, 16), weights(2, 21) + 1
    yield *tensors(1, 2, 2, 5, 6, 8, 8), torch.zeros(1, 6, device=device, dtype=dtype)
    yield *tensors(2, 2, 2, 130, 130, 8, 4), None, True
    yield *tensors(2, 4, 2, 70, 70, 8, 8), weights(2, 70), True
    yield *tensors(2, 4, 2, 150, 150, 8, 8), None, True, decay(2)
    yield *tensors(1, 4, 2, 150, 150, 8, 8), None, True, decay(4)
    yield *tensors(1, 4, 2, 20, 20, 8, 8), None, True, None, "none"
    yield *tensors(2, 2, 1, 20, 20, 8, 8), weights(2, 20) + 1, False, None, "rms"
    yield *tensors(2, 4, 2, 150, 150, 8, 8), weights(2, 150) + 1, True, decay(2, 2, 150), "sum"
    yield *tensors(2, 4, 2, 140, 140, 8, 8), weights(2, 140), True, decay(2, 4, 140), "rms"
