"""Scores and orders of calibration on trained weights: what they do to held-out outputs, with the feed-forward layers at half their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from rewright.ir.graph import Flat, Graph
from rewright.passes.factorization.low_rank import LowRank
from rewright.passes.pipeline import Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration
from rewright.tools.models import load_model
from rewright.tools.zoo import stdlib_lm

Model = Callable[[], tuple[Graph, Calibration, tuple[Flat, ...]]]


@cache
def language_model() -> tuple[Graph, Calibration, tuple[Flat, ...]]:
    """The graph, 4096 tokens of training text, windows of held-out text."""
    pytest.importorskip("transformers")
    loaded = load_model("zoo:stdlib-lm")
    return Pipeline([], verify=False).run(loaded.graph).graph, Calibration(loaded.inputs[1:5]), ((stdlib_lm.tokens("held_out")[0][:2, :-1],),)


@cache
def text_encoder() -> tuple[Graph, Calibration, tuple[Flat, ...]]:
    """The graph, texts, other texts."""
    pytest.importorskip("transformers")
    loaded = load_model("zoo:minilm")
    return Pipeline([], verify=False).run(loaded.graph).graph, Calibration(loaded.inputs[1:4]), tuple(loaded.inputs[-2:])


@cache
def rewritten(model: Model, **options: Any) -> Graph:
    graph, calibration, _ = model()
    step = LowRank(**{"ratio": 0.5, "affine": False, "allocation": "uniform", "shared": "separate", "require_faster": False, **options})
    statistics = calibration.gather(graph, step.requests(graph)) if step.requires else None
    after = step.run(graph.draft(), Context(statistics=statistics, calibration=calibration))
    after.clean()
    return after


def layer_errors(model: Model, **options: Any) -> float:
    """Squared error of each rewritten linear on the original's inputs, relative to its output, summed."""
    graph, calibration, _ = model()
    after, statistics = rewritten(model, **options), calibration.gather(graph, LowRank().requests(graph))
    total = 0.0
    for node in graph.find(torch.ops.aten.linear.default):
        name = str(node.args[1].target)  # type: ignore[union-attr]
        if after.has_weight(f"{name}_second"):
            w, first, second = (g.weight(n).detach().double() for g, n in ((graph, name), (after, f"{name}_first"), (after, f"{name}_second")))
            error, gram = w - second @ first, statistics[node.args[0]].gram  # type: ignore[index]
            total += float(((error @ gram) * error).sum() / ((w @ gram) * w).sum())
    return total


def output_error(model: Model, **options: Any) -> float:
    """On held-out text: mean KL divergence from the original of the language model's next token, in nats; 1 - mean cosine of the encoder's tokens."""
    graph, _, held_out = model()
    after = rewritten(model, **options)
    if model is language_model:
        y, z = (g.run(held_out[0])[0].log_softmax(-1).flatten(0, 1) for g in (graph, after))
        return torch.nn.functional.kl_div(z, y, reduction="batchmean", log_target=True).item()
    cosines = [torch.cosine_similarity(graph.run(flat)[0], after.run(flat)[0], dim=-1)[flat[1].bool()] for flat in held_out]
    return 1 - torch.cat(cosines).mean().item()


@pytest.mark.parametrize("model", [language_model, text_encoder])
@pytest.mark.parametrize("error", [layer_errors, output_error])
def test_whitened_stays_nearer_to_trained_models_than_asvd_and_that_than_plain_svd(model: Model, error: Callable[..., float]) -> None:
    plain, asvd, whitened = (error(model, score=s) for s in ("plain", "asvd", "whitened"))
    assert whitened < 0.8 * asvd < 0.8 * plain


@pytest.mark.parametrize("model", [language_model, text_encoder])
def test_refitting_saves_a_plain_svd(model: Model) -> None:
    assert output_error(model, score="plain", refit=True) < 0.7 * output_error(model, score="plain")


def test_layers_that_make_up_for_those_before_them_stay_nearer_on_held_out_text() -> None:
    """With 5 tokens a channel and no stronger ridge; with half of them it overfits."""
    assert output_error(language_model, calibration="asymmetric") < 0.9 * output_error(language_model)
