"""One function scores modules, results and files on whatever there is to judge by, and says no when there is nothing."""

import json
import sys

import pytest
import torch
from torch import nn

import rewright as rw
from rewright.ir.errors import UsageError
from rewright.passes.pipeline import Budget
from rewright.passes.recipe import Recipe
from rewright.tools.cli import main
from rewright.tools.score import Run, Score

INPUTS = {"x": torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


@pytest.fixture(scope="module")
def result() -> rw.Result:
    return rw.optimize(Classifier().eval(), INPUTS, recipe=[rw.passes.QuantizeLinear(min_weights=1)], calibration=[INPUTS])


def closeness(run: Run) -> float:
    """The user's own metric: minus the mean absolute output."""
    return -run(INPUTS).abs().mean().item()


def test_a_metric_of_ones_own_scores_modules_graphs_and_results(result):
    module = Classifier().eval()
    expected = -module(**INPUTS).abs().mean().item()
    for model in (module, rw.capture(module, kwargs=INPUTS)):
        [score] = rw.evaluate(model, closeness).scores
        assert score.value == pytest.approx(expected, rel=1e-5) and score.name == "closeness"
    assert rw.evaluate(result, closeness).scores[0].value != expected  # eight bits show


def test_agreement_with_another_model_has_an_interval_and_sees_eight_bits(result):
    cosine, agreement = rw.evaluate(result, against=Classifier().eval(), data=[INPUTS]).scores
    assert 0.99 < cosine.low <= cosine.value <= cosine.high < 1 - 1e-7
    assert agreement.on == "30 rows of 6 examples"
    same, _ = rw.evaluate(Classifier().eval(), against=Classifier().eval(), data=[INPUTS]).scores
    assert same.value == pytest.approx(1, abs=1e-6)


def test_padding_does_not_count(result):
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.where(attention_mask[..., None] > 0, x, torch.randn_like(x))

    batch = {**INPUTS, "attention_mask": torch.ones(6, 5).tril(-1).long()}
    cosine, _ = rw.evaluate(Noisy(), against=Noisy(), data=[batch]).scores
    assert cosine.value == pytest.approx(1, abs=1e-6) and cosine.on == "15 rows of 5 examples"


def test_every_backend_gives_the_same_score(result, tmp_path):
    expected = rw.evaluate(result, closeness).scores[0].value
    result.export(tmp_path / "m.onnx")
    result.save(tmp_path / "saved")
    for model, backend, said in (
        (result, "onnx", "onnxruntime"),
        (tmp_path / "m.onnx", "torch", "onnxruntime"),
        (tmp_path / "saved", "torch", "torch"),
        (result, "cpu", "cpu"),
    ):
        found = rw.evaluate(model, closeness, backend=backend)
        assert found.backend == said
        assert found.scores[0].value == pytest.approx(expected, rel=1e-2)  # onnxruntime may round an activation the other way


def test_what_cannot_be_judged_is_refused_in_words(result):
    with pytest.raises(UsageError, match="has no metric of its own"):
        rw.evaluate(result)
    with pytest.raises(UsageError, match="measured on data"):
        rw.evaluate(result, against=Classifier())
    with pytest.raises(UsageError, match="the data to compare on is empty"):
        rw.evaluate(result, against=Classifier(), data=[])
    with pytest.raises(UsageError, match="expected py:module:function"):
        rw.evaluate(result, "py:no_such_module:metric")
    with pytest.raises(UsageError, match="capture it first"):
        rw.evaluate(Classifier(), closeness, backend="onnx")


def test_the_command_prints_json_with_the_intervals(result, tmp_path, monkeypatch, capsys):
    result.save(tmp_path / "saved")
    (tmp_path / "own_metric.py").write_text("from rewright.tools.score import Score\ndef judge(run):\n    return [Score('mine', 0.5, 0.4, 0.6, 'nothing')]\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(tmp_path / "saved"), "--on", "py:own_metric:judge", "--json"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == [Score("mine", 0.5, 0.4, 0.6, "nothing").as_dict()]


def test_a_budget_on_a_metric_needs_a_metric():
    with pytest.raises(UsageError, match="max_metric_drop needs metric="):
        rw.optimize(Classifier(), INPUTS, recipe=Recipe((), budget=Budget(max_metric_drop=0.1)))
