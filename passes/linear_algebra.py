"""The few decompositions that factorizations need, in float64, deterministic, for singular matrices too."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_DOUBLE = 4096
"""Rows of the largest matrix that is decomposed in float64; beyond, float32 halves time and memory (specs/structured_ffn.md 1.5)."""


def descending_eigh(m: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], largest first, none below 0, and eigenvectors [n, n] as columns of a symmetric positive semidefinite matrix.

    The largest entry of every vector is positive, so that equal inputs give equal files.
    """
    values, vectors = torch.linalg.eigh(_symmetric(m))
    return values.double().flip(0).clamp(min=0), signed(vectors.double().flip(1))


def descending_eigenvalues(m: Tensor) -> Tensor:
    """[n], those of `descending_eigh` in a third of its time."""
    return torch.linalg.eigvalsh(_symmetric(m)).double().flip(0).clamp(min=0)


def signed(vectors: Tensor) -> Tensor:
    """Columns turned so that the largest entry of each is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _symmetric(m: Tensor) -> Tensor:
    m = m.double() if len(m) <= MOST_DOUBLE else m.float()
    return (m + m.T).mul_(0.5)


def roots(gram: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The symmetric root of a Gram and its inverse, [n, n]; eigenvalues below `floor` times the largest count as that much."""
    values, vectors = descending_eigh(gram)
    root = values.clamp(min=floor * values[0].clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def strength(gram: Tensor, ridge: float) -> float:
    """What `damped` adds to the diagonal: ridge times its mean, or times 1 where all are 0."""
    mean = float(gram.double().diagonal().mean())
    return ridge * (mean if mean > 0 else 1.0)


def damped(gram: Tensor, ridge: float) -> Tensor:
    """gram + ridge * mean(diagonal) * I, float64: safe to invert."""
    return gram.double() + strength(gram, ridge) * torch.eye(len(gram), dtype=torch.float64)


def shrunk(gram: Tensor, share: float) -> Tensor:
    """The off-diagonal times 1 - share, against overfitting few tokens. Of a covariance, not of a Gram whose mean is taken off later."""
    if not share:
        return gram
    found = (1 - share) * gram
    found.diagonal().copy_(gram.diagonal())
    return found
