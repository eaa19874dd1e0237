"""Triton kernels compiled for real GPUs without one: shared memory, spills, registers and the kind of instruction against the data files.

Here the largest launch of every jitted function in bfloat16 for one GPU; `make slow` all dtypes and GPUs; benchmarks/kernels.json holds all launches.
"""

from __future__ import annotations

import os

import pytest
import torch

from rewright.backends.table import BF16, KERNELS, Kernel, absent
from rewright.backends.target import Target

if reason := absent("triton"):
    pytest.skip(reason, allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: Triton can't compile in this process", allow_module_level=True)

from rewright.backends.triton import _tiles, offline
from rewright.backends.triton.offline import ARCHITECTURES, Compiled

REGISTERS = 65536  # 32-bit, of an SM: one block must fit

TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}
INT8 = ("linear_int8_dynamic", "linear_int8_static", "linear_token")
"""Triton has no int8 products of the fifth generation: on sm_100 these run on the instructions of older ones."""
NO_PRODUCTS = ("add_layer_norm", "add_rms_norm", "rms_norm", "token_merge")
EXACT = ("token_match",)
"""Its products are float32's own: on tensor cores they would be rounded to TF32, and equal tokens would not tie."""

TRITON = [k for k in KERNELS if k.backend == "triton"]


def check(kernel: Kernel, dtype: torch.dtype, arch: str) -> None:
    target = Target.load(f"cuda:{arch}")
    if not set(kernel.needs) <= target.features:
        pytest.skip(f"{arch} lacks {', '.join(kernel.needs)}")
    families = set()
    for launch in offline.largest(kernel, dtype, arch):
        built = offline.compiled(launch, arch)
        where = f"{built} {launch.values}"
        assert built.shared <= target.shared, where  # Triton itself does not check this offline
        assert (built.spills or 0) <= kernel.spills, where
        assert (built.registers or 0) * 32 * built.warps <= REGISTERS, where
        families.add(built.family)
    assert expected(kernel.op, arch) in families, families
    assert kernel.op not in EXACT or families == {"none"}, families


def expected(op: str, arch: str) -> str:
    if op in (*NO_PRODUCTS, *EXACT):
        return "none"
    return "mma.sync" if arch == "sm_100" and op in INT8 else TENSOR_CORES[arch]


@pytest.mark.parametrize("kernel", TRITON, ids=lambda k: k.op)
def test_kernel_fits_the_gpu(kernel: Kernel) -> None:
    check(kernel, BF16, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("kernel", "dtype"), [(k, d) for k in TRITON for d in k.dtypes], ids=lambda v: getattr(v, "op", str(v).removeprefix("torch.")))
def test_kernel_fits_every_gpu_in_every_dtype(kernel: Kernel, dtype: torch.dtype, arch: str) -> None:
    check(kernel, dtype, arch)


def test_an_aligned_product_is_pipelined_and_a_ragged_one_is_seen_for_what_it_is() -> None:
    """What the JIT knows of alignment must reach the offline compiler: without it copies are not asynchronous and registers are three times as many."""
    (kernel,) = (k for k in TRITON if k.op == "linear_token")
    by_width = {launch.values["k"]: launch for launch in offline.launches(kernel, BF16, "sm_90") if launch.name == "_scaled"}
    aligned, ragged = by_width[176], by_width[132]
    attributes = {aligned.function.arg_names[place] for (place,) in aligned.source().attrs}
    assert {"X", "W", "k"} <= attributes
    assert "k" not in {ragged.function.arg_names[place] for (place,) in ragged.source().attrs}


def test_a_spill_and_too_much_shared_memory_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewright.backends.triton import _packed

    (kernel,) = (k for k in TRITON if k.op == "linear_nbits")
    monkeypatch.setattr(_packed, "TILES", (_tiles.Tile(rows=_tiles.ANY, bm=128, bn=256, bk=64, warps=4, stages=3),))
    launch = max(offline.launches(kernel, BF16, "sm_90"), key=lambda launch: launch.values.get("BN", 0))
    built: Compiled = offline.compiled(launch, "sm_90")
    assert built.spills
    with pytest.raises(AssertionError):
        check(kernel, BF16, "sm_90")


def test_tiles_are_chosen_by_rows_and_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    few, own, rest = (_tiles.Tile(rows=r, bm=16, bn=16, bk=16, warps=4, stages=2, device=d) for r, d in ((8, ""), (64, "H200"), (_tiles.ANY, "")))
    monkeypatch.setattr(_tiles, "device_name", lambda device: "NVIDIA H200")
    assert [_tiles.choose((few, own, rest), rows, torch.empty(0)) for rows in (8, 9, 65)] == [few, own, rest]
    monkeypatch.setattr(_tiles, "device_name", lambda device: "NVIDIA A100")
    assert [_tiles.choose((few, own, rest), rows, torch.empty(0)) for rows in (8, 9, 65)] == [few, rest, rest]
