"""Scores by a layer's own queries and keys are the same whether the layer is over or still to come, in decoders of many kinds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context
from rewright.passes.tokens.visual_scores import grid_of
from rewright.passes.tokens.visual_token_pruning import VisualTokenPruning

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
SPAN = (3, 20)


class LastToken(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state[:, -1]


@cache
def language_model(name: str) -> Graph:
    torch.manual_seed(0)
    grouped = {} if name == "GPTNeoX" else {"num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**SMALL, **grouped, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, f"{name}Model")(config).eval()
    graph = capture(LastToken(model), (embeddings(),), None, {"inputs_embeds": {0: "batch"}})
    for step in CANONICAL:
        graph = step().run(graph, Context())
    graph.clean()
    return graph


def embeddings() -> Tensor:
    return torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))


def kept(graph: Graph, **options) -> list[int]:
    """The tokens of both samples that are left by its one stage."""
    context = Context()
    after = VisualTokenPruning(image_span=SPAN, uniform_stride=0, **options).run(graph.clone(), context)
    assert len(context.applied) == 1, context.declined
    after.clean()
    (cut,) = [n for n in after.find(torch.ops.rewright.token_take.default) if n.meta["val"].dim() == 3 and n.meta["val"].is_floating_point()]
    values = {}

    class Trace(fx.Interpreter):
        def run_node(self, n: fx.Node):
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Trace(after.module).run(embeddings(), enable_io_processing=False)
    return values[cut.args[1]].flatten().tolist()


@pytest.mark.parametrize("name", ["Qwen3", "Phi3", "GPTNeoX", "Gemma2"])
@pytest.mark.parametrize("criterion", ["last-token", "last-token-rope", "pagerank"])
def test_a_layers_scores_are_the_same_before_and_after_it(name: str, criterion: str) -> None:
    """Norms of queries and keys, fused projections, RoPE on a part of the head beside a parallel FFN, capped scores under a wide window."""
    graph = language_model(name)
    after = kept(graph, stages=((3, 0.4),), criterion=criterion, scored_by="layer-before")
    assert after == kept(graph, stages=((2, 0.4),), criterion=criterion, scored_by="layer-behind")
    assert after != kept(graph, stages=((3, 0.4),), criterion=criterion, scored_by="layer-behind")


def test_criteria_differ() -> None:
    found = [kept(language_model("Qwen3"), stages=((2, 0.4),), criterion=c) for c in ("last-token", "last-token-rope", "pagerank", "uniform")]
    assert len({tuple(f) for f in found}) == 4


def test_rotations_that_are_no_node_of_their_own_are_not_left_out() -> None:
    torch.manual_seed(0)
    config = transformers.GPTJConfig(n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4, vocab_size=64)
    graph = capture(LastToken(transformers.GPTJModel(config).eval()), (embeddings(),), None, {"inputs_embeds": {0: "batch"}})
    for step in CANONICAL:
        graph = step().run(graph, Context())
    context = Context()
    assert VisualTokenPruning(image_span=SPAN, stages=((2, 0.4),), uniform_stride=0).run(graph, context) is graph
    assert "turns its queries and keys in more than one call, which can't be left out" in context.declined[0].why
    assert kept(graph, stages=((2, 0.4),), criterion="last-token-rope")


def test_a_grid_has_every_third_of_every_third_row() -> None:
    assert grid_of((4, 7), 3).nonzero().flatten().tolist() == [0, 3, 6, 21, 24, 27]
    assert int(grid_of((24, 24), 3).sum()) == 64
