"""On x86 without VNNI, weights of integer products have 7 bits, so that no pair of products leaves 16 bits; elsewhere all 8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rewright.backends.target import Target
from rewright.ir.graph import Graph
from rewright.passes.pipeline import Pipeline
from rewright.passes.quantization.mixed_precision import MixedPrecision
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.quantization.reduced_range import SAYS, reduced_range, saturates
from rewright.passes.quantization.scheme import scheme
from rewright.passes.statistics import Calibration
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example


def cpu(*features: str) -> Target:
    return replace(Target.load("cpu"), features=frozenset(features))


OLD = cpu("avx", "avx2", "fma")


def quantized(step: Any, target: Target | None) -> Graph:
    graph = capture(encoder(), (), example())
    flat = as_flat(graph, example())
    return Pipeline([step], target, calibration=Calibration([flat])).run(graph, [flat]).graph


def largest_code(graph: Graph) -> int:
    codes = [t for t in graph.weights().values() if t.dtype == torch.int8]
    assert codes
    return max(int(t.int().abs().max()) for t in codes)


def test_only_x86_without_wide_sums_is_known_to_saturate() -> None:
    assert saturates(OLD) and saturates(cpu("avx2", "avx512f", "avx512bw"))
    for wide in ("avx512_vnni", "avx_vnni", "amx_int8"):
        assert not saturates(cpu("avx2", "avx512f", wide))
    assert not saturates(cpu()) and not saturates(None), "features that nobody lists"
    assert not saturates(cpu("neon", "asimddp"))
    assert not saturates(replace(Target.load("h200"), features=frozenset({"avx2"})))


@pytest.mark.parametrize(
    ("weights", "activations", "bits"),
    [
        ("int8-channel", "int8-dynamic", 7),
        ("int8-channel", "int8-static", 7),
        ("int8-channel", "int8-token", 7),
        ("int8-channel", "int4-token", 7),  # u8 codes around 128 all the same
        ("int6-channel", "int8-token", 6),
        ("int8-channel", "none", 8),
        ("int8-group", "none", 8),
        ("fp8-channel", "fp8-token", 8),
    ],
)
def test_weights_that_would_saturate_lose_a_bit_and_no_others(weights: str, activations: str, bits: int) -> None:
    found = reduced_range(scheme(weights, activations), OLD)
    assert found.weights.bits == bits
    assert replace(found, weights=scheme(weights, activations).weights) == scheme(weights, activations)
    if found.activations is not None and found.weights.kind == "int":
        assert 2 * 255 * found.weights.high < 2**15


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "gptq"])
def test_codes_end_at_63_and_the_notes_say_why(algorithm: Any) -> None:
    graph = quantized(QuantizeLinear(algorithm=algorithm), OLD)
    assert largest_code(graph) == 63
    assert graph.notes.count(SAYS) == 1
    with_all = quantized(QuantizeLinear(algorithm=algorithm), cpu("avx2", "avx512f", "avx512_vnni"))
    assert largest_code(with_all) == 127
    assert SAYS not in with_all.notes
    original, inputs = encoder()(**example()), example()
    cosines = [torch.nn.functional.cosine_similarity(g.module(**inputs), original, dim=-1).mean() for g in (graph, with_all)]
    assert 0.999 < cosines[0] < cosines[1]


def test_nothing_is_said_where_nothing_is_quantized_and_nothing_known() -> None:
    assert quantized(QuantizeLinear(min_weights=10**6), OLD).notes == []
    assert largest_code(quantized(QuantizeLinear(), cpu())) == largest_code(quantized(QuantizeLinear(), None)) == 127


def test_mixed_precision_measures_and_stores_7_bits_too() -> None:
    choices = ("int8-channel/int8-dynamic", "int4-group/none")
    graph = quantized(MixedPrecision(choices=choices, budget_bits=9.0, group_size=32, min_weights=1), OLD)
    assert largest_code(graph) == 63
    assert graph.notes.count(SAYS) == 1
