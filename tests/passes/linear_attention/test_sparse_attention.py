"""sparse-attention: patterns from calibration, what it declines, what it says, dynamic lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rewright.backends.onnx.session import Session
from rewright.backends.target import Target
from rewright.ir.errors import RecipeError
from rewright.ir.graph import Graph
from rewright.passes.linear_attention.block_mass import dropped_mass, mean_mass
from rewright.passes.linear_attention.sparse_attention import SparseAttention
from rewright.passes.pipeline import Outcome, Pipeline
from rewright.passes.rewrite import Pass
from rewright.passes.statistics import Calibration
from rewright.tools.optimize import capture, optimize, predicted_seconds

from ..encoder import encoder, example

torch.set_num_threads(1)
ours = torch.ops.rewright


class Attention(nn.Module):
    """One attention with random weights and a residual."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.causal = nn.Linear(32, 96), nn.Linear(32, 32), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


def local(batch: int = 2, tokens: int = 64) -> tuple[torch.Tensor]:
    """Tokens that are most like their neighbours."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(batch, tokens // 8, 32, generator=generator).repeat_interleave(8, 1) * 3
    return (centre + 0.3 * torch.randn(batch, tokens, 32, generator=generator),)


def run(step: Pass, module: nn.Module, inputs: Any, target: str | None = None, dynamic: Any = None) -> Outcome:
    graph = capture(module, inputs, None, dynamic)
    machine = Target.load(target) if target else None
    predict = (lambda g, sizes=None: predicted_seconds(g, machine, sizes)) if machine else None
    return Pipeline([step], machine, predict=predict, calibration=Calibration([inputs])).run(graph, [inputs])


def pattern_of(graph: Graph) -> torch.Tensor:
    (node,) = graph.find(ours.block_attention.default)
    return graph.weight(node.args[3])  # type: ignore[arg-type]


# -- what it does -----------------------------------------------------------------------------------------------------


def test_the_mass_is_the_attention_paid_on_average() -> None:
    graph = capture(Attention(), local())
    (node,) = graph.find(ours.attention.default)
    found = mean_mass(graph, [local()], {node: 8}, 8)[node]
    module = Attention()
    q, k, _ = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in module.qkv(local()[0]).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    want = weights.unflatten(3, (8, 8)).sum(4).unflatten(2, (8, 8)).mean((0, 3))
    torch.testing.assert_close(found, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 8), rtol=1e-5, atol=1e-5)


def test_a_calibrated_pattern_keeps_the_mass_with_the_fewest_blocks() -> None:
    step = SparseAttention(block=8, mass=0.8, sinks=0, force=True, most_density=1.0)
    outcome = run(step, Attention(), local())
    blocks = pattern_of(outcome.graph)
    graph = capture(Attention(), local())
    (node,) = graph.find(ours.attention.default)
    mean, most = dropped_mass(graph, [local()], {node: blocks}, 8, 0)[node]
    assert mean <= 0.2 + 1e-6 and most >= mean
    fewer, _ = dropped_mass(graph, [local()], {node: blocks[..., :-1]}, 8, 0)[node]
    assert fewer > 0.0 and blocks.shape[-1] < 8
    (note,) = [n for n in outcome.graph.notes if "dropped mass" in n and "density" in n]
    assert f"dropped mass {mean:.3f} on average and {most:.3f} at most" in note


def test_with_all_mass_kept_the_outputs_are_dense_attentions() -> None:
    outcome = run(SparseAttention(block=8, mass=1.0, most_density=1.0, force=True), Attention(), local())
    assert outcome.records[-1].applied == 1 and outcome.total is not None and outcome.total.relative_error < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_diagonals_need_no_data(causal: bool) -> None:
    graph = capture(Attention(causal), local())
    for options, slots in (({"pattern": "window", "window": 8}, 3 if causal else 4), ({"pattern": "diagonal"}, 1)):
        outcome = Pipeline([SparseAttention(block=8, force=True, most_density=1.0, **options)]).run(graph, [local()])  # type: ignore[arg-type]
        assert pattern_of(outcome.graph).shape == (1, 8, slots)
        assert outcome.graph.find(ours.block_attention.default)[0].args[6] is causal


def test_global_tokens_see_all_and_are_seen() -> None:
    outcome = run(SparseAttention(pattern="diagonal", block=8, global_tokens=1, force=True), Attention(), local())
    x = local()[0].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(outcome.graph.module(x)[0, 0].sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).all()


def test_dynamic_lengths_and_padding_run_in_torch_and_onnxruntime(tmp_path: Path) -> None:
    inputs = example()
    result = optimize(encoder(), inputs, recipe=[SparseAttention(pattern="window", block=4, window=4, tokens=64, force=True, most_density=1.0)])
    assert result.records[-1].applied == 2
    exported = result.export(tmp_path / "m.onnx")
    assert exported.parity is not None and exported.parity.relative_error < 1e-4
    session = Session(tmp_path / "m.onnx")
    for flat in result.inputs[:1]:
        assert session(flat)[0].shape == result.graph.run(flat)[0].shape


# -- what it says no to -----------------------------------------------------------------------------------------------


def test_too_dense_a_layer_stays_dense_and_says_how_dense() -> None:
    outcome = run(SparseAttention(block=8, mass=1.0), Attention(), local())
    assert outcome.records[-1].declined[0].why == "keeping 1 of its attention takes 1.00 of its blocks, more than most_density = 0.5"


def test_where_no_gain_is_predicted_it_declines_with_both_figures() -> None:
    outcome = run(SparseAttention(pattern="window", block=8, window=8), Attention(), local(), target="cpu")
    assert not outcome.records[-1].applied
    why = outcome.records[-1].declined[0].why
    assert why.startswith("the program would not get faster: predicted ") and "us against" in why and "force = true" in why


def test_where_a_gain_is_predicted_it_says_so() -> None:
    outcome = run(SparseAttention(pattern="window", block=64, window=64), Attention(), local(1, 4096), target="cpu")
    assert outcome.records[-1].applied == 1
    assert any(n.startswith("sparse-attention: predicted") for n in outcome.graph.notes)


def test_packed_heads_are_left_alone() -> None:
    from rewright.passes.fusion.pack_heads import PackHeads

    graph = capture(encoder(), (), example())
    packed = Pipeline([PackHeads()]).run(graph).graph
    outcome = Pipeline([SparseAttention(pattern="diagonal", tokens=64)]).run(packed)
    assert "its heads are packed; put sparse-attention before pack-heads" in [d.why for d in outcome.records[-1].declined]


@pytest.mark.parametrize(("options", "why"), [({"skip": ("",)}, "skip names "), ({"only": ("nothing",)}, "it is not within only = nothing")])
def test_only_and_skip(options: dict[str, Any], why: str) -> None:
    path = run(SparseAttention(pattern="diagonal", block=8, force=True), Attention(), local()).records[-1].layers[0]
    given = {name: (path,) if value == ("",) else value for name, value in options.items()}
    declined = run(SparseAttention(pattern="diagonal", block=8, force=True, **given), Attention(), local()).records[-1].declined
    assert [d.why for d in declined] == [why + path if why.endswith("names ") else why]


def test_a_longest_input_is_needed_where_the_graph_sets_none() -> None:
    tokens = torch.export.Dim("tokens", min=2)
    graph = capture(Attention(), local(), None, {"x": {1: tokens}})
    outcome = Pipeline([SparseAttention(pattern="diagonal", force=True)]).run(graph, [local()])
    assert outcome.records[-1].undone == "sparse-attention is judged at the longest input, and the graph sets no limit; give tokens"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"block": 0}, "block is at least 1"), ({"mass": 0.0}, "mass is a share above 0"), ({"most_density": 1.5}, "most_density is a share above 0, at most 1")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        SparseAttention(**options)
