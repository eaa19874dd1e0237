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
    needs: tuple[str, ...] = ()
    """Features (`Target.features`) a device must have."""
    spills: int = 0
    """Bytes a thread of a compiled GPU kernel may spill at most."""

    def why_not(self, device: str, dtype: torch.dtype, available: Collection[str] | None = None, features: Collection[str] | None = None) -> str | None:
        """Why this kernel can't run there, or None.

        available: backends to take as installed. features: those of the device (`Target.features`). None asks this machine, features only if `available` is.
        """
        if device not in self.devices:
            return f"{self.backend}'s {self.op} runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"{self.backend}'s {self.op} does not take {dtype}"
        known = present_features(device) if features is None and available is None else features
        if known is not None and (lacking := [f for f in self.needs if f not in known]):
            return f"{self.backend}'s {self.op} needs {' and '.join(lacking)}, which this {device} device lacks"
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


def present_features(device: str) -> frozenset[str]:
    """Of `Target.features` those of this machine's device that a kernel may need."""
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        return frozenset({"fp8"})
    return frozenset()


# op, backend, devices, dtypes, rtol -- first match wins, so the fastest comes first
KERNELS = (
    Kernel("add_layer_norm", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("add_layer_norm", "tvm", ("cpu",), (F32,), rtol=1e-5),
    Kernel("add_rms_norm", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=16),
    Kernel("block_dense_linear", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=32),
    Kernel("block_shuffle_linear", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=32),
    Kernel("linear_attention", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=320),
    Kernel("linear_fp8", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, needs=("fp8",)),
    Kernel("linear_int8_dynamic", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("linear_int8_static", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("linear_nbits", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("linear_token", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("rms_norm", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
    Kernel("shift_linear", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=64),
    Kernel("ternary_linear", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5, spills=16),
    Kernel("token_match", "triton", ("cuda",), (F16, BF16, F32), rtol=0, spills=32),
    Kernel("token_merge", "triton", ("cuda",), (F16, BF16, F32), rtol=1e-5),
)
