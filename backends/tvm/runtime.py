"""Loads and runs a compiled program: needs TVM's runtime and numpy, nothing else. A copy of this file lies beside every program as run.py.

from run import load
program = load(".")
outputs = program({"input_ids": ids, "attention_mask": mask})        # numpy arrays, torch tensors or anything else with DLPack
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARY, MANIFEST = "program.so", "manifest.json"

FOLDER = "tvm"
"""Where it lies in the folder of a saved result."""


class Program:
    """A compiled program: a dict of inputs by name -> a list of outputs as TVM tensors (`.numpy()`, or DLPack)."""

    def __init__(self, folder: str | Path) -> None:
        import tvm
        from tvm.runtime.vm import VirtualMachine

        folder = Path(folder)
        self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        library = folder / LIBRARY
        if hashlib.sha256(library.read_bytes()).hexdigest() != self.manifest["sha256"]:
            raise ValueError(f"{library} was changed after it was compiled (its hash differs from the manifest)")
        if missing := sorted(set(self.manifest["cpu"]) - cpu_flags()):
            raise ValueError(f"{library} was compiled for a CPU with {', '.join(missing)}, which this one lacks; compile it again here")
        self._tvm = tvm
        self.inputs = [i["name"] for i in self.manifest["inputs"]]
        with silence():
            module: Any = tvm.runtime.load_module(str(library))
            device: Any = tvm.cpu()
            self._main = VirtualMachine(module, device)["main"]

    def __call__(self, inputs: dict[str, Any]) -> list[Any]:
        """Run once, on any of the sizes the manifest allows."""
        if wrong := [name for name in self.inputs if name not in inputs] or [name for name in inputs if name not in self.inputs]:
            raise ValueError(f"the program reads {', '.join(self.inputs)}: {', '.join(wrong)} is missing, or not one of them")
        return list(self._main(*(self._tensor(inputs[name]) for name in self.inputs)))

    def _tensor(self, value: Any) -> Any:
        import numpy

        return self._tvm.runtime.tensor(numpy.ascontiguousarray(value))


def load(folder: str | Path) -> Program:
    """A program from its folder. Raises ValueError, in one sentence, if it was altered or is not for this CPU."""
    return Program(folder)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """TVM 0.27 prints a warning for every weight it saves or loads; nothing of it is for a user."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cpu_flags() -> set[str]:
    """ISA features of this machine under Linux's names."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))
