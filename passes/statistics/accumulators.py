"""Running sums over blocks of rows [rows, channels]: `add` takes in one batch's, in order, `result` ends in a few named tensors.

Within a block sums are in the rows' own precision, float32 as a rule (torch sums pairwise); across blocks in float64. Against
a float64 computation the relative error is about 1e-6 (of the mean magnitude, where terms cancel), whatever the number of blocks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

BINS = 2048
_BLOCK_ROWS = 1024  # of a Gram: adding d x d numbers costs as much as a few hundred rows' products
_MOST_ROWS = 4096  # summed in float32 before float64 takes over
_COLUMNS = 256  # of a block of a Gram's upper half


class Channels:
    """min, max, mean, mean |x|, E[x^2] of every channel, and the number of rows."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.low, self.high = torch.full((width,), torch.inf, dtype=torch.float64), torch.full((width,), -torch.inf, dtype=torch.float64)
        self.sums = torch.zeros(3, width, dtype=torch.float64)  # x, |x|, x^2

    def add(self, batch: int, rows: Tensor) -> None:
        if not len(rows):
            return
        self.count += len(rows)
        self.low = torch.minimum(self.low, rows.amin(0).cpu())
        self.high = torch.maximum(self.high, rows.amax(0).cpu())
        self.sums += torch.stack([rows.sum(0), rows.abs().sum(0), rows.square().sum(0)]).cpu()

    def result(self) -> dict[str, Tensor]:
        mean, mean_abs, mean_square = self.sums / max(self.count, 1)
        absmax = torch.maximum(self.low.abs(), self.high.abs())
        named = {"min": self.low, "max": self.high, "absmax": absmax, "mean": mean, "mean_abs": mean_abs, "mean_square": mean_square}
        return {**named, "count": torch.tensor(self.count)}


class Range:
    """min and max of every channel."""

    def __init__(self, width: int) -> None:
        self.low, self.high = torch.full((width,), torch.inf, dtype=torch.float64), torch.full((width,), -torch.inf, dtype=torch.float64)

    def add(self, batch: int, rows: Tensor) -> None:
        if len(rows):
            self.low = torch.minimum(self.low, rows.amin(0).cpu())
            self.high = torch.maximum(self.high, rows.amax(0).cpu())

    def result(self) -> dict[str, Tensor]:
        return {"min": self.low, "max": self.high}


class Gram:
    """E[x x^T], symmetric, float64: products in float32 (never TF32 or bf16), at most 4096 rows at a time."""

    def __init__(self, width: int) -> None:
        self.count, self.sum = 0, torch.zeros(width, width, dtype=torch.float64)
        self.waiting: list[Tensor] = []

    def add(self, batch: int, rows: Tensor) -> None:
        self.count += len(rows)
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= _BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self.waiting:
            return
        rows = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting)
        self.waiting = []
        width = len(self.sum)
        with _full_precision():
            for block in rows.split(_MOST_ROWS):
                for i in range(0, width, _COLUMNS):  # the upper half is enough
                    self.sum[i : i + _COLUMNS, i:] += (block[:, i : i + _COLUMNS].T @ block[:, i:]).cpu()

    def result(self) -> dict[str, Tensor]:
        self._flush()
        width = len(self.sum)
        self.sum /= max(self.count, 1)
        for i in range(0, width, _COLUMNS):
            end = min(i + _COLUMNS, width)
            self.sum[end:, i:end] = self.sum[i:end, end:].T
            square = self.sum[i:end, i:end]
            square.copy_((square + square.T) / 2)
        return {"gram": self.sum, "count": torch.tensor(self.count)}


