"""Intervals hold what they promise: they cover the truth about as often as they say."""

import math

import pytest
import torch

from rewright.tools.score import mean, proportion, ratio


def test_a_proportion_of_one_still_has_an_interval():
    score = proportion("accuracy", torch.ones(599, dtype=torch.bool), "digits")
    assert score.value == score.high == 1.0
    assert score.low == pytest.approx(599 / (599 + 1.959964**2), abs=1e-6)  # Wilson's formula at p = 1


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = [mean("x", torch.randn(60, generator=generator) + 1, "draws") for _ in range(100)]
    assert 88 <= sum(s.low <= 1 <= s.high for s in samples) <= 99


def test_items_of_one_group_are_drawn_together():
    """Sixty copies of four values say no more than the four."""
    values, groups = torch.tensor([1.0, 2.0, 3.0, 6.0]).repeat(60), torch.arange(4).repeat(60)
    together, apart = ratio("x", values, torch.ones(240), "", groups), ratio("x", values, torch.ones(240), "")
    assert together.value == apart.value == 3.0
    assert together.high - together.low > 4 * (apart.high - apart.low)


def test_a_ratio_weights_items_by_their_counts_and_maps_the_interval_too():
    loss, count = torch.tensor([10.0, 1.0]), torch.tensor([10.0, 2.0])
    score = ratio("perplexity", loss, count, "", of=math.exp, better=False)
    assert score.value == pytest.approx(math.exp(11 / 12))
    assert score.low == pytest.approx(math.exp(0.5)) and score.high == pytest.approx(math.exp(1.0))
