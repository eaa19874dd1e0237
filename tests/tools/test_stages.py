"""A recipe with fine-tuning on the command line: interrupted, gone on with, its checkpoints removed behind the result; a plan trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from rewright.tools import cli

MODEL = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def small():
    return Small(), (torch.randn(4, 64),)
"""
HALF = "ffn-width:ratio=0.5,selection=prefix,refit=none,round_to=1"
TRAIN = "finetune:steps=12,rate=0.003,judgings=3,precision=fp32"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "staged_models.py").write_text(MODEL)
    numpy.savez(tmp_path / "data.npz", x=numpy.random.default_rng(0).standard_normal((8, 16, 64), dtype=numpy.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_num_threads(1)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main([arguments[0], "py:staged_models:small", *arguments[1:]])
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_an_interrupted_optimize_goes_on_where_it_was_and_leaves_no_checkpoint_behind(capsys, tmp_path: Path, monkeypatch) -> None:
    command = ["optimize", "-p", HALF, "-p", TRAIN, "-p", "finetune:steps=4,judgings=1,precision=fp32", "--calibration", "data.npz", "-o", "out"]

    def interrupted(self: object, share: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rewright.tools.training._Run.take_step", interrupted)
        code, out, err = run(capsys, *command, "--json")
    assert code == 130 and not (tmp_path / "out").exists() and (tmp_path / "out.checkpoint-1").exists()
    assert "out.checkpoint-1 holds the fine-tuning up to its last judging, and the same command goes on from there" in json.loads(out)["error"]["message"]
    code, out, err = run(capsys, *command, "--json")
    found = json.loads(out)
    assert code == 0 and "going on from out.checkpoint-1" in err
    first, second = (p for p in found["passes"] if p["name"] == "finetune")
    assert first["details"]["resumed_at"] == 0 and second["details"]["resumed_at"] is None
    assert [row["step"] for row in first["details"]["curve"]] == [0, 4, 8, 12]
    assert first["details"]["curve"][-1]["drift"] < first["details"]["curve"][0]["drift"]
    assert (tmp_path / "out").is_dir() and not list(tmp_path.glob("out.checkpoint*"))


def test_the_checkpoints_stay_when_the_result_can_not_be_written(capsys, tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> str:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_write", full)
        code, _, err = run(capsys, "optimize", "-p", HALF, "-p", TRAIN, "--calibration", "data.npz", "-o", "out.onnx")
    assert code == 5 and "no space left" in err and (tmp_path / "out.onnx.checkpoint-1").exists()
    code, out, err = run(capsys, "optimize", "-p", HALF, "-p", TRAIN, "--calibration", "data.npz", "-o", "out.onnx")
    assert code == 0 and "going on from out.onnx.checkpoint-1" in err and not (tmp_path / "out.onnx.checkpoint-1").exists()
    assert "finetune: " in out and "% of the loss came back" in out


def test_a_plan_trains_nothing_and_says_so(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("rewright.tools.training.train", None)
    code, out, _ = run(capsys, "plan", "-p", HALF, "-p", TRAIN, "--calibration", "data.npz", "--json")
    assert code == 0 and "a dry run does not train" in out
    code, out, _ = run(capsys, "plan", "-p", HALF, "-p", TRAIN, "--calibration", "data.npz")
    assert code == 0 and "finetune" in out
    assert not list(tmp_path.glob("*checkpoint*"))


def test_without_data_and_for_bisect_it_says_no_in_words_and_trains_nothing(capsys, monkeypatch) -> None:
    trainings: list[object] = []
    monkeypatch.setattr("rewright.tools.stages.finetune", lambda *arguments, **options: trainings.append(arguments))
    code, _, err = run(capsys, "optimize", "-p", TRAIN, "-o", "out")
    assert code == 2 and "the recipe fine-tunes and there is no data to learn from; give some: --calibration FILE" in err
    code, _, err = run(capsys, "bisect", "-p", TRAIN, "--calibration", "data.npz")
    assert code == 2 and "finetune would train again at every step" in err
    assert trainings == []