class CrossGram:
    """E[a b^T] of paired rows a [rows, n] and b [rows, m], float64."""

    def __init__(self, n: int, m: int) -> None:
        self.count, self.sum = 0, torch.zeros(n, m, dtype=torch.float64)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in the rows of one batch, in the same order."""
        self.count += len(a)
        with _full_precision():
            for x, y in zip(a.split(_MOST_ROWS), b.split(_MOST_ROWS)):
                self.sum += (x.T @ y).cpu()

    def result(self) -> Tensor:
        """The mean."""
        return self.sum / max(self.count, 1)


class Histogram:
    """Counts in 2048 equal bins over [-2^k, 2^k], k the smallest that holds every value.

    When a larger value comes the range doubles and pairs of bins become one: powers of two share their edges, so the
    counts are exactly those of the final range, in one pass and whatever the order of the batches.
    """

    def __init__(self, width: int) -> None:
        self.limit, self.counts = 0.0, torch.zeros(BINS, dtype=torch.long)

    def add(self, batch: int, rows: Tensor) -> None:
        if not rows.numel():
            return
        absmax = rows.abs().amax().item()
        if not math.isfinite(absmax + self.limit):
            self.limit = math.nan  # said by whoever reads the result
            return
        self._widen(absmax)
        bins = (rows * (BINS // 2 / self.limit)).floor_().to(torch.int32).add_(BINS // 2).clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=BINS).cpu()

    def _widen(self, absmax: float) -> None:
        if not self.limit:
            self.limit = 2.0**-100  # small enough for anything, large enough to divide by
        while self.limit < absmax:
            merged = torch.zeros_like(self.counts)
            merged[BINS // 4 : 3 * BINS // 4] = self.counts.view(-1, 2).sum(1)
            self.counts, self.limit = merged, self.limit * 2

    def result(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "limit": torch.tensor(self.limit, dtype=torch.float64)}


class TokenAbsmax:
    """The distribution of max |x| over each row, in 128 steps an octave: quantiles hold to 1/256."""

    def __init__(self, width: int) -> None:
        self.counts = torch.zeros(1 << 15, dtype=torch.long)

    def add(self, batch: int, rows: Tensor) -> None:
        if len(rows):
            absmax = torch.maximum(rows.amax(1), -rows.amin(1)).abs().float()  # abs: no -0.0
            self.counts += torch.bincount(absmax.view(torch.int32).bitwise_right_shift(16), minlength=1 << 15).cpu()  # exponent and 7 bits

    def result(self) -> dict[str, Tensor]:
        used = self.counts.nonzero().squeeze(1)
        middle = used.to(torch.int32) * 65536 + 32768 * (used > 0).to(torch.int32)
        return {"values": middle.view(torch.float32).double(), "counts": self.counts[used]}


class Reservoir:
    """At most `size` rows, each equally likely: those with the smallest of random numbers drawn from (seed, batch).

    Values with as many rows in every batch keep the same ones, whichever graph they are of.
    """

    def __init__(self, width: int, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.rows: Tensor | None = None
        self.numbers = torch.empty(0, dtype=torch.float64)
        self.index = torch.empty(0, 2, dtype=torch.long)  # batch, row within it
        self.width = width

    def add(self, batch: int, rows: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch)
        numbers = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        bar = self.numbers.max() if len(self.numbers) >= self.size else torch.inf
        chosen = (numbers < bar).nonzero().squeeze(1)
        if not len(chosen):
            return
        kept = rows.index_select(0, chosen.to(rows.device)).cpu()
        index = torch.stack([torch.full_like(chosen, batch), chosen], 1)
        self.rows = kept if self.rows is None else torch.cat([self.rows, kept])
        self.numbers, self.index = torch.cat([self.numbers, numbers[chosen]]), torch.cat([self.index, index])
        if len(self.numbers) > self.size:
            best = self.numbers.topk(self.size, largest=False, sorted=False).indices.sort().values  # in order of arrival
            self.rows, self.numbers, self.index = self.rows[best], self.numbers[best], self.index[best]

    def result(self) -> dict[str, Tensor]:
        return {"rows": self.rows if self.rows is not None else torch.empty(0, self.width), "index": self.index}


class Influence:
    """1 - E[cos(block input, block output)] over rows."""

    def __init__(self) -> None:
        self.count, self.sum = 0, 0.0

    def add(self, block_input: Tensor, block_output: Tensor) -> None:
        """Take in the rows of one batch, in the same order."""
        self.count += len(block_output)
        self.sum += torch.nn.functional.cosine_similarity(block_input, block_output, dim=1).sum(dtype=torch.float64).item()

    def result(self) -> dict[str, Tensor]:
        """The influence and the number of rows."""
        return {"influence": torch.tensor(1 - self.sum / max(self.count, 1), dtype=torch.float64), "count": torch.tensor(self.count)}


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products as they are named."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
