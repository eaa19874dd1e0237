"""Fair timing: all candidates in one process, alternating, after a warm-up; medians with their spread, ratios run by run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """One candidate. Ratios are to the reference candidate of the same round, so a slow moment of the machine hits both."""

    name: str
    median_ms: float
    low_ms: float
    """25th percentile of the rounds."""
    high_ms: float
    """75th percentile."""
    ratio: float
    """Median over rounds of time / reference time: below 1 is faster."""
    ratio_low: float
    ratio_high: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    reference: str,
    rounds: int = 15,
    warm_up: int = 2,
    budget_s: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate once a round, in turn, for `rounds` rounds or until `budget_s` seconds are spent (at least 5).

    Time of one call each by `clock`, wall time or (of one thread, beside other work) time.process_time; calls under a millisecond are
    repeated within the round until they take one.
    """
    repeats = {}
    for name, call in candidates.items():
        for _ in range(warm_up):
            call()
        begin = clock()
        call()
        repeats[name] = max(1, int(1e-3 / max(clock() - begin, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > budget_s:
            break
        for name, call in candidates.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name] * 1e3)
    return {name: _timing(name, own, times[reference]) for name, own in times.items()}


def _timing(name: str, own: list[float], reference: list[float]) -> Timing:
    low, _, high = statistics.quantiles(own, n=4)
    ratios = [a / b for a, b in zip(own, reference)]
    ratio_low, _, ratio_high = statistics.quantiles(ratios, n=4)
    return Timing(name, statistics.median(own), low, high, statistics.median(ratios), ratio_low, ratio_high)


def peak_activation_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during an eager torch call occupied at once: storages of op results, counted from when they
    are made until they are let go; weights and inputs, which were there before, are not. Scratch memory inside an op is not seen.
    """
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    live, peak, known = 0, 0, set()

    def let_go(key: int, nbytes: int) -> None:
        nonlocal live
        live -= nbytes
        known.discard(key)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal live, peak
            before = {s._cdata for s in _storages(args, kwargs)}
            result = function(*args, **(kwargs or {}))
            for storage in _storages(result, None):
                key = storage._cdata
                if key not in known and key not in before:
                    known.add(key)
                    live += storage.nbytes()
                    weakref.finalize(storage, let_go, key, storage.nbytes())
            peak = max(peak, live)
            return result

    def _storages(*values: Any) -> list[Any]:
        return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]

    with Watch():
        kept = call()
    del kept
    return peak
