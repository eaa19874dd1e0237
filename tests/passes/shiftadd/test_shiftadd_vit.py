"""The shipped recipe shiftadd-vit on zoo:digits-vit: what it rewrites and exports; marked slow, what its training brings back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rewright.ir.graph import Graph
from rewright.passes.pipeline import Budget, Pipeline
from rewright.passes.recipe import Recipe
from rewright.passes.rewrite import Recovered
from rewright.passes.statistics import Calibration
from rewright.tools.models import Loaded, load_model, runner_of
from rewright.tools.optimize import Result, optimize, plan

torch.set_num_threads(1)
ours = torch.ops.rewright
REWRITES = {"shift-add-attention": 6, "shift-linear": 12, "freeze-shift": 12, "fuse-add-layer-norm": 12}


@cache
def model() -> Loaded:
    return load_model("zoo:digits-vit")


def untrained(graph: Graph, options: Mapping[str, Any]) -> Recovered:
    """In place of minutes of training."""
    return Recovered(graph.clone(), "not trained in this test")


def test_every_pass_applies_and_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    recipe, data = Recipe.load("shiftadd-vit"), model().inputs
    pipeline = Pipeline(recipe.passes, None, Budget(), recipe.require_match, calibration=Calibration(data[1:3]), finetune=untrained)
    outcome = pipeline.run(model().graph, data[:2])
    assert not outcome.undone
    assert {r.name: r.applied for r in outcome.records if not r.canonical and r.name != "finetune"} == REWRITES
    assert [r.exact for r in outcome.records if r.name == "freeze-shift"] == [True]
    assert len(outcome.graph.find(ours.shift_add_attention.default)) == 6 and len(outcome.graph.find(ours.shift_linear.default)) == 12
    assert not outcome.graph.find(ours.attention.default)
    done = Result(outcome, recipe, data[:2]).export(tmp_path / "m.onnx")
    assert done.parity is not None and done.parity.cosine > 0.9999


def test_a_plan_of_it_trains_nothing_and_says_what_is_not_bought() -> None:
    found = plan(model(), None, "shiftadd-vit")
    assert {r.name: r.applied for r in found.records if not r.canonical} == {**REWRITES, "finetune": 0}
    assert any(n.startswith("shift-add-attention: not faster on cpu: predicted ") and n.endswith("(modelled energy), not time") for n in found.graph.notes)


@pytest.mark.slow
def test_its_training_brings_most_answers_back() -> None:
    """The recipe as it ships, five minutes on one core; benchmarks/shiftadd_vit.txt has its curve."""
    found = optimize(model(), recipe="shiftadd-vit")
    assert not found.outcome.undone
    zoo = model().zoo
    assert zoo is not None
    accuracy = zoo.judge(runner_of(found.module), None)[0].value
    lost = [r.details["curve"][0]["accuracy"] for r in found.records if r.name == "finetune"]
    assert lost[0] < 0.5 and accuracy > 0.94
    assert found.graph.weight_bytes() < 0.5 * model().graph.weight_bytes()


def test_the_budget_would_undo_it_without_training() -> None:
    recipe, data = Recipe.load("shiftadd-vit"), model().inputs
    stage = dataclasses.replace(recipe, passes=recipe.passes[:2])
    pipeline = Pipeline(stage.passes, None, stage.budget, calibration=Calibration(data[1:3]), finetune=untrained)
    outcome = pipeline.run(model().graph, data[:2])
    assert [r.name for r in outcome.undone] == ["shift-add-attention", "finetune"] and "top-1 agreement" in (outcome.undone[-1].undone or "")
    assert len(outcome.graph.find(ours.attention.default)) == 6
