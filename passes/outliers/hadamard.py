"""Orthogonal Q with x Q in O(n log n): randomised Hadamard matrices of size K 2^m, K by Paley; or random orthogonal ones."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ...ir.errors import UsageError

_DENSE = 64  # a power of two larger than this is applied as a Kronecker product of two or more
_LARGEST_PALEY = 1024  # beyond it, a dense factor costs more than blocks lose
_PIECE = 1 << 22  # elements turned at a time: 32 MiB of float64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [width, width], the same for the same fields; ||Q Q^T - I||_2 <= 1e-12.

    kind: "hadamard": Q = D H / sqrt(n), D random signs, H a Hadamard matrix: every channel is spread evenly over all others (QuaRot,
    Ashkboos et al. 2024). Where no construction here gives a Hadamard matrix of that size, Q is block-diagonal (`block` < width).
    "random": uniform over all orthogonal matrices.
    """

    width: int
    kind: str = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise UsageError(f"no rotation {self.kind!r}; there are hadamard and random")

    @property
    def block(self) -> int:
        """The size of the blocks on Q's diagonal: the width, unless there is no Hadamard matrix of that size."""
        return self.width if self.kind == "random" else math.prod(_sizes(self.width))

    @property
    def remark(self) -> str | None:
        """A sentence about blocks, or None where Q mixes all channels."""
        if self.block == self.width:
            return None
        return f"no Hadamard matrix of size {self.width} can be constructed; Q is block-diagonal with blocks of {self.block}"

    def turn(self, x: Tensor) -> Tensor:
        """x Q in float64.  x: [..., width]"""
        flat = x.reshape(-1, self.width)
        rows = max(1, _PIECE // self.width)
        return torch.cat([self._turn(piece) for piece in flat.split(rows)]).view(x.shape) if len(flat) else flat.double().view(x.shape)

    def matrix(self) -> Tensor:
        """Q itself, float64."""
        return self.turn(torch.eye(self.width, dtype=torch.float64))

    def _turn(self, x: Tensor) -> Tensor:
        x = x.double()
        if self.kind == "random":
            return x @ _orthogonal(self.width, self.seed).to(x.device)
        sizes = _sizes(self.width)
        blocks = (x * _signs(self.width, self.seed).to(x.device)).reshape(-1, *sizes)
        for axis, size in enumerate(sizes, start=1):
            blocks = (blocks.movedim(axis, -1) @ hadamard(size).to(x.device)).movedim(-1, axis)
        return blocks.reshape(x.shape) / math.sqrt(self.block)


@functools.cache
def hadamard(size: int) -> Tensor:
    """A Hadamard matrix (entries +-1, H H^T = size I), float64: Sylvester's for a power of two, else one of Paley's.

    Raises UsageError for a size neither gives.
    """
    if size & (size - 1) == 0:
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return h
    if _prime_power(size - 1) and size % 4 == 0:
        return _paley_one(size - 1)
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _prime_power(size // 2 - 1):
        return _paley_two(size // 2 - 1)
    raise UsageError(f"no Hadamard matrix of size {size} by Sylvester's or Paley's construction")


@functools.cache
def _sizes(width: int) -> tuple[int, ...]:
    """Sizes of Hadamard matrices whose Kronecker product is the largest one that divides the width."""
    power = width & -width
    odd = width // power
    paley = 1
    if odd > 1:
        choices = (odd * 2**m for m in range(2, power.bit_length()))
        paley = next((k for k in choices if k <= _LARGEST_PALEY and (_prime_power(k - 1) or (k // 2 - 1) % 4 == 1 and _prime_power(k // 2 - 1))), 1)
    rest = power if paley == 1 else width // paley
    factors = []
    while rest > _DENSE:
        factors.append(_DENSE)
        rest //= _DENSE
    return (*factors, *([rest] if rest > 1 else []), *([paley] if paley > 1 else [])) or (1,)


@functools.lru_cache(maxsize=8)
def _signs(width: int, seed: int) -> Tensor:
    return torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


@functools.lru_cache(maxsize=2)  # one of 4096 channels holds 128 MiB
def _orthogonal(width: int, seed: int) -> Tensor:
    """Uniform (Haar) by QR with the signs of R's diagonal fixed (Mezzadri 2007)."""
    normal = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


# -- Paley (1933) ---------------------------------------------------------------------------------------------------


def _paley_one(q: int) -> Tensor:
    """I + S of size q + 1 for q = 3 (mod 4), S = [[0, 1], [-1, Q]] skew."""
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Of size 2 (q + 1) for q = 1 (mod 4): S = [[0, 1], [1, Q]] with 0 -> [[1, -1], [-1, -1]] and +-1 -> +-[[1, 1], [1, -1]]."""
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1, _jacobsthal(q)
    one = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(s, one) + torch.kron(torch.eye(q + 1, dtype=torch.float64), zero)


def _jacobsthal(q: int) -> Tensor:
    """Q[a, b] = 1 where a - b is a non-zero square of the field with q elements, -1 where it is none, 0 where a = b."""
    prime, power = _prime_power(q) or (q, 1)
    elements = list(product(range(prime), repeat=power))
    number = {e: i for i, e in enumerate(elements)}
    modulus = _irreducible(prime, power)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[number[_times(e, e, modulus, prime)] for e in elements]] = 1
    character[0] = 0
    digits = torch.tensor(elements)  # [q, power], most significant first
    differences = (digits[:, None] - digits[None]) % prime
    weights = prime ** torch.arange(power - 1, -1, -1)
    return character[(differences * weights).sum(-1)]


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """The product of two polynomials (highest power first) modulo a monic one, given without its leading 1."""
    n = len(a)
    long = [0] * (2 * n - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            long[i + j] += x * y
    for i in range(n - 1):
        for j, m in enumerate(modulus, start=1):
            long[i + j] -= long[i] * m
    return tuple(x % prime for x in long[n - 1 :])


def _irreducible(prime: int, power: int) -> tuple[int, ...]:
    """A monic polynomial of degree up to 3 without roots, which makes it irreducible; its coefficients below the leading one."""
    if power == 1:
        return (0,)

    def value(coefficients: tuple[int, ...], x: int) -> int:
        return functools.reduce(lambda total, c: (total * x + c) % prime, coefficients, 1)

    return next(c for c in product(range(prime), repeat=power) if all(value(c, x) for x in range(prime)))


@functools.cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime, k at most 3."""
    if q < 3 or q % 2 == 0:
        return None
    prime = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    power = round(math.log(q, prime))
    return (prime, power) if power <= 3 and prime**power == q else None
