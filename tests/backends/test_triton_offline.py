"""Every Triton kernel compiled for real GPUs without one: shared memory, spills and registers against the data file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewright.backends.table import KERNELS, Kernel, absent
from rewright.backends.target import Target

if reason := absent("triton"):
    pytest.skip(reason, allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: Triton can't compile in this process", allow_module_level=True)

REGISTERS = 65536  # 32-bit, of an SM: one block must fit
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64"}


@dataclass
class Launch:
    """What one call of `launch` would have the JIT compile."""

    function: Any
    values: dict[str, Any]
    options: dict[str, int]

    def source(self) -> Any:
        """The source with the types and the divisibility the JIT would see."""
        from triton.compiler import ASTSource

        names = self.function.arg_names
        declared = {p.name for p in self.function.params if p.is_constexpr}
        constants = {n: v for n, v in self.values.items() if n in declared or isinstance(v, int) and v == 1}
        signature = {n: "constexpr" if n in constants else self._type(v) for n, v in self.values.items()}
        aligned = [n for n, v in self.values.items() if n not in constants and (isinstance(v, Tensor) or isinstance(v, int) and v % 16 == 0)]
        return ASTSource(self.function, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture
def launches(kernel: Kernel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What `launch` launches on the kernel's examples, caught on the way to the device."""
    from triton.runtime.jit import JITFunction

    caught = []

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(function.arg_names, args, strict=False))
        values |= {n: kwargs.pop(n) for n in list(kwargs) if n in function.arg_names}
        caught.append(Launch(function, values, kwargs))

    monkeypatch.setattr(JITFunction, "run", run)
    module = kernel.load()
    for args in module.examples(dtype, "meta"):
        module.launch(*args)
    assert caught
    return caught


def usage(cubin: bytes, folder: Path) -> Iterator[tuple[str, int]]:
    """('REG', 40), ('STACK', 0), ... as cuobjdump reads them from the machine code; nothing without Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        (folder / "cubin").write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
        yield from ((key, int(value)) for key, _, value in (word.partition(":") for word in text.split()) if key in ("REG", "STACK"))


RUNS = [(k, d) for k in KERNELS if k.backend == "triton" for d in k.dtypes]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("kernel", "dtype"), RUNS, ids=[f"{k.op}-{str(d).removeprefix('torch.')}" for k, d in RUNS])
def test_kernel_fits_the_gpu(kernel: Kernel, dtype: torch.dtype, arch: str, launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = Target.load(f"cuda:{arch}")
    for launch in launches:
        compiled = triton.compile(launch.source(), target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=launch.options)
        where = f"{compiled.metadata.name} {launch.values}"
        assert compiled.metadata.shared <= target.shared, where  # Triton itself does not check this offline
        used = dict(usage(compiled.asm["cubin"], tmp_path))
        assert used.get("STACK", 0) == 0, f"{where} spills"
        assert used.get("REG", 0) * 32 * launch.options["num_warps"] <= REGISTERS, where
