"""A dense matrix as two block-diagonal ones with a shuffle between: nearest in weights or in outputs, exactly where one step can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_algebra import damped, roots


@dataclass(frozen=True)
class Blocks:
    """How a matrix [outputs, inputs] is cut, in the letters of ir/ops/block_shuffle_linear.py.

    ins: blocks of inputs, k.   outs: blocks of outputs, l; k q is a multiple of it.   q: middle values a block of inputs.
    One block of outputs is BlockDense: then w1 is its v, and w2[0] its u.
    """

    inputs: int
    outputs: int
    ins: int
    outs: int
    q: int

    @property
    def p(self) -> int:
        """Inputs of a block, padding included."""
        return -(-self.inputs // self.ins)

    @property
    def s(self) -> int:
        """Outputs of a block, padding included."""
        return -(-self.outputs // self.outs)

    @property
    def middle(self) -> int:
        """Middle values."""
        return self.ins * self.q

    @property
    def parameters(self) -> int:
        """Of both factors."""
        return self.middle * (self.p + self.s)

    def pairs(self) -> Iterator[tuple[int, int, Tensor]]:
        """(block a of outputs, block c of inputs, the rows u of w1[c] that only these two share: as many as the rank between them)."""
        for c in range(self.ins):
            u = torch.arange(self.q)
            for a in range(self.outs):
                yield a, c, u[(c * self.q + u) % self.outs == a]

    def places(self, c: int, u: Tensor) -> Tensor:
        """Where w2 has its columns for rows u of w1[c]."""
        return (c * self.q + u) // self.outs

    def cut(self, w: Tensor) -> Tensor:
        """[outputs, inputs] -> [l, s, k, p], zeros where it is padded: [a, :, c] are the outputs i l + a of the inputs of block c."""
        w = F.pad(w, (0, self.ins * self.p - self.inputs, 0, self.outs * self.s - self.outputs))
        return w.reshape(self.s, self.outs, self.ins, self.p).transpose(0, 1)

    def joined(self, cut: Tensor) -> Tensor:
        """[l, s, k, p] -> [outputs, inputs]"""
        return cut.transpose(0, 1).reshape(self.outs * self.s, self.ins * self.p)[: self.outputs, : self.inputs]

    def moments(self, gram: Tensor) -> Tensor:
        """[inputs, inputs] -> [k, p, k, p], zeros where it is padded."""
        more = self.ins * self.p - self.inputs
        return F.pad(gram.double(), (0, more, 0, more)).reshape(self.ins, self.p, self.ins, self.p)


def merged(blocks: Blocks, w1: Tensor, w2: Tensor) -> Tensor:
    """The matrix [outputs, inputs] that two factors make."""
    first = _spread(blocks, w1)
    return blocks.joined(torch.stack([w2[a] @ first[a] for a in range(blocks.outs)]).reshape(blocks.outs, blocks.s, blocks.ins, blocks.p))


def projected(blocks: Blocks, w: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factors w1 [k, q, p], w2 [l, s, r] (float64) nearest to w: each pair of blocks is an SVD of its own, cut at the pair's rank.

    gram: that of the inputs [inputs, inputs]; then each pair is nearest in the outputs its inputs alone would make. None: in its weights,
    and so is the whole. specs/structured_ffn.md 6.2.
    """
    cut = blocks.cut(w.double())
    w1 = torch.zeros(blocks.ins, blocks.q, blocks.p, dtype=torch.float64)
    w2 = torch.zeros(blocks.outs, blocks.s, blocks.middle // blocks.outs, dtype=torch.float64)
    own = None if gram is None else [roots(blocks.moments(gram)[c, :, c])[0] for c in range(blocks.ins)]
    for a, c, u in blocks.pairs():
        part = cut[a, :, c]
        left = _left(part if own is None else part @ own[c], len(u))
        w1[c, u[: left.shape[1]]] = left.T @ part  # a projection on the outputs: no inverse of the root
        w2[a][:, blocks.places(c, u[: left.shape[1]])] = left
    return w1, w2


def refitted_second(blocks: Blocks, w: Tensor, w1: Tensor, w2: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """w2 of least output error given w1. The ridge, relative to the mean square of the middle values, pulls it to the w2 given."""
    cut, moments = blocks.cut(w.double()).flatten(2), blocks.moments(gram).flatten(2).flatten(0, 1)
    found = w2.clone()
    for a, first in enumerate(_spread(blocks, w1)):
        read = first @ moments  # [r, n]
        error = cut[a] - w2[a] @ first
        found[a] += torch.linalg.solve(damped(read @ first.T, ridge), read @ error.T).T
    return found


def refitted_first(blocks: Blocks, w: Tensor, w1: Tensor, w2: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """w1 of less output error given w2: pair by pair, each of least error given all others. The ridge pulls it to the w1 given."""
    cut, moments = blocks.cut(w.double()), blocks.moments(gram)
    found = w1.clone()
    error = cut - torch.stack([w2[a] @ f for a, f in enumerate(_spread(blocks, w1))]).reshape(cut.shape)
    own = [damped(moments[c, :, c], ridge) for c in range(blocks.ins)]
    for a, c, u in blocks.pairs():
        left = w2[a][:, blocks.places(c, u)]
        seen = torch.einsum("skp,kpj->sj", error[a], moments[:, :, c])  # [s, p]
        change = torch.linalg.solve(own[c], torch.linalg.solve(damped(left.T @ left, ridge), left.T @ seen).T).T
        found[c, u] += change
        error[a, :, c] -= left @ change
    return found


def output_error(blocks: Blocks, w: Tensor, w1: Tensor, w2: Tensor, gram: Tensor) -> float:
    """E|(w - merged) x|^2"""
    error = w.double() - merged(blocks, w1, w2)
    return float((error @ gram * error).sum())


def _spread(blocks: Blocks, w1: Tensor) -> Tensor:
    """w1 as matrices [l, r, k p]: row rho of the a-th makes the middle value t = rho l + a."""
    rows = torch.zeros(blocks.ins, blocks.q, blocks.ins, blocks.p, dtype=w1.dtype)
    each = torch.arange(blocks.ins)
    rows[each, :, each] = w1
    return rows.reshape(-1, blocks.outs, blocks.ins * blocks.p).transpose(0, 1)


def _left(m: Tensor, rank: int) -> Tensor:
    """The left singular vectors of the `rank` largest singular values, the largest entry of each positive: equal inputs give equal files."""
    u = torch.linalg.svd(m, full_matrices=False).U[:, :rank]
    return u * torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u.dtype)
