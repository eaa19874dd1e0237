"""The maps phi whose products phi(q).phi(k) stand in for exp(q.k): their formulas, parameter shapes and first values, one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Formula = Callable[[Tensor, Sequence[Tensor], bool], Tensor]

LARGEST_EXPONENT = 60.0
"""Of a key: its features may not be shifted each by its own maximum, that would change its weight; e^60 times values summed over tokens is finite."""


@dataclass(frozen=True)
class FeatureMap:
    """One kind. f is the number of features asked for; parameter-free maps have no choice of it."""

    formula: Formula
    """x [b, h, n, d] in float32 or wider, parameters, whether x are queries -> [b, h, n, D]."""
    width: Callable[[int, int], int]
    """d, f -> D."""
    first: Callable[[int, int, int, torch.Generator], list[Tensor]] = lambda heads, d, f, generator: []
    """heads, d, f, generator -> parameters to start from."""
    learned: bool = False
    """Its parameters want training."""
    nonnegative: bool = True
    """No product of two vectors of features is below 0, so that outputs are averages of values."""
    projected: bool = False
    """Its first parameter is a matrix, [h, f, d] or [f, d], that x is multiplied by."""
    scaled: bool = False
    """Stands for exp(q.k / sqrt d) itself: another scale has to be multiplied into q. The others take q and k as they are."""
    features: Callable[[int], int] = lambda d: d
    """d -> f where none is asked for."""


def named(kind: str) -> FeatureMap:
    """The map of that name."""
    if kind not in KINDS:
        raise ValueError(f"no feature map named {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind]


def width(kind: str, d: int, features: int | None = None) -> int:
    """D, the features of a head of d channels."""
    chosen = named(kind)
    return chosen.width(d, chosen.features(d) if features is None else features)


def initial(kind: str, heads: int, d: int, seed: int = 0, features: int | None = None) -> list[Tensor]:
    """The parameters to start from, float32; none for many kinds. The same seed gives every head, of q and of k, the same ones: q.k is what is imitated."""
    chosen = named(kind)
    return chosen.first(heads, d, chosen.features(d) if features is None else features, torch.Generator().manual_seed(seed))


def _relu(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    return F.relu(x)


def _elu1(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    return F.elu(x) + 1


def _exponentials(x: Tensor, query: bool) -> Tensor:
    """exp(x). A query's largest exponent is taken off: it cancels where the sum of the weights is divided by."""
    return torch.exp(x - x.amax(-1, keepdim=True) if query else x.clamp(max=LARGEST_EXPONENT))


def _exp(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    return _exponentials(x, query)


def _taylor2(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """[1, x, x_i^2 / sqrt 2, x_i x_j for i < j] of x / d^(1/4): 1 + z + z^2 / 2 with z = q.k / sqrt d, which is 1/2 at least."""
    d = x.shape[-1]
    x = x * d**-0.25
    pairs = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(d - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * math.sqrt(0.5), *pairs], -1)


def _performer(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """exp(w.x - |x|^2 / 2) of x / d^(1/4), w [f, d] normal: products have the mean exp(q.k / sqrt d), but for a factor of each query."""
    x = x * x.shape[-1] ** -0.25
    return _exponentials(x @ parameters[0].to(x.dtype).t() - x.square().sum(-1, keepdim=True) / 2, query)


def _per_head(x: Tensor, w: Tensor) -> Tensor:
    """w [h, f, d]: a matrix a head. [b, h, n, f]"""
    return x @ w.to(x.dtype).transpose(-1, -2)


def _t2r(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """relu(w x + b)."""
    w, b = parameters
    return F.relu(_per_head(x, w) + b.to(x.dtype)[:, None])


def _hedgehog_softmax(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """[softmax(w x), softmax(-w x)] over features."""
    y = _per_head(x, parameters[0])
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)


def _hedgehog_exp(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """[exp(w x), exp(-w x)]."""
    y = _per_head(x, parameters[0])
    return _exponentials(torch.cat([y, -y], -1), query)


def _focused(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """|y| y^3 / |y^3| with y = (relu(x) + 1e-6) / softplus(scale), scale [h, d]: the direction is sharpened, the length stays."""
    y = (F.relu(x) + 1e-6) / F.softplus(parameters[0].to(x.dtype))[:, None]
    cube = (y / y.amax(-1, keepdim=True).detach()) ** 3  # of any multiple of y: no underflow
    return cube * (torch.linalg.vector_norm(y, dim=-1, keepdim=True) / torch.linalg.vector_norm(cube, dim=-1, keepdim=True))


def _nala(x: Tensor, parameters: Sequence[Tensor], query: bool) -> Tensor:
    """Keys [relu(k), relu(-k)]^3; queries the same of q / |q| to the power 3 (1/2 + tanh |q|): a longer query is a sharper one.

    The form of the released code (specs/attention_tokens.md 7.4), without its positions, filter and gate.
    """
    if not query:
        return torch.cat([F.relu(x), F.relu(-x)], -1) ** 3
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    direction = x / length.clamp(min=1e-12)
    return torch.pow(torch.cat([F.relu(direction), F.relu(-direction)], -1), 3 * (0.5 + torch.tanh(length)))


def _orthogonal(heads: int, d: int, f: int, generator: torch.Generator) -> list[Tensor]:
    """[f, d], one for all heads: rows orthogonal in blocks of d, each as long as a row of normal numbers."""
    blocks = [torch.linalg.qr(torch.randn(d, d, generator=generator))[0].t() for _ in range(-(-f // d))]
    return [torch.cat(blocks)[:f] * torch.randn(f, d, generator=generator).norm(dim=-1, keepdim=True)]


def _normal_and_zero(heads: int, d: int, f: int, generator: torch.Generator) -> list[Tensor]:
    """w of normal numbers: then the products measure the angle of q and k before any training."""
    return [(torch.randn(f, d, generator=generator) * (2 / f) ** 0.5).repeat(heads, 1, 1), torch.zeros(heads, f)]


def _identity(heads: int, d: int, f: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.eye(f, d).repeat(heads, 1, 1)]


def _zero_scale(heads: int, d: int, f: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.zeros(heads, d)]


# how good each is: specs/attention_tokens.md 7.4 and 8.1
KINDS = {
    "elu1": FeatureMap(_elu1, lambda d, f: d),
    "relu": FeatureMap(_relu, lambda d, f: d),
    "exp": FeatureMap(_exp, lambda d, f: d),
    "taylor2": FeatureMap(_taylor2, lambda d, f: 1 + d + d * (d + 1) // 2, scaled=True),
    "performer": FeatureMap(_performer, lambda d, f: f, _orthogonal, projected=True, scaled=True, features=lambda d: 4 * d),
    "t2r": FeatureMap(_t2r, lambda d, f: f, _normal_and_zero, learned=True, projected=True),
    "hedgehog_softmax": FeatureMap(_hedgehog_softmax, lambda d, f: 2 * f, _identity, learned=True, projected=True),
    "hedgehog_exp": FeatureMap(_hedgehog_exp, lambda d, f: 2 * f, _identity, learned=True, projected=True),
    "focused": FeatureMap(_focused, lambda d, f: d, _zero_scale, learned=True),
    "nala": FeatureMap(_nala, lambda d, f: 2 * d),
}
"""Every map there is, by name."""
