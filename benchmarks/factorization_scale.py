"""Seconds and peak memory to factorise one large matrix with its Gram, each in a process of its own.

usage: python benchmarks/factorization_scale.py [--threads N] [--shape M N] [--ratio R]
Writes benchmarks/factorization_scale.json: "whitened + affine" factors of a random bfloat16 matrix under the Gram of inputs whose
spectrum falls as a power law, in float64, and the share of the error that is left (random weights have no low rank: no quality is meant).
`before` is what the process holds with the matrix and the Gram in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = ((4096, 11008), (11008, 4096))
RESULTS = Path(__file__).with_suffix(".json")


def measured(m: int, n: int, ratio: float, threads: int) -> dict[str, Any]:
    """Factorise W [m, n] in this process."""
    import torch

    from rewright.passes.factorization.low_rank_factors import Data, Factors
    from rewright.passes.factorization.whitening import Inputs, Outputs, spectrum

    torch.set_num_threads(threads)
    w = torch.randn(m, n, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    known = moments(n)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    inputs = Inputs(known.gram, known.mean)
    rank = int((1 - ratio) * m * n / (m + n)) // 64 * 64
    begin = time.perf_counter()
    values = spectrum(w.double(), inputs)
    for_curve = time.perf_counter() - begin
    begin = time.perf_counter()
    found = Factors(rank, Data(known, inputs, (Outputs(),)), (False,), True, False, 1e-4, 0.0, False)(w)
    seconds = time.perf_counter() - begin
    return {
        "shape": [m, n],
        "rank": rank,
        "threads": threads,
        "seconds": round(seconds, 1),
        "seconds of the error curve": round(for_curve, 1),
        "peak GiB": round(peak_gib(), 2),
        "before GiB": round(before, 2),
        "error left": round(float(values[rank:].sum() / values.sum()), 4),
        "factors": {k: [str(t.dtype), *t.shape] for k, t in found.items()},
    }


def moments(n: int, rows: int = 8192) -> Any:
    """Of `rows` samples of a value whose channels fall as i^-1/2, with a mean, neighbours alike; with fewer samples than channels it is singular."""
    import torch

    from rewright.passes.statistics import Moments
    from rewright.passes.statistics.accumulators import Gram

    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1, n + 1).pow(-0.5)
    gram, mean = Gram(n), torch.zeros(n, dtype=torch.float64)
    for i in range(rows // 1024):
        x = torch.randn(1024, n, generator=generator)
        x = x * scale + 0.1 * x.roll(1, 1)  # neighbours depend on each other
        x += 0.2
        mean += x.sum(0, dtype=torch.float64) / rows
        gram.add(i, x)
    return Moments(gram.result()["gram"], mean)


def peak_gib() -> float:
    """Of resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--shape", type=int, nargs=2)
    parser.add_argument("--here", action="store_true", help="in this process, printing one JSON object")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measured(*args.shape, args.ratio, args.threads)))
        return
    rows = []
    for m, n in [args.shape] if args.shape else SHAPES:
        command = [sys.executable, __file__, "--here", "--shape", str(m), str(n), "--threads", str(args.threads), "--ratio", str(args.ratio)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        print(
            f"{m} x {n} at rank {row['rank']}, {args.threads} threads: {row['seconds']} s (+ {row['seconds of the error curve']} s for its error curve), "
            f"peak {row['peak GiB']} GiB, {row['before GiB']} GiB of it before",
            flush=True,
        )
    if not args.shape:
        from rewright.tools.demo import conditions

        RESULTS.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
