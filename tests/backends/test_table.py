"""Every kernel of the table against its op's meaning in float64, on the op's own cases and on awkward layouts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewright.backends import table
from rewright.backends.check import calls, error, fault
from rewright.backends.table import BF16, F16, F32, KERNELS, Kernel, absent

RUNS = [(k, d) for k in KERNELS for d in k.dtypes]
INTERPRETED_BF16 = 2e-2  # Triton's interpreter truncates where a GPU rounds: there this says that the code runs, and only a GPU vouches for its digits
SHARE = {F16: (0, 2), F32: (1, 2), BF16: (0, 7)}
"""Of Triton's calls in a dtype those from the first on, one in so many: half precision and float32 share them out, for they cost seconds."""
Run = tuple[tuple, tuple, tuple]
"""args, outputs, args after the call"""


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[Kernel, torch.dtype], list[Run]]:
    """Triton's runs, in one child; `rewright.tools.kernel_report` runs every call in every dtype."""
    from rewright.backends.triton.interpreter import interpreted

    asked = [(k, d, args) for k, d in RUNS if k.backend == "triton" for args in islice(calls(k, d, "cpu"), SHARE[d][0], None, SHARE[d][1])]
    found: dict[tuple[Kernel, torch.dtype], list[Run]] = {}
    for (k, d, args), (outputs, after) in zip(asked, interpreted([(k.op, args) for k, _, args in asked]), strict=True):
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
    given = list(calls(kernel, dtype, "cpu"))
    before = pytree.tree_map_only(Tensor, Tensor.clone, given)  # the kernel gets the original: a clone is aligned and dense
    return [(b, kernel.load().launch(*g), g) for b, g in zip(before, given, strict=True)]


@pytest.mark.parametrize(("kernel", "dtype"), RUNS, ids=[f"{k.op}-{k.backend}-{str(d).removeprefix('torch.')}" for k, d in RUNS])
def test_kernel_computes_the_meaning_of_its_op(kernel: Kernel, dtype: torch.dtype, ran: list[Run]) -> None:
    slack = INTERPRETED_BF16 if (kernel.backend, dtype) == ("triton", BF16) else 0.0
    for args, outputs, after in ran:
        assert fault(kernel, dtype, args, outputs, after, slack) is None


@pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
def test_triton_norms_the_rounded_sum(interpreted: dict[tuple[Kernel, torch.dtype], list[Run]]) -> None:
    """As x + r in float16 does; a norm of the unrounded sum would be off by half a spacing at 60, 50 times the tolerance."""
    (kernel,) = (k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", "triton"))
    (args, (y, h), _) = next(run for run in interpreted[kernel, F16] if run[0][0].mean() > 20)
    own_y, own_h = torch.ops.rewright.add_layer_norm(*args)
    assert torch.equal(h, own_h)
    assert error(y, own_y.double()) <= torch.finfo(F16).eps


@pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
def test_triton_rounds_before_the_weight(interpreted: dict[tuple[Kernel, torch.dtype], list[Run]]) -> None:
    """In Llama's order, as rms_norm does; the product rounded once instead differs in a quarter of the places."""
    (kernel,) = (k for k in KERNELS if (k.op, k.backend) == ("rms_norm", "triton"))
    for (x, w, eps), y, _ in interpreted[kernel, F16]:
        own = torch.ops.rewright.rms_norm(x, w, eps)
        assert (y != own).float().mean() < 0.02


def test_kernel_says_why_not() -> None:
    triton, tvm = (next(k for k in KERNELS if (k.op, k.backend) == ("add_layer_norm", b)) for b in ("triton", "tvm"))
    assert triton.why_not("cpu", F32, ["triton"]) == "triton's add_layer_norm runs on cuda, not on cpu"
    assert tvm.why_not("cpu", F16, ["tvm"]) == "tvm's add_layer_norm does not take torch.float16"
    assert tvm.why_not("cpu", F32, []) == "tvm is not available"
    assert tvm.why_not("cpu", F32, ["tvm"]) is None


def test_kernel_says_which_feature_a_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    (fp8,) = (k for k in KERNELS if k.op == "linear_fp8")
    said = "triton's linear_fp8 needs fp8, which this cuda device lacks"
    assert fp8.why_not("cuda", F16, ["triton"], {"cp.async"}) == said
    assert fp8.why_not("cuda", F16, ["triton"], {"fp8", "wgmma"}) is None
    monkeypatch.setattr(table.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "absent", lambda backend: None)
    for capability, reason in (((8, 0), said), ((8, 9), None), ((9, 0), None)):
        monkeypatch.setattr(table.torch.cuda, "get_device_capability", lambda found=capability: found)
        assert fp8.why_not("cuda", F16) == reason


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
    from rewright.backends.tvm.compat import CPUS, llvm_target, needed

    (v4, avx512), (v3, avx2) = CPUS
    assert llvm_target(avx512 | avx2 | {"amx_tile"}) == {"kind": "llvm", "mcpu": v4}
    assert llvm_target(avx512 | avx2 | {"avx512_vnni"}) == {"kind": "llvm", "mcpu": v4, "mattr": ["+avx512vnni"]}
    assert llvm_target(avx2 | {"avx512f", "avx512_vnni"}) == {"kind": "llvm", "mcpu": v3}
    assert llvm_target({"sse2"}) == {"kind": "llvm"}
    assert needed(avx512 | avx2 | {"avx512_vnni", "sse2"}) == avx512 | {"avx512_vnni"}
    assert needed(avx2 | {"avx512f", "avx512_vnni"}) == avx2


def test_reading_the_table_imports_no_compiler() -> None:
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); from rewright.backends import lower, kernel_ops; from rewright.backends.table import KERNELS; "
        "import torch; [k.why_not('cuda', torch.float32) or k.why_not('cpu', torch.float32) for k in KERNELS]; "
        "assert not {'tvm', 'tvm_ffi', 'triton'} & set(sys.modules), sorted({'tvm', 'tvm_ffi', 'triton'} & set(sys.modules))"
    )
    conftest = Path(__file__).parents[1] / "conftest.py"
    done = subprocess.run([sys.executable, "-c", code, str(conftest)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
