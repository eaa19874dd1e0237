"""Backends from the command line: what runs the result and why, what is written, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rewright.backends.table import absent
from rewright.tools import cli

MODELS = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x):
        return self.down(torch.relu(self.up(x))).topk(3).values

def small():
    return Small(), (torch.randn(4, 64),)
"""

needs_tvm = pytest.mark.skipif(absent("tvm") is not None, reason=str(absent("tvm")))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lowered.py").write_text(MODELS)
    (tmp_path / "my_compiled.py").write_text(MODELS.replace(".topk(3).values", ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_num_threads(1)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


QUANTIZE = ("-p", "quantize-linear:min_weights=100,activations=int8-token")


@needs_tvm
def test_a_compiled_result_is_written_beside_the_saved_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "optimize", "py:my_compiled:small", *QUANTIZE, "--backend", "tvm", "-o", "out", "--json")
    found = json.loads(out)["lowering"]
    assert code == 0 and found["backend"] == "tvm"
    assert {n["kernel"] for n in found["nodes"]} == {"tvm"}
    assert sorted(f.name for f in (tmp_path / "out" / "tvm").iterdir()) == ["manifest.json", "program.so", "run.py"]
    code, out, _ = run(capsys, "bench", "out", "out@tvm", "out@onnx", "--shapes", "8", "--rounds", "5", "--json")
    assert code == 0 and set(json.loads(out)["shapes"]["8"]) == {"out", "out@tvm", "out@onnx"}


@needs_tvm
def test_what_runs_in_torch_is_said_and_not_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "optimize", "py:my_lowered:small", *QUANTIZE, "--backend", "tvm")
    assert code == 0
    assert "TVM has no converter for aten.topk" in out and "calls in tvm, 1 calls in torch" in out
    code, _, err = run(capsys, "optimize", "py:my_lowered:small", *QUANTIZE, "--backend", "tvm", "-o", "out")
    assert code == 2 and "aten.topk run in torch" in err and not (tmp_path / "out").exists()
    code, _, err = run(capsys, "optimize", "py:my_lowered:small", *QUANTIZE, "--backend", "tvm", "-o", "out.onnx")
    assert code == 2 and "a program compiled by tvm is a folder: -o out" in err


def test_a_backend_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "optimize", "py:my_lowered:small", *QUANTIZE, "--backend", "xla")
    assert code == 2 and "no backend 'xla'; there are auto, torch, kernels, triton, tvm, onnx" in err
