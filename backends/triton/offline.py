"""What a GPU would get of a kernel, found out without one: what `launch` launches on the kernel's examples, compiled, and what the machine code needs."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ..table import Kernel
from . import _tiles

NAMES = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H200", "sm_100": "NVIDIA B200"}
"""Of the devices whose tiles are compiled for an architecture."""
ARCHITECTURES = tuple(NAMES)

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip

INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
"""Families of tensor core instructions by what their PTX looks like."""


@dataclass(frozen=True)
class Launch:
    """What one call of a jitted function would compile."""

    function: Any
    values: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the function."""
        return self.function.fn.__name__

    @property
    def key(self) -> str:
        """Equal for two launches of which one compilation serves both."""
        source = self.source()
        return repr((self.name, sorted(source.signature.items()), sorted(map(str, source.constants.items())), sorted(map(str, source.attrs)), self.options))

    def source(self) -> ASTSource:
        """With the types, the constants and the divisibility the JIT would see."""
        names = self.function.arg_names
        declared = {p.name for p in self.function.params if p.is_constexpr}
        constants = {n: v for n, v in self.values.items() if n in declared or v is None or isinstance(v, int) and v == 1}
        signature = {n: "constexpr" if n in constants else _type(v) for n, v in self.values.items()}
        aligned = [n for n, v in self.values.items() if n not in constants and (isinstance(v, Tensor) or isinstance(v, int) and v % 16 == 0)]
        return ASTSource(self.function, signature, constants, {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one launch needs."""

    name: str
    shared: int
    """Bytes of shared memory a block."""
    registers: int | None
    """32-bit, a thread; None without Triton's own cuobjdump."""
    spills: int | None
    """Bytes of stack a thread."""
    warps: int
    family: str
    """Of INSTRUCTIONS, or 'none': no tensor core."""


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def launches(kernel: Kernel, dtype: torch.dtype, arch: str) -> list[Launch]:
    """What the kernel's examples launch on a device of that architecture, each once; caught on the way there."""
    caught: dict[str, Launch] = {}

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(function.arg_names, args, strict=False))
        values |= {n: kwargs.pop(n) for n in list(kwargs) if n in function.arg_names}
        launch = Launch(function, values, kwargs)
        caught.setdefault(launch.key, launch)

    module = kernel.load()
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(_tiles, "device_name", return_value=NAMES[arch]):
        for args in module.examples(dtype, "meta"):
            module.launch(*args)
    return list(caught.values())


def largest(kernel: Kernel, dtype: torch.dtype, arch: str) -> list[Launch]:
    """Of every jitted function of `launches` the one with the largest tile."""

    def size(launch: Launch) -> int:
        return math.prod(v for n, v in launch.values.items() if n.isupper() and type(v) is int)

    found: dict[str, Launch] = {}
    for launch in launches(kernel, dtype, arch):
        if launch.name not in found or size(launch) > size(found[launch.name]):
            found[launch.name] = launch
    return list(found.values())


def compiled(launch: Launch, arch: str) -> Compiled:
    """The launch compiled for `sm_...`; takes no device."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        built = triton.compile(launch.source(), target=target, options=launch.options)
        used = dict(_usage(built.asm["cubin"], Path(cache)))
    counts = {family: len(re.findall(pattern, built.asm["ptx"])) for family, pattern in INSTRUCTIONS.items()}
    family = next((f for f, count in counts.items() if count), "none")
    return Compiled(launch.name, built.metadata.shared, used.get("REG"), used.get("STACK"), built.metadata.num_warps, family)


def _usage(cubin: bytes, folder: Path) -> Iterator[tuple[str, int]]:
    """('REG', 40), ('STACK', 0), ... as cuobjdump reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if tool.exists():
        (folder / "cubin").write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
        yield from ((key, int(value)) for key, _, value in (word.partition(":") for word in text.split()) if key in ("REG", "STACK"))
