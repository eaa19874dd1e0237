"""`python -m rewright.tools.kernel_report`: every Triton kernel checked without a GPU, as benchmarks/kernels.json and a table beside it.

Minutes: all calls of backends/check.py in Triton's interpreter against the op's meaning in float64, and what the kernels' examples launch compiled for
three architectures. What this can't see: speed, races, and how bfloat16 rounds.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..backends.check import calls, fault
from ..backends.table import KERNELS, Kernel, absent
from ..backends.target import Target
from ..ir.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "kernels.json"
INTERPRETED_BF16 = 2e-2
"""Triton's interpreter truncates to bfloat16 where a GPU rounds."""


def triton_kernels() -> list[Kernel]:
    """Those of the table."""
    return [k for k in KERNELS if k.backend == "triton"]


def fingerprint(kernel: Kernel) -> str:
    """Of the code a row of the report speaks of: the op's meaning, its kernel and what that shares with others, comments and layout aside."""
    files = [ROOT / "backends" / "triton" / f"{kernel.op}.py"]
    for file in files:  # grows by what these files import of the shared ones
        names = re.findall(r"^from \.(_\w+) import", file.read_text(encoding="utf8"), re.MULTILINE)
        files += [path for name in names if (path := file.with_name(f"{name}.py")) not in files]
    files = [ROOT / "ir" / "ops" / f"{kernel.op}.py", *sorted(files)]
    return hashlib.sha256("\n".join(map(_bare, files)).encode()).hexdigest()[:16]


def _bare(file: Path) -> str:
    """Its statements without comments, docstrings and layout."""

    class Bare(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
            return None if isinstance(node.value, ast.Constant) else node

    return ast.dump(Bare().visit(ast.parse(file.read_text(encoding="utf8"))))


def checked(kernel: Kernel) -> tuple[dict[str, int], list[str]]:
    """How many calls of each dtype are right in the interpreter, and what is wrong with the others."""
    from ..backends.triton.interpreter import interpreted

    passed, faults = {}, []
    for dtype in kernel.dtypes:
        asked = list(calls(kernel, dtype, "cpu"))
        slack = INTERPRETED_BF16 if dtype == torch.bfloat16 else 0.0
        ran = interpreted([(kernel.op, args) for args in asked])
        found = [fault(kernel, dtype, args, outputs, after, slack) for args, (outputs, after) in zip(asked, ran, strict=True)]
        faults += [f for f in found if f]
        passed[str(dtype).removeprefix("torch.")] = found.count(None)
    return passed, faults


def needs(kernel: Kernel, arch: str) -> dict[str, Any] | None:
    """The most that a launch of the kernel's examples needs of that architecture; None where it can't run.

    In bfloat16 all launches, in float32 the largest of every jitted function; float16 is as bfloat16 but for the name of the type.
    """
    from ..backends.triton import offline

    target = Target.load(f"cuda:{arch}")
    if not set(kernel.needs) <= target.features:
        return None
    found = [*offline.launches(kernel, torch.bfloat16, arch), *offline.largest(kernel, torch.float32, arch)]
    built = [offline.compiled(launch, arch) for launch in {launch.key: launch for launch in found}.values()]
    return {
        "launches": len(built),
        "registers": max((b.registers or 0 for b in built), default=0),
        "spills": max((b.spills or 0 for b in built), default=0),
        "shared": max((b.shared for b in built), default=0),
        "shared_limit": target.shared,
        "instructions": sorted({b.family for b in built} - {"none"}),
    }


def row(kernel: Kernel) -> dict[str, Any]:
    """All that is known of one kernel without a GPU."""
    from ..backends.triton.offline import ARCHITECTURES

    code = fingerprint(kernel)  # before anything of it is loaded
    passed, faults = checked(kernel)
    architectures = {arch: needs(kernel, arch) for arch in ARCHITECTURES}
    return {"op": kernel.op, "code": code, "passed": passed, "faults": faults, "spills_allowed": kernel.spills, "architectures": architectures}


def table(report: dict[str, Any]) -> str:
    """For people."""
    architectures = list(report["kernels"][0]["architectures"])
    heads = ["kernel", "calls right", *(f"{arch}: registers, spills, shared, tensor cores" for arch in architectures)]
    rows = [heads]
    for kernel in report["kernels"]:
        right = " ".join(f"{count} {dtype}" for dtype, count in kernel["passed"].items()) + (f", {len(kernel['faults'])} WRONG" if kernel["faults"] else "")
        cells = []
        for found in kernel["architectures"].values():
            tensor = " ".join(found["instructions"]) or "-" if found else ""
            cells.append(f"{found['registers']:>3} {found['spills']:>3} B {found['shared'] / 1024:>5.1f} KiB  {tensor}" if found else "does not run there")
        rows.append([kernel["op"], right, *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in rows]
    return "\n".join(
        [f"Triton kernels without a GPU: triton {report['triton']}, torch {report['torch']}. The most a launch of a kernel's examples needs.", "", *lines, ""]
    )


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 if every call is right and everything fits, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("ops", nargs="*", help="only these; the rows of others are kept as they are")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    if reason := absent("triton"):
        print(reason, file=sys.stderr)
        return 2
    kernels = triton_kernels()
    if unknown := set(given.ops) - {k.op for k in kernels}:
        raise UsageError(f"no Triton kernel for {', '.join(sorted(unknown))}; there are {', '.join(k.op for k in kernels)}")
    found = {r["op"]: r for r in json.loads(given.out.read_text(encoding="utf8"))["kernels"]} if given.ops and given.out.exists() else {}
    report: dict[str, Any] = {"triton": importlib.metadata.version("triton"), "torch": torch.__version__, "kernels": []}
    for kernel in kernels:
        if not given.ops or kernel.op in given.ops:
            found[kernel.op] = row(kernel)
            print(kernel.op, found[kernel.op]["passed"], *wrong(found[kernel.op]), file=sys.stderr, flush=True)
            report["kernels"] = [found[k.op] for k in kernels if k.op in found]
            given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    given.out.with_suffix(".txt").write_text(table(report), encoding="utf8")
    print(table(report))
    return int(any(wrong(r) for r in report["kernels"]))


def wrong(found: dict[str, Any]) -> list[str]:
    """What of a row breaks the rules."""
    there = {arch: a for arch, a in found["architectures"].items() if a}
    return [
        *found["faults"],
        *(f"{found['op']} spills {a['spills']} bytes on {arch}" for arch, a in there.items() if a["spills"] > found["spills_allowed"]),
        *(f"{found['op']} asks {a['shared']} bytes of shared memory of {arch}" for arch, a in there.items() if a["shared"] > a["shared_limit"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
