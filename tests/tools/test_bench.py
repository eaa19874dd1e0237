"""Measuring: the memory of live activations."""

from __future__ import annotations

import torch
from torch import nn

from rewright.tools.bench import peak_activation_bytes


def test_the_peak_counts_what_lives_at_once_and_neither_weights_nor_inputs_nor_views() -> None:
    x, up, down = torch.randn(10, 100), nn.Linear(100, 1000, bias=False), nn.Linear(1000, 100, bias=False)

    def call() -> torch.Tensor:
        h = up(x).relu().view(5, 2, 1000)  # two hidden values of 40,000 bytes at once, the view is one of them
        y = down(h)  # 4,000 more bytes beside one of them
        return y

    with torch.no_grad():
        assert peak_activation_bytes(call) == 80_000


def test_a_value_that_was_let_go_makes_room() -> None:
    def call() -> torch.Tensor:
        y = torch.zeros(1000)
        for _ in range(9):
            y = y + 1
        return y

    assert peak_activation_bytes(call) == 8_000
