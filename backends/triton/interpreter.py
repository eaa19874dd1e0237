"""Triton kernels run on a CPU, in a child process: whether its functions are interpreted or compiled Triton decides at import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def interpreted(asked: list[tuple[str, tuple]]) -> list[tuple[Any, tuple]]:
    """[(op, arguments)] -> [(outputs, arguments after the call)]. What torch.empty gives a kernel is full of NaN: what it forgets to write shows."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "in"), Path(folder, "out")
        torch.save(asked, given)
        child = subprocess.run([sys.executable, __file__, given, found], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"the interpreter failed: {child.stderr[-3000:]}")
        return torch.load(found)


def _child(given: str, found: str) -> None:
    """In the child: this file is no module of the package then, which is wherever this file is."""
    sys.path.pop(0)  # this folder, where `triton` would be ... this folder
    spec = importlib.util.spec_from_file_location("rewright", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewright"] = module
    spec.loader.exec_module(module)
    table = importlib.import_module("rewright.backends.table")
    torch.use_deterministic_algorithms(True)
    kernels = {kernel.op: kernel.load() for kernel in table.KERNELS if kernel.backend == "triton"}
    torch.save([(kernels[op].launch(*args), args) for op, args in torch.load(given)], found)


if __name__ == "__main__":
    _child(*sys.argv[1:])
