"""Every shipped recipe that quantizes, on a model it is for: all its passes apply, the outputs stay close, and onnxruntime runs the file."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from rewright.backends.onnx.session import Session
from rewright.passes.pipeline import Pipeline
from rewright.passes.recipe import Recipe
from rewright.tools.models import Loaded, load_model
from rewright.tools.optimize import optimize

TOKENS = 64  # of each calibration window
LEAST_COSINE = {"vit-int8": 0.9999, "decoder-w8a8": 0.998, "decoder-w4a16": 0.998, "data-free-int4": 0.995}
MOST_BYTES = {"vit-int8": 0.28, "decoder-w8a8": 0.31, "decoder-w4a16": 0.24, "data-free-int4": 0.22}  # of the original's weights
# name -> how often its pass applies, and what stays
APPLIED = {
    "vit-int8": [("outlier-migration", 19, 0), ("fuse-add-layer-norm", 12, 1), ("pack-heads", 6, 0), ("quantize-linear", 36, 1)],
    "decoder-w8a8": [("outlier-migration", 24, 1), ("fuse-add-rms-norm", 12, 0), ("quantize-linear", 43, 0), ("quantize-embedding", 1, 0)],
    "decoder-w4a16": [("fuse-add-rms-norm", 12, 0), ("quantize-linear", 1, 42), ("quantize-linear", 42, 0), ("quantize-embedding", 1, 0)],
    "data-free-int4": [("quantize-linear", 43, 0), ("quantize-embedding", 1, 0)],
}


@cache
def loaded(name: str) -> Loaded:
    """The model with its example and a few short batches."""
    if name == "stdlib-lm":
        pytest.importorskip("transformers")
    model = load_model(f"zoo:{name}")
    return Loaded(model.name, model.graph, [model.inputs[0], *(tuple(x[:, :TOKENS] for x in flat) for flat in model.inputs[1:5])])


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.slow if r in ("decoder-w4a16", "data-free-int4") else []) for r in APPLIED])
def test_a_shipped_recipe_applies_all_its_passes_stays_close_and_exports(recipe: str, tmp_path: Path) -> None:
    model = loaded("digits-vit" if recipe == "vit-int8" else "stdlib-lm")
    result = optimize(model, recipe=recipe)
    assert not result.outcome.undone
    assert [(r.name, r.applied, len(r.declined)) for r in result.records if not r.canonical] == APPLIED[recipe]
    assert result.verification["cosine"] > LEAST_COSINE[recipe]
    assert result.graph.weight_bytes() < MOST_BYTES[recipe] * model.graph.weight_bytes()
    result.export(tmp_path / "model.onnx")
    ran, original = Session(tmp_path / "model.onnx")(model.inputs[-1])[0], model.graph.run(model.inputs[-1])[0]
    assert torch.nn.functional.cosine_similarity(ran, original, dim=-1).mean() > LEAST_COSINE[recipe]


def test_ffn_30_removes_what_it_says_from_the_feed_forward_layers_and_exports(tmp_path: Path) -> None:
    """With fewer ratios to try than the recipe has, which is for minutes."""
    model, recipe = loaded("digits-vit"), Recipe.load("ffn-30")
    first, *rest = recipe.passes
    result = optimize(model, recipe=dataclasses.replace(recipe, passes=(dataclasses.replace(first, ratios=(0.2, 0.4), weigh="error"), *rest)))  # type: ignore[type-var]
    assert not result.outcome.undone
    applied = {r.name: r.applied for r in result.records if not r.canonical}
    assert applied.pop("allocate") >= 4 and applied == {"fuse-add-layer-norm": 12, "fuse-add-rms-norm": 0, "pack-heads": 6}
    ffn = 6 * 2 * 192 * 768 * 4
    saved = model.graph.weight_bytes() - result.graph.weight_bytes()
    assert 0.3 * ffn <= saved < 0.34 * ffn
    assert result.verification["cosine"] > 0.999
    exported = result.export(tmp_path / "model.onnx", profile="pure")
    assert exported.bytes < 0.85 * 4 * 2_687_434  # standard ops only


def test_data_free_int4_needs_no_data() -> None:
    recipe, model = Recipe.load("data-free-int4"), loaded("stdlib-lm")
    assert not any(step.requires for step in recipe.passes)
    outcome = Pipeline(recipe.passes, budget=recipe.budget, calibration=None, verify=False).run(model.graph)
    assert [r.applied for r in outcome.records if not r.canonical] == [43, 1]
