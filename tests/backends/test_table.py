"""Every kernel of the table against its op's meaning in float64, on the op's own cases and on awkward layouts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewright.backends import table
from rewright.backends.table import BF16, F16, F32, KERNELS, Kernel, absent

# the interpreter is silently wrong in bf16: only a GPU vouches for it
RUNS = [(k, d) for k in KERNELS for d in k.dtypes if (k.backend, d) != ("triton", BF16)]
Run = tuple[tuple, tuple, tuple]
"""args, outputs, args after the call"""


def shifted(t: Tensor) -> Tensor:
    """The same values one element into a larger storage: vector loads that trust an alignment crash here."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def strided(t: Tensor) -> Tensor:
    """The same values, every second one of a larger storage."""
    return torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]


def calls(kernel: Kernel, dtype: torch.dtype) -> Iterator[tuple]:
    """The op's cases as they are, off alignment and strided; then the kernel's own, which reach all of its code."""
    torch.manual_seed(0)
    for case in importlib.import_module(f"rewright.ir.ops.{kernel.op}").cases(dtype, "cpu"):
        yield case
        for layout in (shifted, strided):
            yield pytree.tree_map_only(Tensor, layout, case)
    yield from getattr(kernel.load(), "examples", lambda *_: ())(dtype, "cpu")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Kernel, torch.dtype], list[Run]]:
    """All Triton runs, in one child."""
    asked = [(k, d, args) for k, d in RUNS if k.backend == "triton" for args in calls(k, d)]
    folder = tmp_path_factory.mktemp("interpret")
    torch.save([(k.op, args) for k, _, args in asked], folder / "in")
    child = [sys.executable, str(Path(__file__).with_name("interpret.py")), str(folder / "in"), str(folder / "out")]
    done = subprocess.run(child, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[tuple[Kernel, torch.dtype], list[Run]] = {}
    for (k, d, args), (outputs, after) in zip(asked, torch.load(folder / "out"), strict=True):
        found.setdefault((k, d), []).append((args, outputs, after))
    return found


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What torch.empty gives is full of NaN: an output the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ran(request: pytest.FixtureRequest, kernel: Kernel, dtype: torch.dtype) -> list[Run]:
    if reason := absent(kernel.backend):
        pytest.skip(reason)
    if kernel.backend == "triton":
        return request.getfixturevalue("interpreted")[kernel, dtype]
    request.getfixturevalue("poisoned")
    given = list(calls(kernel, dtype))
    before = pytree.tree_map_only(Tensor, Tensor.clone, given)  # the kernel gets the original: a clone is aligned and dense
    return [(b, kernel.load().launch(*g), g) for b, g in zip(before, given, strict=True)]


def error(value: Tensor, gold: Tensor) -> float:
    return ((value.double() - gold).abs().max() / gold.abs().max()).item()


@pytest.mark.parametrize(("kernel", "dtype"), RUNS, ids=[f"{k.op}-{k.backend}-{str(d).removeprefix('torch.')}" for k, d in RUNS])
def test_kernel_computes_the_meaning_of_its_op(kernel: Kernel, dtype: torch.dtype, ran: list[Run]) -> None:
    meaning = getattr(torch.ops.rewright, kernel.op)
    for args, outputs, after in ran:
        golds = pytree.tree_leaves(meaning(*pytree.tree_map_only(Tensor, Tensor.double, args)))
        owns = pytree.tree_leaves(meaning(*args))
        for i, (out, own, gold) in enumerate(zip(pytree.tree_leaves(outputs), owns, golds, strict=True)):
            where = f"output {i} of {kernel.op}({', '.join(str(list(a.shape)) if isinstance(a, Tensor) else str(a) for a in args)})"
            assert (out.dtype, out.shape) == (own.dtype, own.shape), where
            assert out.is_contiguous(), where
            # what the meaning itself loses in this dtype is not the kernel's fault
            assert error(out, gold) <= kernel.rtol + torch.finfo(dtype).eps + error(own, gold), where
        for given, left in zip(pytree.tree_leaves(args), pytree.tree_leaves(after), strict=True):
            assert not isinstance(given, Tensor) or torch.equal(given, left), "the kernel wrote into an operand"


@pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
def test_triton_norms_the_rounded_sum(interpreted: dict[tuple[Kernel, torch.dtype], list[Run]]) -> None:
    """As x + r in float16 does; a norm of the unrounded sum would be off by half a spacing at 60, 50 times the tolerance."""
    (kernel,) = (k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", "triton"))
    (args, (y, h), _) = next(run for run in interpreted[kernel, F16] if run[0][0].mean() > 20)
    own_y, own_h = torch.ops.rewright.add_layer_norm(*args)
    assert torch.equal(h, own_h)
    assert error(y, own_y.double()) <= torch.finfo(F16).eps


def test_kernel_says_why_not() -> None:
    triton, tvm = (next(k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", b)) for b in ("triton", "tvm"))
    assert triton.why_not("cpu", F32, ["triton"]) == "triton's add_layer_norm runs on cuda, not on cpu"
    assert tvm.why_not("cpu", F16, ["tvm"]) == "tvm's add_layer_norm does not take torch.float16"
    assert tvm.why_not("cpu", F32, []) == "tvm is not available"
    assert tvm.why_not("cpu", F32, ["tvm"]) is None


def test_kernel_says_that_its_compiler_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    absent.cache_clear()
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    try:
        assert "triton is not installed: pip install" in (KERNELS[0].why_not("cuda", F16) or "")
    finally:
        absent.cache_clear()


@pytest.mark.parametrize(
    ("tvm", "ffi", "said"),
    [
        ("0.27.0.post1", "0.1.14.post1", None),
        (None, None, "tvm is not installed"),
        ("0.27.0.post1", "0.1.15.post2", "apache-tvm-ffi 0.1.15.post2 crashes"),
        ("0.27.0.post1", "0.2.0", "apache-tvm-ffi 0.2.0 crashes"),
        ("0.26.0", "0.1.13.post3", "is not the pair we know: pip install 'apache-tvm==0.27.0.post1'"),
    ],
)
def test_tvm_versions_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, tvm: str | None, ffi: str | None, said: str | None) -> None:
    from rewright.backends.tvm import compat

    monkeypatch.setattr(compat, "_version", {"apache-tvm": tvm, "apache-tvm-ffi": ffi}.get)
    reason = compat.why_not()
    assert reason is None if said is None else said in str(reason)


def test_tvm_compiles_for_what_the_cpu_says_it_has() -> None:
    from rewright.backends.tvm.compat import CPUS, llvm_target

    (spr, most), (v4, avx512), (v3, avx2) = CPUS
    assert llvm_target(most | avx512 | avx2) == {"kind": "llvm", "mcpu": spr}
    assert llvm_target(avx512 | avx2 | {"avx512_vnni"}) == {"kind": "llvm", "mcpu": v4}
    assert llvm_target(avx2 | {"avx512f"}) == {"kind": "llvm", "mcpu": v3}
    assert llvm_target({"sse2"}) == {"kind": "llvm"}


def test_reading_the_table_imports_no_compiler() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); from rewright.backends import lower, kernel_ops; from rewright.backends.table import KERNELS; "
        "import torch; [k.why_not('cuda', torch.float32) or k.why_not('cpu', torch.float32) for k in KERNELS]; "
        "assert not {'tvm', 'tvm_ffi', 'triton'} & set(sys.modules), sorted({'tvm', 'tvm_ffi', 'triton'} & set(sys.modules))"
    )
    conftest = Path(__file__).parents[1] / "conftest.py"
    done = subprocess.run([sys.executable, "-c", code, str(conftest)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
