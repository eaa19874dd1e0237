"""Measuring a machine: what is counted as what, the file it writes, the clock, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewright.backends.target import Target
from rewright.ir.capture import capture
from rewright.ir.errors import UsageError
from rewright.passes.pipeline import Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.tools import cli, facts
from rewright.tools import measure as module
from rewright.tools.measure import Size, measure
from rewright.tools.optimize import predicted_seconds

SMALL = Size(product=64, stream=1 << 16, tokens=64, channels=64)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[module.Measured, Target]:
    """A quick run and the file it writes. It leaves the number of threads as it was."""
    file, threads = tmp_path_factory.mktemp("targets") / "mine.toml", torch.get_num_threads()
    torch.set_num_threads(2)
    found = measure("cpu", file, size=SMALL, seconds=0.01)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    return found, Target.load(file)


def test_the_file_has_what_was_measured_and_its_base_has_the_rest(measured: tuple[module.Measured, Target]) -> None:
    found, target = measured
    assert set(found.numbers) == {"bandwidth", "launch"} | {f"peak.{d}" for d in ("fp32", "bf16", "fp16", "int8")} | {
        f"efficiency.{op}" for op in ("linear", "linear_int8_dynamic", "linear_int8_static", "layer_norm", "gelu", "softmax", "attention")
    }
    tables = {"peak": target.peak, "efficiency": target.efficiency, "": vars(target)}
    for key, value in found.numbers.items():
        table, _, name = key.rpartition(".")
        assert tables[table][name] == pytest.approx(value, rel=1e-3) and value > 0
        assert target.sources[key] == "measured"
    base = Target.load("cpu")
    assert (target.name, target.l2, target.features, found.base) == ("mine", base.l2, base.features, "cpu")
    assert target.efficiency["block_attention"] == base.efficiency["block_attention"]
    assert found.known["peak.int8"] == base.peak["int8"] and found.known["efficiency.gelu"] == 1


def test_a_target_of_measured_numbers_predicts_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every call takes a second but that of the tiny product, which is the cost of calling alone."""
    clock = iter([1.0, 0.25] + [1.0] * 11)
    monkeypatch.setattr(module, "_cpu_seconds", lambda call, seconds: next(clock))
    found = measure("cpu", tmp_path / "mine.toml", size=SMALL)
    assert found.numbers["bandwidth"] == 2 * (1 << 16) and found.numbers["launch"] == 0.25
    assert all(found.numbers[f"peak.{dtype}"] == 2 * 64**3 for dtype in ("fp32", "bf16", "fp16", "int8"))
    x = torch.randn(64, 64)
    for layer in (nn.Linear(64, 256), nn.LayerNorm(64)):
        assert predicted_seconds(capture(layer, (x,)), Target.load(tmp_path / "mine.toml")) == pytest.approx(1.0, rel=1e-3)
    assert predicted_seconds(capture(nn.GELU(), (torch.randn(64, 256),)), Target.load(tmp_path / "mine.toml")) == pytest.approx(1.0, rel=1e-3)
    int8 = Pipeline([QuantizeLinear()], verify=False).run(capture(nn.Linear(64, 256), (x,))).graph
    assert predicted_seconds(int8, Target.load(tmp_path / "mine.toml")) == pytest.approx(1.0, rel=1e-3)


def test_the_clock_is_processor_time_of_the_fastest_call() -> None:
    lengths = iter([9e-3] * 2 + [4e-3] + [2e-3] + [5e-3] * 1000)

    def busy() -> None:
        until = time.thread_time() + next(lengths)
        while time.thread_time() < until:
            pass

    assert module._cpu_seconds(busy, 0.01) == pytest.approx(2e-3, rel=0.1)
    assert module._cpu_seconds(lambda: time.sleep(1e-4), 0.01) < 1e-4  # waiting is no work
    short = iter(range(10**9))
    assert 0 < module._cpu_seconds(lambda: next(short), 0.0) < 5e-6
    assert next(short) > 1000  # short calls are repeated


@pytest.mark.parametrize(
    ("device", "capability", "target"),
    [
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090"),
        ("NVIDIA L40S", (8, 9), "cuda:sm_89"),
        ("NVIDIA A10", (8, 6), "cuda:sm_86"),
    ],
)
def test_a_cuda_device_is_known_by_its_name_or_its_architecture(device: str, capability: tuple[int, int], target: str) -> None:
    assert module.cuda_target(device, capability) == target


def test_integer_products_are_of_bytes() -> None:
    (y,) = module._integer_product(48)()
    assert y.shape == (48, 48) and y.dtype == torch.int32 and y.abs().max() > 255 and y.min() < 0 < y.max()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: measure("tpu"), "no device 'tpu' to measure; there are cpu and cuda"),
        (lambda: measure("cpu", "mine.json"), "mine.json is no .toml file"),
        pytest.param(lambda: measure("cuda"), "torch sees no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(run: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run()


def test_people_read_units_and_what_the_target_says(capsys: pytest.CaptureFixture[str], measured: tuple[module.Measured, Target]) -> None:
    found = dataclasses.replace(measured[0], numbers={"peak.int8": 4e11, "launch": 2.5e-6}, known={"peak.int8": 3e11, "launch": 3e-6})
    facts.measured(found, "mine.toml")
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["peak.int8", "400", "300", "GFLOP/s"] in said and ["launch", "2.5", "3", "us", "a", "call"] in said
    assert said[-1] == ["wrote", "mine.toml;", "--target", "mine.toml", "predicts", "with", "it"]


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_doctor_measures_and_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = module._cpu_seconds
    monkeypatch.setattr(module, "_cpu_seconds", lambda call, seconds: real(call, 0.001))
    monkeypatch.setitem(module.SIZES, "cpu", SMALL)
    monkeypatch.chdir(tmp_path)
    code, out, _ = doctor(capsys, "--measure", "--device", "cpu", "-o", "mine.toml", "--json")
    assert code == 0 and json.loads(out)["numbers"]["peak.fp32"] > 0 and json.loads(out)["output"] == "mine.toml"
    assert Target.load("mine.toml").sources["launch"] == "measured"
    code, _, err = doctor(capsys, "-o", "mine.toml")
    assert code == 2 and "add --measure" in err
