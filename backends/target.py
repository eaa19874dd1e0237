"""What a machine can do, as data: peak FLOP/s, bandwidth, limits; and the roofline over it. No device needed."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir.cost import CAUSAL, is_kind
from ..ir.errors import InputFileError, UsageError, near
from ..ir.ops import OPS

TARGETS = Path(__file__).with_name("targets")

SOURCES = ("vendor", "measured", "predicted")
"""Where a number comes from: a data sheet, a clock on that machine, or our own estimate."""

NUMBERS = ("bandwidth", "l2", "shared", "sms", "launch")

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    torch.uint8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
"""The key in `Target.peak` of a torch dtype; tf32 has no dtype and is asked for by name."""


@dataclass(frozen=True)
class Target:
    """A machine to run on. Every number has its source under the same name in `sources` ("peak.bf16", "launch")."""

    name: str
    kind: str
    """'cpu' or 'cuda': the torch device type."""
    arch: str
    """'sm_90' for a GPU, 'x86-64' for a CPU."""
    peak: Mapping[str, float] = field(hash=False)
    """dtype name -> dense FLOP/s (int8: op/s)."""
    bandwidth: float
    """Main memory, bytes/s."""
    l2: int
    """Bytes."""
    shared: int
    """Shared memory one block may ask for, bytes; 0 on a CPU."""
    sms: int
    """Streaming multiprocessors, or the cores the CPU's numbers stand for."""
    launch: float
    """Seconds one kernel launch or op call adds."""
    features: frozenset[str]
    sources: Mapping[str, str] = field(hash=False)
    efficiency: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Kind of op (ir.cost.NodeCost.kind) -> the share of the roofline it reaches, above 1 where less is done than counted; 1 for a kind without."""

    @classmethod
    def load(cls, name: str | Path) -> Target:
        """A target by name ('h200'), by GPU architecture ('cuda:sm_90') or from a TOML file like those in `targets/`.

        Raises UsageError for an unknown name, InputFileError for a file that is missing or incomplete.
        """
        if isinstance(name, Path) or name.endswith(".toml"):
            return _read(Path(name))
        for file in _files():
            if name == file.stem:
                return _read(file)
        for file in _files() if name.startswith("cuda:") else ():
            if (target := _read(file)).arch == name.removeprefix("cuda:"):
                return target
        known = (*known_targets(), *(f"cuda:{t.arch}" for t in map(_read, _files()) if t.kind == "cuda"))
        raise UsageError(f"no target {name!r}.{near(name, known)} Known: {', '.join(known)}, or a .toml file")

    def seconds(self, flops: float, bytes: float, launches: int, dtype: str | torch.dtype, kind: str = "") -> tuple[float, str]:
        """Roofline time of some work, a prediction: (seconds, bound), bound in 'compute', 'memory', 'launch'. kind: whose `efficiency` counts."""
        share = self.efficiency.get(kind, self.efficiency.get(kind.removesuffix(CAUSAL), 1.0))
        parts = {
            "compute": flops / self._peak(dtype) / share if flops else 0.0,
            "memory": bytes / self.bandwidth / share,
            "launch": launches * self.launch,
        }
        return max(parts["compute"], parts["memory"]) + parts["launch"], max(parts, key=parts.__getitem__)

    def _peak(self, dtype: str | torch.dtype) -> float:
        name = dtype if isinstance(dtype, str) else NAMES.get(dtype, str(dtype))
        if name not in self.peak:
            raise UsageError(f"target {self.name} has no peak for {name}; it has {', '.join(self.peak)}")
        return self.peak[name]


def known_targets() -> tuple[str, ...]:
    """Names of the targets that come with us."""
    return tuple(file.stem for file in _files())


@functools.cache
def cpu_features() -> frozenset[str]:
    """ISA features of this machine under Linux's names ('avx512_vnni', 'amx_tile'); empty where Linux doesn't say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    words = (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(words, ()))


def _files() -> list[Path]:
    return sorted(TARGETS.glob("*.toml"))


def _read(path: Path) -> Target:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path} is not TOML: {error}") from error
    if missing := [key for key in ("kind", "arch", "peak", *NUMBERS) if key not in data]:
        raise InputFileError(f"{path} lacks {', '.join(missing)}; {TARGETS / 'h200.toml'} shows a whole target")
    if data["kind"] not in ("cpu", "cuda"):
        raise InputFileError(f"{path}: kind is 'cpu' or 'cuda', not {data['kind']!r}")
    tagged = {**{key: data[key] for key in NUMBERS}, **{f"peak.{dtype}": entry for dtype, entry in data["peak"].items()}}
    if not isinstance(shares := data.get("efficiency", {}), dict):
        raise InputFileError(f"{path}: efficiency = {shares!r}; expected a table with an entry an op, as in {TARGETS / 'h200.toml'}")
    for kind in shares:
        if not is_kind(kind):
            raise InputFileError(f"{path}: efficiency.{kind} is no op that is counted.{near(kind, OPS)} All forms of attention are attention")
    tagged |= {f"efficiency.{kind}": entry for kind, entry in shares.items()}
    for key, entry in tagged.items():
        _check(path, key, entry)
    if wrong := [f"{kind} = {entry['value']}" for kind, entry in shares.items() if entry["value"] <= 0]:
        raise InputFileError(f"{path}: an efficiency divides a time and is above 0, not {', '.join(wrong)}")
    # a CPU file that lists no features means the machine we are on: asked, never guessed
    features = data.get("features", cpu_features() if data["kind"] == "cpu" else ())
    return Target(
        name=path.stem,
        kind=data["kind"],
        arch=data["arch"],
        peak={dtype: float(entry["value"]) for dtype, entry in data["peak"].items()},
        **{key: data[key]["value"] for key in NUMBERS},
        features=frozenset(features),
        sources={key: entry["source"] for key, entry in tagged.items()},
        efficiency={kind: float(entry["value"]) for kind, entry in shares.items()},
    )


def _check(path: Path, key: str, entry: Any) -> None:
    number = entry.get("value") if isinstance(entry, dict) else None
    if not isinstance(number, int | float) or entry.get("source") not in SOURCES:
        raise InputFileError(f"{path}: {key} = {entry!r}; expected {{ value = NUMBER, source = {' | '.join(map(repr, SOURCES))} }}")
