"""The best low-rank approximations of a matrix, by what its errors cost: in its own entries, in what it makes of its inputs, in the loss.

The cost of W' in place of W [m, n] is tr(K (W - W') G (W - W')^T). G says which inputs come (`Inputs`), K which outputs matter
(`Outputs`); I for both is the plain SVD. With W first weighted by K's root the best W' of rank k is U U^T W, where U [m, k] are
the leading left singular vectors of W S, S S^T = G: no inverse, so G may be singular. specs/structured_ffn.md 2.1, 3.1, 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linear_algebra import damped, descending_eigenvalues, descending_eigh, roots, signed

DAMPING = 0.1  # of a Gram of gradients, whose rank is low when samples are few
LEAST = 1e-6  # root of an output's weight, of the largest


@dataclass(frozen=True)
class Inputs:
    """G, never copied: at n = 11008 it takes a gigabyte.

    matrix: float64 [n, n], [n] for a diagonal one, None for I.   mean: [n], of which the outer product is taken off: the covariance.
    shrink: the off-diagonal counts 1 - shrink.   root: S [n, n], where it is known (`rooted`).
    """

    matrix: Tensor | None = None
    mean: Tensor | None = None
    shrink: float = 0.0
    root: Tensor | None = None

    def times(self, rows: Tensor) -> Tensor:
        """rows [p, n] -> rows G"""
        if self.matrix is None:
            return rows
        if self.matrix.dim() == 1:
            return rows * self.matrix
        found = rows @ self.matrix
        if self.mean is not None:
            found.addr_(rows @ self.mean, self.mean, alpha=-1)
        if self.shrink:
            diagonal = self.matrix.diagonal() - (0 if self.mean is None else self.mean.square())
            found.mul_(1 - self.shrink).addcmul_(rows, self.shrink * diagonal)
        return found

    def rooted(self) -> Inputs:
        """With S at hand, for several matrices that read the same inputs."""
        if self.matrix is None or self.matrix.dim() == 1:
            return self
        values, vectors = descending_eigh(self.times(torch.eye(len(self.matrix), dtype=torch.float64)))
        return replace(self, root=vectors.mul_(values.sqrt()))

    def times_root(self, rows: Tensor) -> Tensor:
        """rows [p, n] -> rows S"""
        if self.matrix is None:
            return rows
        if self.matrix.dim() == 1:
            return rows * self.matrix.sqrt()
        root = self.root if self.root is not None else self.rooted().root
        assert root is not None
        return rows @ root


@dataclass(frozen=True)
class Outputs:
    """The root of K and its inverse: [m, m], [m] for diagonal ones, None for I."""

    root: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of_channels(cls, weights: Tensor) -> Outputs:
        """K = diag(weights [m]): FWSVD's, where they are the rows' mean squared gradients."""
        root = weights.double().sqrt()
        root = root.clamp(min=LEAST * float(root.max()) or 1.0)
        return cls(root, 1 / root)

    @classmethod
    def of_gram(cls, gram: Tensor) -> Outputs:
        """K = gram [m, m] of the gradients (K-FAC), damped."""
        return cls(*roots(damped(gram, DAMPING)))

    def weigh(self, w: Tensor) -> Tensor:
        """w [m, n] -> K^(1/2) w"""
        return _product(self.root, w)

    def unweigh(self, a: Tensor) -> Tensor:
        """a [m, k] -> K^(-1/2) a"""
        return _product(self.inverse, a)


def spectrum(w: Tensor, inputs: Inputs) -> Tensor:
    """[min(m, n)], the squared singular values of w S, largest first: what each rank takes off the cost. w float64."""
    m, n = w.shape
    if m <= n:
        return descending_eigenvalues(inputs.times(w) @ w.T)
    wide = inputs.times_root(w)
    return descending_eigenvalues(wide.T @ wide)


def basis(w: Tensor, rank: int, inputs: Inputs) -> Tensor:
    """U [m, rank], orthonormal: the leading left singular vectors of w S, so that U[:, :k] is the basis of every smaller rank k. w float64."""
    m, n = w.shape
    if m <= n:  # principal components of the outputs
        return descending_eigh(inputs.times(w) @ w.T)[1][:, :rank].contiguous()
    wide = inputs.times_root(w)
    right = descending_eigh(wide.T @ wide)[1][:, :rank]
    return signed(torch.linalg.qr(wide @ right).Q)  # the columns are orthogonal but for rounding, and some may be zero


def refitted(w: Tensor, first: Tensor, second: Tensor, inputs: Inputs, ridge: float) -> Tensor:
    """The best `second` [m, k] for a `first` [k, n] under G, whatever K is; the ridge, relative to the mean diagonal, pulls it to the one given."""
    seen = inputs.times(first)  # [k, n]
    gram = damped(seen @ first.T, ridge)
    return second + torch.linalg.solve(gram, seen @ (w - second @ first).T).T


def balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with row i of `first` and column i of `second` of equal norm; of the plain SVD, its roots on both sides."""
    a, b = first.norm(dim=1), second.norm(dim=0)
    share = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
    return first * share[:, None], second / share


def errors(values: Tensor) -> Tensor:
    """[components + 1]: the cost left with 0, 1, ... ranks, relative to that with none. values: a `spectrum`."""
    left = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    if left[0] <= 0:
        return torch.cat([left.new_ones(1), left.new_zeros(len(values))])
    return left / left[0]


def _product(root: Tensor | None, w: Tensor) -> Tensor:
    if root is None:
        return w
    return root @ w if root.dim() == 2 else root[:, None] * w
