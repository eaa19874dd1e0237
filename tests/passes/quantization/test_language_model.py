"""Weight algorithms on a real language model: what they do to its next-token distributions on held-out text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rewright.ir.graph import Graph
from rewright.passes.pipeline import Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.statistics import Calibration
from rewright.tools.models import load_model
from rewright.tools.zoo import stdlib_lm


@cache
def model() -> tuple[Graph, Calibration]:
    """The graph, and 8 windows of training text."""
    pytest.importorskip("transformers")
    loaded = load_model("zoo:stdlib-lm")
    return Pipeline([], verify=False).run(loaded.graph).graph, Calibration(loaded.inputs[1:3])


def divergences(*steps: QuantizeLinear) -> list[float]:
    """Mean KL divergence of the next token's distribution from the original's, in nats, with the first two layers quantized."""
    graph, calibration = model()
    held_out = stdlib_lm.tokens("held_out")[0][:2, :-1]
    original = graph.run((held_out,))[0].log_softmax(-1).flatten(0, 1)
    found = []
    for step in steps:
        outcome = Pipeline([step], verify=False, calibration=calibration).run(graph)
        assert outcome.records[-1].applied == 14
        quantized = outcome.graph.run((held_out,))[0].log_softmax(-1).flatten(0, 1)
        found.append(torch.nn.functional.kl_div(quantized, original, reduction="batchmean", log_target=True).item())
    return found


def w4(**options: Any) -> QuantizeLinear:
    return QuantizeLinear(weights="int4-group", activations="none", only=("model.layers.0", "model.layers.1"), **options)


def test_rounding_that_knows_the_inputs_stays_closer_to_the_original() -> None:
    gptq, in_order, nearest = divergences(*(w4(**o) for o in ({"algorithm": "gptq"}, {"algorithm": "gptq", "act_order": False}, {})))
    assert gptq < in_order < 0.8 * nearest


def test_fewer_bits_of_weights_and_activations_cost_more() -> None:
    pairs = [("int8-channel", "int8-token"), ("int6-channel", "int6-token"), ("int4-channel", "int4-token")]
    eight, six, four = divergences(*(QuantizeLinear(weights=w, activations=a, only=("model.layers.0", "model.layers.1")) for w, a in pairs))  # type: ignore[arg-type]
    assert 0 < 4 * eight < six < four / 4
