"""The GPU benchmark without a GPU: what it says then, what it imports, its sizes, and its arithmetic under a clock of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewright.backends.table import KERNELS, absent
from rewright.backends.target import Target
from rewright.tools import bench_gpu
from rewright.tools.bench_gpu import Case, Measured, all_cases, alternating, copies, judged, measured, target_of, timed

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

# what this package needs elsewhere and a GPU machine with torch and triton alone has not
BARE = """
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {%s}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ELSEWHERE = (
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "scipy",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
    "transformers",
    "tvm",
    "tvm_ffi",
)


@NO_GPU
def test_without_a_gpu_it_says_so_in_a_sentence_and_needs_no_other_package(tmp_path: Path) -> None:
    folder = tmp_path / "any-name"
    folder.symlink_to(ROOT)
    code = BARE % ", ".join(map(repr, ELSEWHERE))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, str(folder / "tools" / "bench_gpu.py")], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stderr[-2000:]
    reason = absent("triton") or "torch sees no CUDA device on this machine"
    assert done.stderr.splitlines()[-1] == f"Nothing was measured: {reason}."
    assert done.stdout == ""


class Clock:
    """A device on which a call takes what `costs` says."""

    def __init__(self, costs: dict[Any, float]) -> None:
        self.costs, self.asked = costs, []

    def captured(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        names = [call() for call in calls]
        if names[0] not in self.costs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: names

    def seconds(self, run: Callable[[], Any], times: int) -> float:
        names = run()
        self.asked.append((names[0], times))
        return times * sum(self.costs[n] for n in names)


def test_candidates_take_turns_and_a_time_is_that_of_one_call() -> None:
    clock = Clock({"a": 3e-6, "b": 5e-3})
    times, failed = alternating({"a": [lambda: "a"] * 4, "b": [lambda: "b"]}, clock, rounds=8)
    assert times["a"].median == pytest.approx(3e-6)
    assert times["b"].median == pytest.approx(5e-3)
    assert failed == {}
    # four calls take 12 us: 84 replays are a millisecond, and one replay of a long call is enough
    assert clock.asked[2:] == [("a", 84), ("b", 1)] * 8


def test_a_slow_moment_is_seen_in_the_quartiles_and_not_in_the_median() -> None:
    found = measured([1.0, 1.0, 1.0, 1.0, 9.0])
    assert found == Measured(1.0, 1.0, 5.0)


def test_what_cannot_be_captured_is_reported_and_the_others_are_timed() -> None:
    times, failed = alternating({"a": [lambda: "a"], "gone": [lambda: "gone"]}, Clock({"a": 1e-4}), rounds=3)
    assert list(times) == ["a"]
    assert failed == {"gone": "RuntimeError: operation not permitted when stream is capturing"}


def case(baselines: dict[str, Any]) -> Case:
    return Case("rms_norm", "here", lambda device: (torch.ones(1000, device=device),), baselines, flops=9.89e11, bytes=1e9, peak="bf16")


def test_the_ratio_is_to_the_fastest_baseline_and_the_share_to_the_roofline() -> None:
    times = {name: Measured(seconds, seconds, seconds) for name, seconds in (("rewright", 4e-3), ("slow", 9e-3), ("fast", 3e-3))}
    found = judged(case({}), times, {}, Target.load("h200"))
    assert (found.best, found.ratio) == ("fast", pytest.approx(0.75))
    assert (found.roofline, found.bound) == (pytest.approx(0.25), "compute")  # 9.89e11 FLOP at 989e12 FLOP/s are 1 ms
    alone = judged(case({}), {"rewright": times["rewright"]}, {}, None)
    assert (alone.best, alone.ratio, alone.roofline) == (None, None, None)


def test_arguments_are_copied_past_the_cache_and_every_candidate_walks_all_of_them() -> None:
    assert copies((torch.ones(1000), 3, None), l2=40_000) == 20  # 4,000 bytes each, twice the cache
    assert copies((torch.ones(1000),), l2=1) == 1
    seen: dict[str, set[int]] = {"ours": set(), "theirs": set()}

    def remembering(name: str) -> Callable[[Tensor], str]:
        return lambda x: (seen[name].add(x.data_ptr()), name)[1]

    def broken(x: Tensor) -> Callable[[], str]:
        raise ModuleNotFoundError("No module named 'torchao'")

    kernel: Any = SimpleNamespace(op="rms_norm", load=lambda: SimpleNamespace(launch=remembering("ours")))
    theirs = remembering("theirs")
    baselines = {"theirs": lambda x: lambda: theirs(x), "torchao": broken}
    found = timed(case(baselines), kernel, Clock({"ours": 1e-5, "theirs": 3e-5}), None, l2=10_000, where="cpu", rounds=3)
    assert seen["ours"] == seen["theirs"]
    assert len(seen["ours"]) == 5
    assert found.ratio == pytest.approx(3.0)
    assert found.failed == {"torchao": "ModuleNotFoundError: No module named 'torchao'"}


def test_a_device_is_known_by_its_name() -> None:
    known = {name: target_of(name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "NVIDIA A1000")}
    assert {name: target.name if target else None for name, target in known.items()} == {
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": None,
        "NVIDIA A1000": None,
    }


def test_every_kernel_is_timed_beside_a_baseline_and_the_sizes_fit_the_ops() -> None:
    cases = all_cases()
    assert {c.op for c in cases} == {k.op for k in KERNELS if k.backend == "triton"}
    for each in cases:
        args = each.make("meta")
        outputs = pytree.tree_leaves(getattr(torch.ops.rewright, each.op)(*args))
        assert each.baselines, each.op
        # no fewer bytes than the arguments that are read whole and the results
        moved = sum(t.nbytes for t in [*pytree.tree_leaves(args), *outputs] if isinstance(t, Tensor) and t.dtype != torch.int64)
        assert each.bytes == pytest.approx(moved, rel=0.2), (each.op, each.size)
        for name in ("cuBLAS bf16", "SDPA"):
            if name in each.baselines:
                assert each.baselines[name](*args)().shape == outputs[0].shape, (each.op, each.size)


def test_the_table_shows_what_failed() -> None:
    times = {"rewright": {"median": 2e-6, "low": 1e-6, "high": 3e-6}, "b": {"median": 3e-6, "low": 3e-6, "high": 3e-6}}
    good = {"op": "rms_norm", "size": "[1]", "times": times, "failed": {}, "best": "b", "ratio": 1.5, "roofline": 0.5, "bound": "memory"}
    bad = {"op": "linear_fp8", "size": "[2]", "times": {}, "failed": {"rewright": "OutOfResources: shared"}, "best": None, "ratio": None, "roofline": None}
    checks = [{"op": "rms_norm", "right": 7, "faults": []}, {"op": "linear_fp8", "right": 0, "faults": ["output 0 is off"]}]
    text = bench_gpu.table({"device": "X", "torch": "2", "triton": "3", "date": "d", "checks": checks, "times": [good, bad], "tiles": []})
    assert "1.50      50% memory" in text
    assert "OutOfResources: shared" in text
    assert "1 WRONG: output 0 is off" in text
