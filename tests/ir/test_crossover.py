"""The predicted crossover of softmax and linear attention: a crossing of the two predictions, later for what costs more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rewright.backends.target import Target
from rewright.ir import crossover as module
from rewright.ir.crossover import crossover, times
from rewright.tools.optimize import predicted_seconds

torch.set_num_threads(1)
TWELVE: dict[str, Any] = {"heads": 12, "head_dim": 64}


def predictor(target: Target) -> Any:
    return lambda graph, sizes=None: predicted_seconds(graph, target, sizes)


CPU, H200 = predictor(Target.load("cpu-avx512-vnni")), predictor(Target.load("h200"))
"""The class of the machine that `MEASURED` is of, and a GPU."""


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"feature_map": "hedgehog_softmax", "window": 64}, {"feature_map": "performer", "causal": True}])
def test_softmax_is_predicted_faster_below_and_linear_from_there_on(options: dict[str, Any]) -> None:
    found = crossover(CPU, **TWELVE, **options)
    assert found is not None
    for tokens in (found // 4, found // 2, found - 1):
        softmax, linear = times(CPU, tokens, **TWELVE, **options)
        assert softmax <= linear
    for tokens in (found, 2 * found, 10 * found):
        softmax, linear = times(CPU, tokens, **TWELVE, **options)
        assert linear < softmax


def test_more_work_crosses_later() -> None:
    """More features, causal order, softmax near by, wider values: each makes the linear side dearer."""

    def at(**options: Any) -> int:
        found = crossover(CPU, **{**TWELVE, **options})
        assert found is not None
        return found

    performer = [at(feature_map="performer", features=f) for f in (32, 64, 128, 256)]
    assert performer == sorted(set(performer))
    for kind in ("elu1", "hedgehog_softmax"):
        assert at(feature_map=kind) < at(feature_map=kind, causal=True)
    assert at() < at(feature_map="hedgehog_softmax") < at(feature_map="hedgehog_softmax", window=64) < at(feature_map="hedgehog_softmax", window=128)


@pytest.mark.parametrize("causal", [False, True])
def test_time_of_linear_attention_is_linear_and_of_softmax_quadratic(causal: bool) -> None:
    """Any number of tokens can be asked for, also numbers of whole chunks. Beyond launches no part of the time is that of the traced example."""
    for window, launches in ((0, 3 + 3 + 6), (64, 3 + 3 + 30)):
        for tokens in (4096, 4099):
            short, long = (times(CPU, n, **TWELVE, causal=causal, window=window) for n in (tokens, 4 * tokens))
            assert long[0] == pytest.approx(16 * short[0], rel=0.01)
            assert long[1] == pytest.approx(4 * short[1], rel=0.01)
            assert (4 * short[1] - long[1]) / 3 == pytest.approx(launches * Target.load("cpu-avx512-vnni").launch, rel=0.01)


MEASURED = {
    ("elu1", False, 0): 186,
    ("hedgehog_softmax", False, 0): 251,
    ("hedgehog_softmax", False, 64): 1082,
    ("elu1", True, 0): 327,
    ("hedgehog_softmax", True, 0): 482,
    ("hedgehog_softmax", True, 64): 775,
}
"""feature map, causal, window -> tokens in onnxruntime, one thread, 4 heads of 64 channels: benchmarks/attention_length.txt."""


@pytest.mark.parametrize("case", MEASURED)
def test_the_cpu_crosses_within_a_factor_of_one_and_a_half_of_what_was_measured(case: tuple[str, bool, int]) -> None:
    kind, causal, window = case
    found = crossover(CPU, heads=4, head_dim=64, feature_map=kind, causal=causal, window=window)
    assert found is not None and MEASURED[case] / 1.5 < found < MEASURED[case] * 1.5


@pytest.mark.parametrize(
    ("kind", "causal", "low", "high"),
    [("elu1", False, 540, 1400), ("hedgehog_softmax", False, 840, 1850), ("elu1", True, 1280, 2900), ("hedgehog_softmax", True, 1910, 3800)],
)
def test_a_gpu_crosses_where_the_published_kernels_would(kind: str, causal: bool, low: int, high: int) -> None:
    """64 channels, 128 heads in all, between FlashAttention 2 and 3: specs/attention_tokens.md 12.3, widened by its spread over batches."""
    found = crossover(H200, heads=16, head_dim=64, batch=8, feature_map=kind, causal=causal, dtype=torch.bfloat16)
    assert found is not None and low < found < high


def test_a_gpu_crosses_later_than_a_core() -> None:
    assert crossover(H200, **TWELVE, dtype=torch.bfloat16) > crossover(CPU, **TWELVE)  # type: ignore[operator]


def test_none_where_linear_attention_is_not_predicted_faster_in_reach() -> None:
    late = crossover(CPU, **TWELVE, feature_map="taylor2", causal=True)
    assert late is not None
    assert crossover(CPU, **TWELVE, feature_map="taylor2", causal=True, most=late - 1) is None
    assert crossover(CPU, **TWELVE, feature_map="taylor2", causal=True, most=late) == late
    free = replace(Target.load("cpu-avx512-vnni"), efficiency={"attention": 1e9})
    assert crossover(predictor(free), **TWELVE) is None


def test_linear_attention_that_is_always_faster_crosses_at_the_first_token() -> None:
    assert crossover(predictor(replace(Target.load("cpu-avx512-vnni"), efficiency={"attention": 1e-9})), **TWELVE) == 1


def test_the_efficiency_of_attention_moves_the_crossover_and_that_of_another_op_does_not() -> None:
    target = Target.load("cpu-avx512-vnni")
    half, other = (replace(target, efficiency={**target.efficiency, **more}) for more in ({"attention": 0.325}, {"linear": 0.1}))
    assert crossover(predictor(half), **TWELVE) < crossover(CPU, **TWELVE) == crossover(predictor(other), **TWELVE)  # type: ignore[operator]


def test_shared_key_heads_and_other_value_widths_are_counted() -> None:
    whole, grouped = (times(CPU, 512, heads=12, head_dim=64, kv_heads=kv) for kv in (12, 3))
    assert grouped[1] < whole[1]
    assert times(CPU, 512, **TWELVE, value_dim=128)[0] > whole[0]
    assert times(CPU, 512, **TWELVE, batch=2)[0] > 1.9 * whole[0]


def test_answers_are_kept() -> None:
    calls = []

    def counted(graph: Any, sizes: Any) -> float:
        calls.append(sizes)
        return CPU(graph, sizes)

    first = crossover(counted, **TWELVE)
    asked = len(calls)
    assert 0 < asked < 60
    assert crossover(counted, head_dim=64, heads=12) == first and len(calls) == asked
    before = module._programs.cache_info().misses
    times(counted, 100, **TWELVE)
    assert module._programs.cache_info().misses == before


def test_an_unknown_feature_map_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no feature map named 'elu'; there are elu1"):
        crossover(CPU, **TWELVE, feature_map="elu")
