"""What `ir/blocks` finds in small models of the usual families is what their configs declare."""

from __future__ import annotations

import pytest
import torch

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context
from rewright.tools.architectures import find_architectures
from rewright.tools.declared import DECLARED, Declared, differences

pytest.importorskip("transformers")
torch.set_num_threads(1)

FEW = ("bert", "gpt2", "bloom", "gptneox", "llama", "gemma2", "phi3", "mixtral", "t5", "vit", "swin")
"""Post-norm, Conv1D, baddbmm, interleaved qkv, GQA, sandwich, fused gate, experts, cross, image tokens, windows. `make matrix` runs all."""


def _canonical(name: str) -> tuple[Graph, Declared]:
    (architecture,) = find_architectures([name])
    model = architecture.build()
    graph = capture(model, (), architecture.inputs(model, *architecture.shapes[0]), dynamic_shapes=architecture.dynamic)
    for p in CANONICAL:
        graph = p().run(graph, Context())
    return graph, DECLARED[name](model)


@pytest.mark.parametrize("name", FEW)
def test_the_blocks_are_those_the_config_declares(name: str) -> None:
    graph, declared = _canonical(name)
    assert differences(declared, graph) == []
    assert declared.ffn > 0


def test_a_wrong_declaration_is_said_in_words() -> None:
    graph, _ = _canonical("bert")
    said = differences(Declared(3, heads=8, norm="pre-norm", ffn=2, hidden=64, experts=4), graph)
    assert said == [
        "3 attention blocks declared, 2 found",
        "heads: declared 8, found 4 in 2 of 2 blocks",
        "norm: declared pre-norm, found post-norm in 4 of 4 blocks",
        "experts: declared 4, found None in 1 of 1 blocks",
    ]


def test_every_text_model_is_declared() -> None:
    families = ("encoder", "decoder", "encoder-decoder", "audio")
    missing = [a.name for a in find_architectures(list(families)) if a.declares is None]
    assert missing == ["deberta_v2"]  # its scores add terms gathered from other products: no attention block in the sense of ir/blocks
