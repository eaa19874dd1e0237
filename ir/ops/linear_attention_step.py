"""linear_attention of the next tokens: state += k^T v, sums += k, o = q state / q.sums        q: [b, h, n, D]   k: [b, hk, n, D]   v: [b, hk, n, dv]"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._semantic import semantic
from .linear_attention import nonzero, normalized, per_state, refuse, states, wide, with_eps, within


@semantic("linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor state, Tensor sums, Tensor? decay=None, str normalize='sum') -> (Tensor, Tensor, Tensor)")
def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, sums: Tensor, decay: Tensor | None = None, normalize: str = "sum"
) -> tuple[Tensor, Tensor, Tensor]:
    """What causal `linear_attention` gives for n more tokens, and the sums after them. Returns [b, h, n, dv] and the new state and sums.

    state: [b, heads, D', dv], sums: [b, heads, D'], float32 or wider, of the tokens so far (`empty`): a head for each of k's, or of q's with a decay for
    each of those. D' = D + 1 where normalize is "sum", for eps is a feature of its own; else D. decay: [heads] or [b, heads, n].
    Meant for one token or a few: they see each other by products of pairs. A long text goes through in pieces.
    """
    refuse(q, k, v, True, decay, normalize)
    dtype = v.dtype
    b, h, n, _ = q.shape
    q, k = with_eps(wide(q), wide(k), normalize)
    k, v, g = per_state(q, k, wide(v), decay)
    heads = k.shape[1]
    if state.shape[1:] != (heads, k.shape[-1], v.shape[-1]) or sums.shape[1:] != (heads, k.shape[-1]):
        raise ValueError(
            f"the state must be [{b}, {heads}, {k.shape[-1]}, {v.shape[-1]}] and the sums [{b}, {heads}, {k.shape[-1]}], "
            f"got {list(state.shape)} and {list(sums.shape)}; `linear_attention_step.empty` makes both"
        )
    o, total = within(q.reshape(b, heads, -1, q.shape[-1]), k, v, state.to(k.dtype), sums.to(k.dtype), g)
    if normalize == "sum":
        o = o / nonzero(total)
    more, added = states(k, v, g)
    if g is not None:
        kept = g.sum(-1).exp()[..., None]  # [b, heads, 1]
        state, sums = state * kept[..., None], sums * kept
    return normalized(o, normalize).reshape(b, h, n, v.shape[-1]).to(dtype), state + more, sums + added


def empty(batch: int, heads: int, features: int, channels: int, normalize: str = "sum", device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """The state and the sums before the first token. heads: of the keys, or of the queries where each has a decay of its own."""
    rows = features + (normalize == "sum")
    return torch.zeros(batch, heads, rows, channels, device=device), torch.zeros(batch, heads, rows, device=device)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """One token and a few, grouped heads with decays of key heads and of query heads, no tokens before, every normalisation."""
    for h, hk, n, decays, normalize in [(2, 2, 1, None, "sum"), (4, 2, 3, (2, 2, 3), "sum"), (4, 2, 1, (4,), "rms"), (4, 1, 2, None, "none")]:
        heads = decays[-1 if len(decays) == 1 else 1] if decays else hk
        state, sums = empty(2, heads, 8, 4, normalize, device)
        if n > 1:
            state, sums = torch.randn_like(state), torch.rand_like(sums) + 1
        q, k = (torch.rand(2, heads_, n, 8, device=device, dtype=dtype) for heads_ in (h, hk))
        decay = None if decays is None else -torch.rand(decays, device=device, dtype=dtype)
        yield q, k, torch.randn(2, hk, n, 4, device=device, dtype=dtype), state, sums, decay, normalize
