"""Which hidden channels of a feed-forward layer to keep, what each width costs, and the output weights that make up for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear_algebra import damped, strength

LARGEST = 16384
"""Hidden channels up to which a D x D inverse is taken."""
POOL = 4
"""How many times a batch are looked at to choose it."""


@dataclass(frozen=True)
class Selection:
    """order: int64 [D], channels from the first to go to the last.   errors: float64 [D + 1], the error of the layer's output with the
    last 0, 1, ... channels of `order` kept, relative to that with none: from 1 down to 0, never rising."""

    order: Tensor
    errors: Tensor

    def kept(self, width: int) -> Tensor:
        """int64 [width], in their original order."""
        return self.order[len(self.order) - width :].sort().values


def eliminate(w: Tensor, c: Tensor, ridge: float, batch: int = 64, order: Tensor | None = None, least: int = 0) -> Selection:
    """Remove channels, `batch` at a time, refitting w [m, D] to the rest after each: optimal brain surgeon on whole channels.

    c: [D, D], second moments of the hidden channels (centred where a bias takes the mean).   order: the channels in the order they are
    to go; None: those whose removal costs least go first, |w_j|^2 / P_jj, dead ones before all.
    least: where to stop; errors below are a straight line. lambda = ridge x mean diagonal of c.

    Each step is w -= w_J P_JJ^-1 P_J, P -= P_:J P_JJ^-1 P_J with P the inverse of c + lambda over what is left, so that w stays what
    `refitted` gives for the survivors. The errors are those of that w under c itself, known after each batch and in between
    interpolated. specs/structured_ffn.md 5.1.
    """
    w, c = w.double(), c.double()
    p, added_to_diagonal = _inverse(damped(c, ridge)), strength(c, ridge)
    left, v, squares = torch.arange(len(c)), w, w.square().sum(0)
    gone: list[Tensor] = []
    widths, errors, lost = [len(c)], [0.0], 0.0
    while len(left) > least:
        if order is not None:
            place = torch.full((len(c),), -1)
            place[left] = torch.arange(len(left))
            go = place[order[len(c) - len(left) :][: min(batch, len(left) - least)]]
        else:
            dead = (c.diagonal() == 0).nonzero().squeeze(1)[: len(left) - least] if not gone else ()
            go = dead if len(dead) else _cheapest(v, p, min(batch, len(left) - least))
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[go] = False
        stay = stays.nonzero().squeeze(1)
        rows, heads = p[go], v[:, go]
        solved = torch.linalg.solve(rows[:, go], torch.cat([rows[:, stay], heads.T], 1))
        update, cost = solved[:, : len(stay)], solved[:, len(stay) :]
        lost += float((heads.T * cost).sum())
        v = v[:, stay] - heads @ update
        p = p[stay][:, stay] - rows[:, stay].T @ update
        gone.append(left[go])
        left = left[stay]
        kept = w[:, left]
        # `lost` counts what the ridge adds: lambda times the squares of what went and of how far the rest was moved
        added = added_to_diagonal * float(squares.sum() - squares[left].sum() + (v - kept).square().sum())
        widths.append(len(left))
        errors.append(lost - added)
    rest = left if order is None else order[len(c) - len(left) :]
    energy = float(((w @ c) * w).sum())
    return Selection(torch.cat([*gone, rest]), _curve(widths, errors, energy, len(c)))


def _cheapest(v: Tensor, p: Tensor, batch: int) -> Tensor:
    """Places of the channels to go next: one by one, each with the others gone, among the POOL x batch that are cheapest now.

    Of two equal channels each is cheap as long as the other is there: all scores at once would let both go.
    """
    pool = (v.square().sum(0) / p.diagonal()).argsort(stable=True)[: POOL * batch]
    v, p = v[:, pool], p[pool][:, pool]
    taken: list[int] = []
    for _ in range(batch):
        costs = v.square().sum(0) / p.diagonal().clamp(min=torch.finfo(p.dtype).tiny)
        costs[taken] = torch.inf
        taken.append(i := int(costs.argmin()))
        row = p[i] / p[i, i]
        v, p = v - torch.outer(v[:, i], row), p - torch.outer(p[i], row)
    return pool[taken]


def _curve(widths: list[int], errors: list[float], energy: float, channels: int) -> Tensor:
    """float64 [channels + 1], from errors at falling widths."""
    relative = [min(max(e / energy, 0.0), 1.0) if energy > 0 else 0.0 for e in errors]
    known = torch.tensor(relative, dtype=torch.float64).cummax(0).values
    if widths[-1]:
        widths, known = [*widths, 0], torch.cat([known, known.new_ones(1)])
    found = torch.empty(channels + 1, dtype=torch.float64)
    for (a, b), (high, low) in zip(zip(widths[1:], widths), zip(known[1:], known)):
        found[a : b + 1] = torch.linspace(float(high), float(low), b - a + 1, dtype=torch.float64)
    found[0] = 1.0
    return found


def energy(w: Tensor, c: Tensor) -> Tensor:
    """[D]: c_jj |w_j|^2, how much of the output each channel makes alone."""
    return c.double().diagonal().clamp(min=0) * w.double().square().sum(0)


def leverage(c: Tensor, ridge: float) -> Tensor:
    """[D]: diag(c (c + lambda)^-1), how much each channel is unlike the others (MoDeGPT's score, arXiv 2408.09632)."""
    return 1 - strength(c.double(), ridge) * _inverse(damped(c, ridge)).diagonal()


def errors_without_refit(w: Tensor, gram: Tensor, order: Tensor) -> Tensor:
    """float64 [D + 1]: E|w_N h_N|^2 over the channels N gone, relative to all, as in `Selection.errors`."""
    w = w.double()[:, order]
    m = (w.T @ w) * gram.double()[order][:, order]
    lost = m.cumsum(0).cumsum(1).diagonal()
    widths = list(range(len(order), -1, -1))
    return _curve(widths, [0.0, *lost.tolist()], float(lost[-1]), len(order))


def refitted(w: Tensor, c: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """[m, kept], float64: the weights of the kept channels that come nearest to all of w [m, D] in the mean square.

    w_S + w_N c_NS (c_SS + lambda)^-1: the ridge shrinks the correction, not the kept weights.
    """
    w, c = w.double(), c.double()
    gone = torch.ones(len(c), dtype=torch.bool)
    gone[kept] = False
    lost = w[:, gone] @ c[gone][:, kept]
    inner = c[kept][:, kept]
    inner.diagonal().add_(strength(c, ridge))
    return w[:, kept] + torch.linalg.solve(inner, lost.T).T


def _inverse(c: Tensor) -> Tensor:
    """Of a damped second moment. Rounding may have left it indefinite: then by eigenvalues, none below 1e-12 of the largest."""
    factor, failed = torch.linalg.cholesky_ex(c)
    if not int(failed):
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    return (vectors / values.clamp(min=1e-12 * float(values[-1]))) @ vectors.T
