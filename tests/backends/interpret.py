"""A child process with TRITON_INTERPRET=1: `interpret.py IN OUT` runs Triton kernels on the CPU.

IN holds [(op, args)], OUT gets [(outputs, args after the call)]. Its own process, because Triton decides at import
whether its functions are interpreted or compiled, and test_triton_offline.py needs them compiled.
"""

import runpy
import sys
from pathlib import Path

import torch

runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))

from rewright.backends.table import KERNELS  # noqa: E402

torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
kernels = {kernel.op: kernel.load() for kernel in KERNELS if kernel.backend == "triton"}
torch.save([(kernels[op].launch(*args), args) for op, args in torch.load(sys.argv[1])], sys.argv[2])
