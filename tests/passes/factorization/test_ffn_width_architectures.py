"""Hidden channels leave the feed-forward blocks of small models of the usual families: exactly those, from every place that counts them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewright.backends.onnx.export import export
from rewright.ir.blocks import ffn_blocks
from rewright.ir.capture import capture
from rewright.ir.errors import UsageError
from rewright.ir.graph import Flat, Graph
from rewright.ir.reexport import re_export
from rewright.ir.verify import check_structure
from rewright.passes.cleanup import CANONICAL
from rewright.passes.factorization.ffn_width import FFNWidth
from rewright.passes.pipeline import Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration
from rewright.tools.architectures import find_architectures

from .narrowed import mask_file, narrowable, random_masks, silenced

torch.set_num_threads(1)
pytest.importorskip("transformers")

# name -> kinds of its blocks, and how many can be narrowed
NAMES = {
    "gpt2": ("plain", 2),
    "llama": ("gated", 2),
    "phi3": ("fused gated", 2),
    "t5": ("plain", 4),
    "gemma2": ("gated", 2),
    "mixtral": ("fused gated", 2),
    "vit": ("plain", 2),
    "clip": ("plain", 4),
}


@cache
def program(name: str) -> tuple[Graph, list[Flat]]:
    """A canonical graph, and inputs of several sizes."""
    (architecture,) = find_architectures([name])
    try:
        model = architecture.build()
    except UsageError as error:
        pytest.skip(str(error))
    inputs = [architecture.inputs(model, b, size) for b, size in architecture.shapes]
    graph = capture(model, (), inputs[0], architecture.dynamic)
    for p in CANONICAL:
        graph = p().run(graph, Context())
    graph.canonical = True
    return graph, [graph.flat_inputs((), i) for i in inputs]


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_of_the_channels_computes_what_it_did(name: str, tmp_path: Path) -> None:
    graph, flats = program(name)
    kind, count = NAMES[name]
    assert {b.kind for b in ffn_blocks(graph)} == {kind}
    assert len(narrowable(graph)) == count
    masks = random_masks(graph, 0.5)
    outcome = Pipeline([FFNWidth(selection="mask", mask=mask_file(masks, tmp_path), refit="none")]).run(graph, flats[:1])
    record = outcome.records[-1]
    assert (record.applied, record.declined, record.undone) == (count, [], None)
    assert [b.hidden for b in ffn_blocks(outcome.graph)] == [b.hidden // 2 for b in ffn_blocks(graph)]
    assert [b.kind for b in ffn_blocks(outcome.graph)] == [kind] * count
    want = silenced(graph, masks)
    for flat in flats:  # batch 1 and other sizes
        for a, b in zip(want.run(flat), outcome.graph.run(flat), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    check_structure(outcome.graph, graph)
    shapes = [str(n.meta["val"]) for n in outcome.graph.nodes]
    outcome.graph.propagate()
    assert [str(n.meta["val"]) for n in outcome.graph.nodes] == shapes


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "vit"])
def test_the_result_exports_again_with_its_dynamic_sizes(name: str, tmp_path: Path) -> None:
    graph, flats = program(name)
    outcome = Pipeline([FFNWidth(ratio=0.5, allocation="uniform")], calibration=Calibration(flats[:1])).run(graph, flats[:1])
    assert outcome.records[-1].applied == NAMES[name][1]
    again = re_export(outcome.graph, flats[0]).module(check_guards=False)
    for flat in flats[1:]:
        got = [y for y in pytree.tree_leaves(again(**dict(zip(graph.call.names, flat)))) if isinstance(y, Tensor)]
        for a, b in zip(outcome.graph.run(flat), got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "phi3", "clip"])
def test_the_file_for_onnxruntime_agrees_and_has_standard_ops_only(name: str, tmp_path: Path) -> None:
    graph, flats = program(name)
    outcome = Pipeline([FFNWidth(ratio=0.5, allocation="uniform")], calibration=Calibration(flats[:1])).run(graph, flats[:1])
    done = export(outcome.graph, tmp_path / "m.onnx", flats[:1], "pure")
    assert done.parity is not None
    assert done.parity.relative_error < 1e-5
    assert {n.domain for n in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}
