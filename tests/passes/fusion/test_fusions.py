"""The exact fusions: they fire where they should, keep the numbers, and refuse in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.backends.target import Target
from rewright.ir.cost import op_name
from rewright.ir.graph import Graph
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.recipe import make_pass
from rewright.tools.models import Loaded, as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example


def run(module: nn.Module | Graph, inputs: Any, *names: str | tuple[str, dict]) -> Outcome:
    """Passes on a captured module, verified; a broken promise fails the test."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    graph = module if isinstance(module, Graph) else capture(module, args, kwargs)
    steps = [make_pass(n, {}) if isinstance(n, str) else make_pass(*n) for n in names]
    outcome = Pipeline(steps).run(graph, [Loaded("", graph, [as_flat(graph, inputs)]).inputs[0]])
    assert not outcome.undone, outcome.undone[0].undone
    return outcome


def count(graph: Graph, op: str) -> int:
    return sum(op_name(n) == op for n in graph.nodes)


def why(outcome: Outcome) -> list[str]:
    return [d.why for d in outcome.records[-1].declined]


class Residual(nn.Module):
    """A pre-norm pair: the sum is read by the norm and by the next sum."""

    def __init__(self, rms: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6) if rms else nn.LayerNorm(16)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return h + self.norm(h)


@pytest.mark.parametrize(("name", "op", "rms"), [("fuse-add-layer-norm", "add_layer_norm", False), ("fuse-add-rms-norm", "add_rms_norm", True)])
def test_residual_add_and_norm_become_one_node_bit_equal(name: str, op: str, rms: bool) -> None:
    outcome = run(Residual(rms), (torch.randn(4, 16), torch.randn(4, 16)), name)
    assert count(outcome.graph, op) == 1
    assert count(outcome.graph, "add") == 1, "the second sum still reads h"
    assert outcome.total is not None
    assert outcome.total.bit_equal


def test_add_norm_declines_a_broadcast_and_says_which() -> None:
    outcome = run(Residual(), (torch.randn(4, 16), torch.randn(16)), "fuse-add-layer-norm")
    assert why(outcome) == ["the add broadcasts f32[16] to f32[batch, 16]"] or "broadcasts" in why(outcome)[0]
    assert count(outcome.graph, "add_layer_norm") == 0


def test_add_norm_declines_a_number() -> None:
    class AddsOne(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x + 1.5, [16], torch.ones(16), torch.zeros(16))

    assert why(run(AddsOne(), (torch.randn(4, 16),), "fuse-add-layer-norm")) == ["the add has the number 1.5"]


def test_heads_are_packed_with_their_mask() -> None:
    outcome = run(encoder(), example(), "pack-heads")
    assert (count(outcome.graph, "multi_head_attention"), count(outcome.graph, "permute")) == (2, 0)
    assert outcome.total is not None
    assert outcome.total.bit_equal


def test_heads_are_grouped_and_the_groups_hold_all_weights() -> None:
    outcome = run(encoder(), example(), "pack-heads", ("group-heads", {"heads_per_group": 2}))
    assert count(outcome.graph, "multi_head_attention") == 4
    assert outcome.graph.weight_bytes() == outcome.original.weight_bytes()


@pytest.mark.parametrize(
    ("size", "sentence"), [(4, "it has 4 heads, no more than heads_per_group = 4"), (3, "4 query and 4 key heads do not divide into groups of 3")]
)
def test_group_heads_declines_and_says_why(size: int, sentence: str) -> None:
    assert why(run(encoder(), example(), "pack-heads", ("group-heads", {"heads_per_group": size}))) == [sentence] * 2


@pytest.mark.parametrize("name", ["group-heads", "group-ffn"])
def test_groups_are_declined_where_there_is_no_cache_to_gain(name: str) -> None:
    graph = capture(encoder(), (), example())
    outcome = Pipeline([make_pass("pack-heads", {}), make_pass(name, {})], target=Target.load("h200"), verify=False).run(graph)
    assert set(why(outcome)) == {"on h200 every group costs another launch and no cache is gained"}


def test_group_heads_declines_merged_projections() -> None:
    outcome = run(encoder(layers=1), example(), "pack-heads", "merge-linears", ("group-heads", {"heads_per_group": 2}))
    assert "not by a linear layer" in why(outcome)[0]


def test_grouped_ffn_is_the_same_function_and_adds_its_bias_once() -> None:
    model = encoder(layers=1)
    nn.init.constant_(model.layers[0].down.bias, 2.0)
    outcome = run(model, example(), ("group-ffn", {"groups": 4}))
    assert count(outcome.graph, "gelu") == 4
    assert outcome.records[-1].applied == 1


def test_outliers_get_a_group_of_their_own() -> None:
    graph = run(encoder(layers=1), example(), ("group-ffn", {"groups": 2, "outliers": 8})).graph
    weights = [n.args[1] for n in graph.find(torch.ops.aten.linear.default)]
    widths = [w.meta["val"].shape[1] for w in weights if "down" in str(w.target)]
    assert sorted(widths) == [8, 60, 60]


def test_group_ffn_declines_an_uneven_split_and_a_hidden_layer_others_read() -> None:
    assert why(run(encoder(layers=1), example(), ("group-ffn", {"groups": 3}))) == ["its 128 hidden channels do not divide into 3 groups"]
    assert why(run(encoder(layers=1), example(), ("group-ffn", {"outliers": 127}))) == ["its 128 hidden channels do not divide into 127 and 2 groups"]

    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.up(x))
            return self.down(h), h

    assert "is also read by output" in why(run(Peeks(), (torch.randn(2, 8),), "group-ffn"))[0]


def test_merged_linears_split_back_and_a_missing_bias_is_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    outcome = run(Two(), (torch.randn(3, 8),), "merge-linears")
    assert count(outcome.graph, "linear") == 1
    assert outcome.records[-1].applied == 2


def test_merge_linears_declines_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.other = nn.Embedding(8, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            return nn.functional.linear(x, self.embed.weight), self.other(x)

    outcome = run(Tied(), (torch.zeros(2, 3, dtype=torch.long),), "merge-linears")
    assert why(outcome) == ["its weight embed.weight is also read by embedding"]
