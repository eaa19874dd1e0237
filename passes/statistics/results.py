"""What was found: statistics by value, one at a time from memory or from files."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.weights import WeightStore, write_tensors
from .requests import KINDS


class Found(dict[str, Tensor]):
    """Named tensors; unlike a plain dict it can be referred to weakly."""


class Results:
    """Named tensors by key: in memory as long as a Statistics holds them, or each a safetensors file, written whole or not at all."""

    def __init__(self, folder: Path | None = None, on_disk: bool = False) -> None:
        """folder: where files go and stay; without one and with `on_disk`, a temporary folder that goes with this object."""
        if folder is None and on_disk:
            self._scratch = tempfile.TemporaryDirectory(prefix="rewright-statistics-")
            folder = Path(self._scratch.name)
        self.folder = folder
        self._held: weakref.WeakValueDictionary[str, Found] = weakref.WeakValueDictionary()
        self._fresh: list[Found] = []

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return key in self._held or self.folder is not None and self._file(key).exists()

    def __getitem__(self, key: str) -> Found:
        return self._held[key] if key in self._held else Found(WeightStore([self._file(key)]))

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key; with a folder they are on disk when this returns, and in memory no more."""
        if self.folder is None:
            found = self._held[key] = Found(tensors)
            self._fresh.append(found)
        else:
            write_tensors(self._file(key), {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())

    def hold(self, keys: Iterable[str]) -> list[Found]:
        """What is in memory under these keys; what was put and is not held by the caller goes."""
        found = [self._held[key] for key in keys if key in self._held]
        self._fresh.clear()
        return found


class Statistics(Mapping[str, "ValueStatistics"]):
    """Statistics by value: `statistics[node]` or by its name. Files are read when their tensors are asked for."""

    def __init__(self, results: Results, keys: Mapping[tuple[str, int], Mapping[str, str]]) -> None:
        """keys: (value, channel axis) -> family -> key in `results`."""
        self._results, self._keys = results, keys
        self._held = results.hold(key for families in keys.values() for key in families.values())

    def read(self, key: str) -> Found:
        """The tensors under one key."""
        return self._results[key]

    def __getitem__(self, value: str | fx.Node) -> ValueStatistics:
        return self.of(value)

    def of(self, value: str | fx.Node, axis: int = -1) -> ValueStatistics:
        """The statistics of a value along one channel axis. Raises KeyError, in words, for one that was not requested."""
        name = value if isinstance(value, str) else value.name
        if (name, axis) not in self._keys:
            raise KeyError(f"no statistics of {name} along axis {axis} were requested; there are those of {', '.join(n for n, _ in self._keys) or 'nothing'}")
        return ValueStatistics(name, self, self._keys[name, axis])

    def __contains__(self, value: object) -> bool:
        return (value.name if isinstance(value, fx.Node) else value, -1) in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for name, _ in self._keys))

    def __len__(self) -> int:
        return len({name for name, _ in self._keys})


