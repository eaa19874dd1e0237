"""The only file that names tvm: which versions go together, the names kernels use, the LLVM target of this CPU.

`from .compat import T` imports tvm at that moment, after the versions were looked at; importing this file does not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Collection
from typing import Any

from ...ir.errors import UsageError
from ..target import cpu_features

TVM, FFI = "0.27.0.post1", "0.1.14"
"""ABI-paired: `apache-tvm` exactly, `apache-tvm-ffi` by its first three numbers."""

PAIR = f"pip install 'apache-tvm=={TVM}' 'apache-tvm-ffi=={FFI}.post1'"

NAMES = {
    "tvm": "tvm",
    "relax": "tvm.relax",
    "te": "tvm.te",
    "s_tir": "tvm.s_tir",
    "IRBuilder": "tvm.script.ir_builder:IRBuilder",
    "T": "tvm.script.ir_builder.tirx",
}
"""What `from .compat import ...` offers, and the module (and the name in it) behind it."""

CPUS = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}),
)
"""(mcpu, flags it needs), best first. LLVM's own guess at a virtual CPU is wrong both ways, and too much is SIGILL."""

UNITS = {"avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16"}
"""What our kernels ask for beyond: Linux's flag -> LLVM's."""


def why_not() -> str | None:
    """Why tvm can't be used here, or None. Reads package metadata only."""
    tvm, ffi = _version("apache-tvm"), _version("apache-tvm-ffi")
    if tvm is None:
        return "tvm is not installed: pip install 'rewright[tvm]'"
    if ffi is not None and _numbers(ffi) >= (0, 1, 15):
        return f"apache-tvm-ffi {ffi} crashes the process under apache-tvm {TVM}: {PAIR}"
    if tvm != TVM or ffi is None or _numbers(ffi) != _numbers(FFI):
        return f"apache-tvm {tvm} with apache-tvm-ffi {ffi} is not the pair we know: {PAIR}"
    return None


def needed(features: Collection[str]) -> set[str]:
    """Flags of those that a program compiled for them uses."""
    best: set[str] = next((flags for _, flags in CPUS if flags <= set(features)), set())
    return best | ({flag for flag in UNITS if flag in features} if best is CPUS[0][1] else set())


def llvm_target(features: Collection[str] | None = None) -> dict[str, Any]:
    """TVM's target for a CPU with these features (default: this machine's)."""
    if features is None:
        features = cpu_features() if platform.machine() in ("x86_64", "AMD64") else ()
    mcpu = next((mcpu for mcpu, needs in CPUS if needs <= set(features)), None)
    if mcpu is None:
        return {"kind": "llvm"}
    units = [f"+{name}" for flag, name in UNITS.items() if flag in features and mcpu == CPUS[0][0]]
    return {"kind": "llvm", "mcpu": mcpu, **({"mattr": units} if units else {})}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if reason := why_not():
        raise UsageError(reason)
    module, _, attribute = NAMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 1, 14) of '0.1.14.post1'."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
