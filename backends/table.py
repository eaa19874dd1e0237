"""Every kernel we have, one line each. What can run is what this table says."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType

import torch

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Kernel:
    """One backend's kernel for one op of `ir.ops`: `backends/{backend}/{op}.py`, whose `launch` takes the op's arguments."""

    op: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    """Of the op's first tensor."""
    rtol: float
    """Largest error against the op's meaning in float64, over the largest value; the dtype's own rounding comes on top."""

    def why_not(self, device: str, dtype: torch.dtype, available: Collection[str] | None = None) -> str | None:
        """Why this kernel can't run there, or None. `available`: backends to take as installed; None asks this machine."""
        if device not in self.devices:
            return f"{self.backend}'s {self.op} runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"{self.backend}'s {self.op} does not take {dtype}"
        if available is None:
            return absent(self.backend)
        return None if self.backend in available else f"{self.backend} is not available"

    def load(self) -> ModuleType:
        """The kernel's module; imports its compiler on first use."""
        return importlib.import_module(f".{self.backend}.{self.op}", __package__)


@functools.cache
def absent(backend: str) -> str | None:
    """Why a backend's compiler can't be used on this machine, or None. Imports nothing heavy."""
    if backend == "tvm":
        from .tvm import compat

        return compat.why_not()
    return None if importlib.util.find_spec(backend) else f"{backend} is not installed: pip install 'rewright[{backend}]'"


# op, backend, devices, dtypes, rtol -- first match wins, so the fastest comes first
KERNELS = (
    Kernel("add_layer_norm", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("add_layer_norm", "tvm", ("cpu",), (F32,), rtol=1e-5),
)