@dataclass(frozen=True)
class ValueStatistics:
    """What is known of one value. Each attribute is read when asked for; UsageError says which was not requested."""

    name: str
    _statistics: Statistics = field(repr=False)  # what `_keys` say of it is a hash of all it depends on
    _keys: Mapping[str, str]

    def _get(self, kind: str, tensor: str | None = None) -> Tensor:
        return self._family(kind)[tensor or kind]

    def _family(self, kind: str) -> Found:
        if KINDS[kind] not in self._keys:
            raise UsageError(f"{kind} of {self.name} was not requested; there is {', '.join(self._keys)}")
        return self._statistics.read(self._keys[KINDS[kind]])

    @property
    def count(self) -> int:
        """Rows (tokens) that were counted."""
        return int(self._get("mean", "count"))

    @property
    def min(self) -> Tensor:
        """[channels], float64, as all that follow."""
        return self._get("min")

    @property
    def max(self) -> Tensor:
        """[channels]"""
        return self._get("max")

    @property
    def absmax(self) -> Tensor:
        """[channels]: max |x|"""
        return self._get("absmax")

    @property
    def present_min(self) -> Tensor:
        """[channels]: min over all tokens, padding too: what a range found at run time sees."""
        return self._get("present_min", "min")

    @property
    def present_max(self) -> Tensor:
        """[channels]: max over all tokens, padding too."""
        return self._get("present_max", "max")

    @property
    def mean(self) -> Tensor:
        """[channels]: E[x]"""
        return self._get("mean")

    @property
    def mean_abs(self) -> Tensor:
        """[channels]: E|x|"""
        return self._get("mean_abs")

    @property
    def mean_square(self) -> Tensor:
        """[channels]: E[x^2]"""
        return self._get("mean_square")

    @property
    def gram(self) -> Tensor:
        """[channels, channels]: E[x x^T]"""
        return self._get("gram")

    @property
    def rows(self) -> Tensor:
        """[at most 2048, channels]: sampled rows, in the order they came."""
        return self._get("rows")

    @property
    def row_index(self) -> Tensor:
        """[rows, 2]: batch of each sampled row, and its place among the rows of that batch that count."""
        return self._get("rows", "index")

    @property
    def histogram(self) -> HistogramResult:
        """The distribution of all elements."""
        found = self._family("histogram")
        return HistogramResult(found["counts"], float(found["limit"]))

    @property
    def token_absmax(self) -> Quantiles:
        """The distribution of max |x| over a row."""
        found = self._family("token_absmax")
        return Quantiles(found["values"], found["counts"])

    @property
    def influence(self) -> float:
        """1 - E[cos(block input, this value)]: how much a block changes the direction of what passes through it."""
        return float(self._get("influence"))

    @property
    def gradient_square(self) -> tuple[Tensor, Tensor]:
        """E[g^2] of the loss of one sample: ([rows], [columns]) means of a weight; ([0], [channels]) of an activation."""
        found = self._family("gradient")
        return found["rows"], found["columns"]

    @property
    def gradient_gram(self) -> Tensor:
        """[channels, channels]: E[g g^T] over tokens, g the gradient of the loss of one sample."""
        return self._get("gradient_gram", "gram")


@dataclass(frozen=True)
class Quantiles:
    """A distribution as sorted values and how often each came, true to 1/256."""

    values: Tensor
    counts: Tensor

    def quantile(self, q: float) -> float:
        """The smallest value that a share q of the rows does not exceed."""
        reached = self.counts.cumsum(0).double() >= q * self.counts.sum().double()
        return float(self.values[int(reached.to(torch.int8).argmax())])


@dataclass(frozen=True)
class HistogramResult:
    """Counts of equal bins over [-limit, limit]; limit is a power of two less than twice the largest |x|."""

    counts: Tensor
    limit: float

    @property
    def edges(self) -> Tensor:
        """[bins + 1], float64"""
        return torch.linspace(-self.limit, self.limit, len(self.counts) + 1, dtype=torch.float64)

    def _folded(self) -> Tensor:
        """Counts of |x| in bins over [0, limit]."""
        half = len(self.counts) // 2
        return (self.counts[half:] + self.counts[:half].flip(0)).double()

    def percentile(self, percent: float) -> float:
        """The |x| that `percent` of the elements stay below; off by less than a bin, 1/512 of the largest |x|."""
        folded = self._folded()
        total, wanted = folded.cumsum(0), percent / 100 * folded.sum()
        i = int((total >= wanted).to(torch.int8).argmax())
        inside = float((wanted - (total[i] - folded[i])) / folded[i].clamp(min=1))
        return (i + min(max(inside, 0.0), 1.0)) * self.limit / len(folded)

    def mse_limit(self, bits: int) -> float:
        """The clipping limit of a symmetric grid of 2^bits - 1 levels with the least mean squared error (rounding as step^2 / 12)."""
        folded = self._folded()
        half = len(folded)
        centers = (torch.arange(half, dtype=torch.float64) + 0.5) * self.limit / half
        top = int(folded.nonzero().max()) + 1 if folded.any() else half
        limits = torch.arange(1, top + 1, dtype=torch.float64) * self.limit / half
        total, first, second = (torch.cat([torch.zeros(1, dtype=torch.float64), (folded * centers**k).cumsum(0)]) for k in range(3))
        over = slice(1, top + 1)
        clipped = (second[-1] - second[over]) - 2 * limits * (first[-1] - first[over]) + limits**2 * (total[-1] - total[over])
        rounded = total[over] * (limits / (2 ** (bits - 1) - 1)) ** 2 / 12
        return float(limits[(clipped + rounded).argmin()])
