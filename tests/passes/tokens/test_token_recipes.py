"""The shipped recipes that merge tokens, on models they are for: all passes apply, answers stay, onnxruntime runs the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rewright as rw
from rewright.backends.onnx.session import Session
from rewright.ir.cost import cost
from rewright.tools.models import Loaded, load_model

from .twins import Dense

torch.set_num_threads(1)
ours = torch.ops.rewright


@pytest.mark.parametrize(("recipe", "ratio", "left"), [("vit-2x", 2.0, 7), pytest.param("vit-half-tokens", 1.3, 33, marks=pytest.mark.slow)])
def test_a_vision_transformer_gets_as_much_faster_as_the_recipe_says(recipe: str, ratio: float, left: int, tmp_path: Path) -> None:
    model = load_model("zoo:digits-vit")
    result = rw.optimize(Loaded(model.name, model.graph, model.inputs[:5]), recipe=recipe)
    assert not result.outcome.undone
    assert {r.name: r.applied for r in result.records if not r.canonical} == {"token-merging": 6, "fuse-add-layer-norm": 6, "pack-heads": 6}
    assert cost(model.graph).flops / cost(result.graph).flops > ratio
    assert int(result.graph.find(ours.token_merge.default)[-1].meta["val"][0].shape[1]) == left
    result.export(tmp_path / "model.onnx")
    flat = model.inputs[-1]
    ran, reference = Session(tmp_path / "model.onnx")(flat)[0], model.graph.run(flat)[0]
    assert (ran.argmax(-1) == reference.argmax(-1)).all()
    assert torch.allclose(ran, result.graph.run(flat)[0], atol=1e-4)


def test_a_dense_head_gets_a_row_for_every_place_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 128, 128)
    graph = rw.capture(Dense(128).eval(), (image,))
    result = rw.optimize(graph, (image,), recipe="segmentation-unmerge", verify=False)
    merged = [n.args[1] for n in result.graph.find(ours.token_match.default)]
    assert len(merged) == 2 and sum(merged) == 29  # 45 % of 65, at the first and the second of three layers
    assert len(result.graph.find(ours.token_take.default)) == 1
    result.export(tmp_path / "model.onnx")
    found = Session(tmp_path / "model.onnx")((image,))[0]
    assert found.shape == (2, 5, 8, 8)
    assert torch.allclose(found, result.graph.run((image,))[0], atol=1e-3, rtol=1e-3)
