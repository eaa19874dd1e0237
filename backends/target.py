"""What a machine can do, as data: peak FLOP/s, bandwidth, limits; and the roofline over it. No device needed."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Set
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
KEYS = ("base", "kind", "arch", "features", *NUMBERS, "peak", "efficiency")

CPUS = (("cpu-amx", "amx_int8"), ("cpu-avx512-vnni", "avx512_vnni"), ("cpu-avx2", None))
"""Classes of CPUs, the fastest first, each with the feature (Linux's name) that tells it."""

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

DTYPES = (*dict.fromkeys(NAMES.values()), "tf32")


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
        """A target by name ('h200'), 'cpu' for this machine, by GPU architecture ('cuda:sm_90') or from a TOML file like those in `targets/`.

        'cpu' has the numbers of the class its ISA features are of (`cpu_class`); `rewright doctor --measure` writes a file with its own.
        Of several parts of one architecture the one with the least bandwidth stands for it: what is promised on it the others hold.
        A file with `base = NAME` says only what differs from that target.
        Raises UsageError for an unknown name, InputFileError for a file that is missing, incomplete or says what no target has.
        """
        if isinstance(name, Path) or name.endswith(".toml"):
            return _target(Path(name), _read(Path(name)))
        if name in known_targets():
            return _target(TARGETS / f"{name}.toml", _named(name))
        shipped = [cls.load(n) for n in known_targets()]
        if same := [t for t in shipped if t.kind == "cuda" and name == f"cuda:{t.arch}"]:
            return min(same, key=lambda t: t.bandwidth)
        known = (*known_targets(), *dict.fromkeys(f"cuda:{t.arch}" for t in shipped if t.kind == "cuda"))
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
    return tuple(sorted({"cpu", *(file.stem for file in TARGETS.glob("*.toml"))}))


@functools.cache
def cpu_features() -> frozenset[str]:
    """ISA features of this machine under Linux's names ('avx512_vnni', 'amx_tile'); empty where Linux doesn't say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    words = (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(words, ()))


def cpu_class(features: Set[str]) -> str:
    """The target whose numbers a CPU with these features is taken to have: by its fastest unit, the slowest class where nothing is known."""
    return next(name for name, unit in CPUS if unit in features or unit is None)


def _named(name: str) -> dict[str, Any]:
    """The table of a target that comes with us."""
    if name == "cpu":
        return {**_read(TARGETS / f"{cpu_class(cpu_features())}.toml"), "features": sorted(cpu_features())}
    return _read(TARGETS / f"{name}.toml")


def _read(path: Path) -> dict[str, Any]:
    """The table of a file, over that of its base."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"no file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path} is not TOML: {error}") from error
    if unknown := [key for key in data if key not in KEYS]:
        raise InputFileError(f"{path}: a target has no {unknown[0]!r}.{near(unknown[0], KEYS)} It has {', '.join(KEYS)}")
    for table, example in (("peak", "a dtype"), ("efficiency", "an op")):
        if not isinstance(data.setdefault(table, {}), dict):
            raise InputFileError(f"{path}: {table} = {data[table]!r}; expected a table with an entry {example}, as in {TARGETS / 'h200.toml'}")
    if (base := data.pop("base", None)) is None:
        return data
    if base not in known_targets():
        raise InputFileError(f"{path}: base = {base!r} is no target that comes with us.{near(str(base), known_targets())} Known: {', '.join(known_targets())}")
    below = _named(base)
    return {**below, **data, **{table: {**below[table], **data[table]} for table in ("peak", "efficiency")}}


def _target(path: Path, data: Mapping[str, Any]) -> Target:
    """Checked. Raises InputFileError."""
    if missing := [key for key in ("kind", "arch", *NUMBERS) if key not in data] + ([] if data["peak"] else ["peak"]):
        raise InputFileError(f"{path} lacks {', '.join(missing)}; {TARGETS / 'h200.toml'} shows a whole target, and base = NAME takes the rest from one")
    if data["kind"] not in ("cpu", "cuda"):
        raise InputFileError(f"{path}: kind is 'cpu' or 'cuda', not {data['kind']!r}")
    for dtype in data["peak"]:
        if dtype not in DTYPES:
            raise InputFileError(f"{path}: peak.{dtype} is of no dtype that is counted.{near(dtype, DTYPES)} There are {', '.join(DTYPES)}")
    for kind in data["efficiency"]:
        if not is_kind(kind):
            raise InputFileError(f"{path}: efficiency.{kind} is no op that is counted.{near(kind, OPS)} All forms of attention are attention")
    tagged = {**{key: data[key] for key in NUMBERS}, **{f"{t}.{key}": entry for t in ("peak", "efficiency") for key, entry in data[t].items()}}
    for key, entry in tagged.items():
        _check(path, key, entry)
    if wrong := [f"{kind} = {entry['value']}" for kind, entry in data["efficiency"].items() if entry["value"] <= 0]:
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
        efficiency={kind: float(entry["value"]) for kind, entry in data["efficiency"].items()},
    )


def _check(path: Path, key: str, entry: Any) -> None:
    number = entry.get("value") if isinstance(entry, dict) else None
    if not isinstance(number, int | float) or entry.get("source") not in SOURCES:
        raise InputFileError(f"{path}: {key} = {entry!r}; expected {{ value = NUMBER, source = {' | '.join(map(repr, SOURCES))} }}")
