"""Modelled energy on every surface: said to be modelled, never beside a time, the sum of what it lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rewright.ir.energy import CAPTION, energy, total
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.tools import present
from rewright.tools.optimize import Result, optimize

from .test_cli import MODELS, run

QUANTIZE = "quantize-linear:min_weights=100"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.set_num_threads(1)


def quantized() -> Result:
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    return optimize(model, (torch.randn(4, 64),), recipe=[QuantizeLinear(min_weights=100)])


def test_cost_lists_modelled_energy_in_place_of_times(capsys) -> None:
    code, out, _ = run(capsys, "cost", "py:my_models:small", "--energy")
    assert code == 0
    first, caption, header, *rows = out.splitlines()
    assert first.startswith("modelled energy at the example sizes: ")
    assert caption == CAPTION
    assert header.split()[:4] == ["node", "op", "modelled", "uJ"]
    assert [row.split()[1] for row in rows] == ["linear", "linear", "relu"]
    assert "ms" not in out.split()


def test_cost_as_json_has_the_caption_and_adds_up(capsys) -> None:
    code, out, _ = run(capsys, "cost", "py:my_models:small", "--energy", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["caption"], found["unit"]) == (CAPTION, "modelled pJ")
    assert found["total"]["total"] == pytest.approx(sum(n["total"] for n in found["nodes"]))
    assert found["total"]["multiplications"] == pytest.approx(3.7 * (2 * 4 * 64 * 128 + 4 * 128 // 2))
    assert not [key for node in found["nodes"] for key in node if "second" in key or "ms" in key]
    assert "energy" not in run(capsys, "cost", "py:my_models:small", "--json")[1]


def test_every_record_predicts_its_change_and_the_report_the_whole(capsys) -> None:
    result = quantized()
    before, after = result.outcome.original, result.graph
    changes = [r.predicted.get("modelled_energy_uj", 0) for r in result.records]
    a, b = (total(energy(g)).total for g in (before, after))
    assert sum(changes) == pytest.approx((b - a) / 1e6)
    assert changes[-1] < 0
    present.result(result, "small", None)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "energy" in line]
    assert line == f"modelled energy {100 * (b / a - 1):+.1f} % ({CAPTION})"


def test_a_report_of_no_change_says_nothing(capsys) -> None:
    present.result(optimize(torch.nn.Linear(8, 8), (torch.randn(2, 8),), recipe=[]), "small", None)
    assert "energy" not in capsys.readouterr().out


def test_an_exact_step_says_what_ties_did() -> None:
    from rewright.passes.pipeline import Record

    record = Record("ternary-import", {}, True, measured={"cosine": 0.999, "step_error": 3e-3, "local_error": 4e-7})
    assert present._measured(record) == "exact within 4.0e-07 a value, ties moved the outputs by 3.0e-03"
