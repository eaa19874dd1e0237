"""benchmarks/kernels.json: the record is of this code, of every Triton kernel, and holds nothing that breaks the rules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rewright.backends.check import calls
from rewright.backends.table import KERNELS, Kernel, absent
from rewright.tools import kernel_report
from rewright.tools.kernel_report import OUT, fingerprint, main, table, triton_kernels, wrong


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(OUT.read_text(encoding="utf8"))


def test_the_record_is_of_the_code_as_it_is(report: dict[str, Any]) -> None:
    recorded = {row["op"]: row["code"] for row in report["kernels"]}
    stale = [k.op for k in triton_kernels() if recorded.get(k.op) != fingerprint(k)]
    assert stale == [], f"run `python -m rewright.tools.kernel_report {' '.join(stale)}`"
    assert len(recorded) == len(triton_kernels())


def test_all_calls_were_right_and_everything_fitted(report: dict[str, Any]) -> None:
    assert [fault for row in report["kernels"] for fault in wrong(row)] == []
    for row in report["kernels"]:
        assert all(count >= 10 for count in row["passed"].values()), row["op"]
        assert {arch for arch, found in row["architectures"].items() if found} >= {"sm_90", "sm_100"}


@pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
def test_the_record_counts_every_call(report: dict[str, Any]) -> None:
    recorded = {row["op"]: row["passed"] for row in report["kernels"]}
    for kernel in triton_kernels():
        if kernel.op not in ("token_merge", "linear_attention"):  # whose arguments are large
            dtype = kernel.dtypes[0]
            assert recorded[kernel.op][str(dtype).removeprefix("torch.")] == len(list(calls(kernel, dtype, "cpu"))), kernel.op


def test_the_table_beside_it_is_the_same(report: dict[str, Any]) -> None:
    assert OUT.with_suffix(".txt").read_text(encoding="utf8") == table(report)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"faults": ["output 0 is off"]}, "output 0 is off"),
        ({"architectures": {"sm_90": {"spills": 16, "shared": 0, "shared_limit": 100}}}, "rms_norm spills 16 bytes on sm_90"),
        ({"architectures": {"sm_80": {"spills": 8, "shared": 101, "shared_limit": 100}}}, "rms_norm asks 101 bytes of shared memory of sm_80"),
        ({"architectures": {"sm_80": None, "sm_90": {"spills": 8, "shared": 100, "shared_limit": 100}}}, None),
    ],
)
def test_what_breaks_the_rules_is_named(change: dict[str, Any], said: str | None) -> None:
    row = {"op": "rms_norm", "faults": [], "spills_allowed": 8, "architectures": {}} | change
    assert wrong(row) == ([said] if said else [])


def test_a_change_of_code_is_noticed_and_one_of_comments_is_not(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("f", "triton", ("cuda",), (torch.float32,), rtol=0)
    for folder in ("ir/ops", "backends/triton"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "f.py").write_text("from ._gemm import x\n")
    (tmp_path / "backends/triton/_gemm.py").write_text("from ._tiles import y\n")
    shared, other = tmp_path / "backends/triton/_tiles.py", tmp_path / "backends/triton/_rms.py"
    shared.write_text("y = 2\n")
    other.write_text("y = 2\n")
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    before = fingerprint(kernel)
    shared.write_text("y = 2  # why\n")
    other.write_text("y = 4\n")
    assert fingerprint(kernel) == before
    for path in (shared, tmp_path / "ir/ops/f.py", tmp_path / "backends/triton/f.py"):
        old = path.read_text()
        path.write_text("z = 3\n")
        assert fingerprint(kernel) != before
        path.write_text(old)


def test_rows_of_other_kernels_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_report, "absent", lambda backend: None)
    found = {"launches": 1, "registers": 40, "spills": 0, "shared": 2048, "shared_limit": 4096, "instructions": ["wgmma"]}

    def row(kernel: Kernel) -> dict[str, Any]:
        return {"op": kernel.op, "code": "x", "passed": {"float16": 3}, "faults": [], "spills_allowed": 0, "architectures": {"sm_90": found, "sm_80": None}}

    monkeypatch.setattr(kernel_report, "row", row)
    out = tmp_path / "k.json"
    assert main(["-o", str(out)]) == 0
    assert {r["op"] for r in json.loads(out.read_text())["kernels"]} == {k.op for k in KERNELS if k.backend == "triton"}
    monkeypatch.setattr(kernel_report, "row", lambda kernel: row(kernel) | {"faults": ["off"]})
    assert main(["rms_norm", "-o", str(out)]) == 1
    again = {r["op"]: r["faults"] for r in json.loads(out.read_text())["kernels"]}
    assert again.pop("rms_norm") == ["off"]
    assert set(map(tuple, again.values())) == {()}
    text = out.with_suffix(".txt").read_text()
    assert "3 float16, 1 WRONG" in text
    assert "40   0 B   2.0 KiB  wgmma" in text
    assert "does not run there" in text
