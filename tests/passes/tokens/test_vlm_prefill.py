"""The recipe vlm-prefill on a LLaVA as transformers has it (random weights): found without being told where the image is, close, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx.session import Session
from rewright.ir.capture import capture
from rewright.ir.cost import cost
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.recipe import Recipe
from rewright.passes.rewrite import Context
from rewright.passes.tokens.visual_token_pruning import VisualTokenPruning
from rewright.tools.optimize import optimize

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SYSTEM, IMAGE, TEXT = 4, 36, 6


def llava(layers: int) -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**small, "num_hidden_layers": 1, "image_size": 24, "patch_size": 4, "projection_dim": 16, "model_type": "clip_vision_model"}
    text = {**small, "num_hidden_layers": layers, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "model_type": "llama"}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)).eval()


class Prefill(nn.Module):
    """The last token's logits, and with `caches` the keys and values of all layers."""

    def __init__(self, model: nn.Module, caches: bool) -> None:
        super().__init__()
        self.model, self.caches = model, caches

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=self.caches, logits_to_keep=1)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))) if self.caches else (out.logits,)


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (2, SYSTEM + IMAGE + TEXT), generator=generator)
    ids[:, SYSTEM : SYSTEM + IMAGE] = 99
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}


def captured(caches: bool, layers: int) -> Graph:
    return capture(Prefill(llava(layers), caches), (), given(), {name: {0: "batch"} for name in given()})


def test_the_recipe_prunes_llava_and_exports_it(tmp_path: Path) -> None:
    graph = captured(caches=False, layers=6)
    result = optimize(graph, given(), recipe="vlm-prefill")
    assert not result.outcome.undone
    assert [(r.name, r.applied) for r in result.records if not r.canonical] == [
        ("visual-token-pruning", 2),
        ("fuse-add-layer-norm", 0),
        ("fuse-add-rms-norm", 10),
        ("pack-heads", 0),
    ]
    assert "of 36 image tokens 20 from layer 2 on, 9 from layer 3 on" in result.graph.notes[-1]
    assert result.verification["cosine"] > 0.95
    assert cost(result.graph).flops < 0.7 * cost(result.outcome.original).flops
    result.export(tmp_path / "model.onnx")
    flat = result.graph.flat_inputs((), given())
    assert (Session(tmp_path / "model.onnx")(flat)[0] - result.graph.run(flat)[0]).abs().max() < 1e-5


def test_llavas_cached_keys_and_values_lose_the_same_tokens_however_the_image_is_found() -> None:
    graph = captured(caches=True, layers=4)
    for step in CANONICAL:
        graph = step().run(graph, Context())
    stages = ((2, 0.5), (3, 0.25))
    found, told = (VisualTokenPruning(stages=stages, image_span=span).run(graph.clone(), Context()) for span in (None, (SYSTEM, IMAGE)))
    flat = graph.flat_inputs((), given())
    one, other = found.run(flat), told.run(flat)
    assert [k.shape[2] for k in one[1::2]] == [46, 46, 30, 19]
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert all(torch.equal(a, b) for a, b in zip(graph.run(flat)[1:5], one[1:5]))  # the first two layers saw all tokens


def test_its_options_are_read_from_a_recipe_and_written_back() -> None:
    text = '[[pass]]\nname = "visual-token-pruning"\nstages = [[8, 0.5], [16, 0.25]]\nimage_span = [35, 576]\nsigmoid = [0.1, 8, 0.5]\n'
    with pytest.raises(Exception, match="sigmoid gives a share to every layer"):
        Recipe.parse(text)
    recipe = Recipe.parse(text[: text.index("sigmoid")])
    assert recipe.passes[0] == VisualTokenPruning(stages=((8, 0.5), (16, 0.25)), image_span=(35, 576))
    assert Recipe.parse(recipe.to_toml()).passes == recipe.passes
