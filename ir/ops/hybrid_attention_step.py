"""hybrid_attention of the next token: the last 2 windows of keys in a ring, earlier ones in sums        q: [b, h, 1, d]   keys: [b, hk, 2 window, d]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._semantic import semantic
from .hybrid_attention import LEAST_GAMMA
from .linear_attention import EPS, nonzero, wide


@semantic(
    "hybrid_attention_step(Tensor q, Tensor k, Tensor v, Tensor fq, Tensor fk, Tensor gamma, Tensor keys, Tensor values, Tensor given, Tensor state, "
    "Tensor sums, Tensor position, Tensor? key_mask=None, float? scale=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    keys: Tensor,
    values: Tensor,
    given: Tensor,
    state: Tensor,
    sums: Tensor,
    position: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What causal `hybrid_attention` gives for one more token, in time and memory that do not grow with the text.

    Returns [b, h, 1, dv] and what the next call takes: keys, values, given, state, sums, position. `empty` makes these before the first token, `after`
    makes them of a prefix.
    q, k, v, fq, fk, gamma: as in `hybrid_attention`, of one token.   key_mask: [b] bool, False where the token is padding.
    keys, values: [b, hk, 2 window, d | dv], the ring: a token lies in slot (position mod 2 window).   given: [b, 2 window] bool, its slots that count.
    state: [b, hk, 3, D + 1, dv], sums: [b, hk, 3, D + 1], float32 or wider, eps a feature of its own: of all blocks before the ring's, of the block
    before the token's, of its own. Where a block begins they move up by one: no key is multiplied twice, whatever the window.
    position: int64 [b], tokens before this one; each text of a batch may be at another.
    """
    _check(q, k, v, fq, fk, keys, values, given, state, sums)
    b, h, _, d = q.shape
    hk, window, dtype = k.shape[1], keys.shape[2] // 2, v.dtype
    slots, slot = torch.arange(2 * window, device=q.device), position[:, None] % (2 * window)
    begins = position[:, None] % window == 0
    real = torch.ones(b, 1, dtype=torch.bool, device=q.device) if key_mask is None else key_mask[:, None]

    here = slots == slot  # [b, 2 window]
    left = begins & (slots // window == slot // window)
    given = (given & ~left) | (here & real)
    keys, values = (torch.where(here[:, None, :, None], new.to(old.dtype), old) for new, old in ((k, keys), (v, values)))

    fq, fk = F.pad(wide(fq), (0, 1), value=EPS).reshape(b, hk, h // hk, -1), F.pad(wide(fk), (0, 1), value=1.0) * real[:, :, None, None]
    state = _moved(state, begins[:, :, None, None], fk.transpose(-1, -2) @ wide(v))
    sums = _moved(sums, begins[:, :, None], fk[:, :, 0])

    rows = wide(q).reshape(b, hk, h // hk, d) * (d**-0.5 if scale is None else scale)  # of the heads that share a key head
    scores = rows @ wide(keys).transpose(-1, -2)
    seen = given[:, None, None]
    scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
    near = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen * wide(gamma).clamp(min=LEAST_GAMMA).reshape(hk, h // hk, 1)
    o = near @ wide(values) + fq @ state[:, :, 0]
    o = o / nonzero(near.sum(-1, keepdim=True) + fq @ sums[:, :, 0, :, None])
    return o.reshape(b, h, 1, -1).to(dtype), keys, values, given, state, sums, position + 1


def _moved(x: Tensor, begins: Tensor, added: Tensor) -> Tensor:
    """Sums [b, hk, 3, ...] of the far blocks, the one before and the token's own, with the token in it."""
    far, before, own = x.unbind(2)
    later = torch.where(begins, 0.0, own) + added.to(x.dtype)
    return torch.stack([torch.where(begins, far + before, far), torch.where(begins, own, before), later], 2)


def _check(q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, keys: Tensor, values: Tensor, given: Tensor, state: Tensor, sums: Tensor) -> None:
    b, h, n, d = q.shape
    hk, features, dv = fk.shape[1], fk.shape[-1] + 1, v.shape[-1]
    if n != 1 or k.shape[2] != 1:
        raise ValueError(f"a step is of one token, got {n} queries and {k.shape[2]} keys; `hybrid_attention_step.after` makes the state of a prefix")
    if h % hk:
        raise ValueError(f"{h} query heads can't share {hk} key heads evenly")
    if fq.shape[:3] != q.shape[:3] or fk.shape[:3] != k.shape[:3] or fq.shape[-1] != fk.shape[-1]:
        raise ValueError(f"features {list(fq.shape)} and {list(fk.shape)} are not those of queries {list(q.shape)} and keys {list(k.shape)}")
    slots = keys.shape[2]
    fits = (b, hk, slots, d), (b, hk, slots, dv), (b, slots), (b, hk, 3, features, dv), (b, hk, 3, features)
    found = tuple(tuple(x.shape) for x in (keys, values, given, state, sums))
    if slots % 2 or slots == 0 or found != fits:
        names = ("keys", "values", "given", "state", "sums")
        wrong = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, found))
        right = ", ".join(str(list(shape)) for shape in fits)
        raise ValueError(f"the ring has twice the window's slots, at least 2: {right}; got {wrong}; `hybrid_attention_step.empty` makes them")


def empty(
    batch: int,
    heads: int,
    window: int,
    width: int,
    features: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """keys, values, given, state, sums, position before the first token. heads: of the keys; width: of a key; channels: of a value."""
    keys, values = (torch.zeros(batch, heads, 2 * window, size, dtype=dtype, device=device) for size in (width, channels))
    state = torch.zeros(batch, heads, 3, features + 1, channels, dtype=wide(keys).dtype, device=device)
    given = torch.zeros(batch, 2 * window, dtype=torch.bool, device=device)
    return keys, values, given, state, torch.zeros_like(state[..., 0]), torch.zeros(batch, dtype=torch.int64, device=device)


def after(k: Tensor, v: Tensor, fk: Tensor, window: int, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """keys, values, given, state, sums, position after a prefix, as if it had come token by token. key_mask: [b, n] bool."""
    b, hk, n, d = k.shape
    keys, values, given, state, sums, position = empty(b, hk, window, d, fk.shape[-1], v.shape[-1], k.dtype, k.device)
    own = max(n - 1, 0) // window * window  # where the last token's block begins
    before = max(own - window, 0)
    slots = torch.arange(before, n, device=k.device) % (2 * window)
    real = torch.ones(b, n, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    keys[:, :, slots], values[:, :, slots], given[:, slots] = k[:, :, before:], v[:, :, before:], real[:, before:]
    fk = F.pad(wide(fk), (0, 1), value=1.0) * real[:, None, :, None]
    for part, of in enumerate((slice(before), slice(before, own), slice(own, n))):
        state[:, :, part], sums[:, :, part] = fk[:, :, of].transpose(-1, -2) @ wide(v[:, :, of]), fk[:, :, of].sum(-2)
    return keys, values, given, state, sums, position + n


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """The first token, one within a block and one that begins a block, windows of one token and more, grouped heads, padding, a scale, gamma of 0."""
    for b, h, hk, n, window, masked, scale in [
        (1, 2, 2, 0, 4, False, None),
        (2, 4, 2, 21, 4, False, None),
        (2, 4, 1, 20, 4, True, 0.5),
        (2, 2, 2, 5, 1, True, None),
    ]:
        widths = (h, 8), (hk, 8), (hk, 4), (h, 6), (hk, 6)
        q, k, v, fq, fk = (torch.randn(b, heads, n + 1, width, device=device, dtype=dtype) for heads, width in widths)
        fq, fk, gamma = fq.abs(), fk.abs(), torch.rand(h, device=device, dtype=dtype) + 0.2
        mask = torch.rand(b, n + 1, device=device) < 0.6
        if masked:
            gamma[0], mask[-1] = 0, False
        state = after(k[:, :, :n], v[:, :, :n], fk[:, :, :n], window, mask[:, :n] if masked else None)
        q, k, v, fq, fk = (x[:, :, n:] for x in (q, k, v, fq, fk))
        yield q, k, v, fq, fk, gamma, *state, mask[:, n] if masked else None, scale
