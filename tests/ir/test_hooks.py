"""Capture hooks: each gives the library's own numbers, makes one trace hold for all sizes, and is gone after the capture."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from rewright.ir.capture import capture
from rewright.ir.errors import CaptureError
from rewright.ir.graph import Graph
from rewright.ir.hooks import HOOKS, hooks_in_place
from rewright.tools.architectures import find_architectures

torch.set_num_threads(1)
ours = torch.ops.rewright


def captured(name: str) -> tuple[nn.Module, Graph, Callable[[int, int], dict[str, Tensor]]]:
    [architecture] = find_architectures([name])
    model = architecture.build()
    inputs = lambda b, size: architecture.inputs(model, b, size)  # noqa: E731
    return model, capture(model, (), inputs(*architecture.shapes[0]), architecture.dynamic), inputs


def error(model: nn.Module, graph: Graph, inputs: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        expected, found = model(**inputs)[0], graph(**inputs)[0]
    assert expected.shape == found.shape
    return ((expected - found).abs().max() / expected.abs().max()).item()


def _place(hook: Any) -> tuple[Any, str]:
    owner, _, leaf = hook.name.rpartition(".")
    module = import_module(hook.module)
    return (getattr(module, owner) if owner else module), leaf


@pytest.mark.parametrize("hook", HOOKS, ids=lambda h: f"{h.module.rpartition('.')[2]}.{h.name}")
def test_a_hook_stands_where_its_library_calls_it_and_is_gone_after(hook: Any) -> None:
    place, leaf = _place(hook)
    assert leaf in vars(place) or hasattr(builtins, leaf)
    before = vars(place).get(leaf)
    with hooks_in_place():
        assert vars(place)[leaf] is not before
    assert vars(place).get(leaf) is before


@pytest.mark.parametrize("hook", [h for h in HOOKS if h.name == "mamba_selective_scan"], ids=lambda h: h.module.rpartition(".")[2])
@pytest.mark.parametrize("full", [True, False])
def test_the_scan_of_every_mamba_is_bit_equal_to_its_librarys(hook: Any, full: bool) -> None:
    place, leaf = _place(hook)
    original = vars(place)[leaf]
    generator = torch.Generator().manual_seed(0)
    x, dt, z = (torch.randn(2, 6, 9, generator=generator) for _ in range(3))
    a = -torch.rand(6, 4, generator=generator)
    b, c = (torch.randn(2, 4, 9, generator=generator) for _ in range(2))
    more = {"D": a[:, 0], "z": z, "delta_bias": a[:, 1], "delta_softplus": True} if full else {}
    assert torch.equal(hook.stand_in(original)(x, dt, a, b, c, **more), original(x, dt, a, b, c, **more))


def test_hooks_are_gone_after_a_capture_that_failed() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    places = [(*_place(h), vars(_place(h)[0]).get(_place(h)[1])) for h in HOOKS]
    with pytest.raises(CaptureError):
        capture(Branches(), torch.randn(2, 3))
    assert all(vars(place).get(leaf) is before for place, leaf, before in places)


def test_mambas_scan_is_one_node_a_layer_and_its_length_is_dynamic() -> None:
    model, graph, inputs = captured("mamba")
    assert len(graph.find(ours.selective_scan.default)) == 2
    assert len(graph.nodes) < 200
    for b, s in ((2, 16), (3, 5), (1, 1), (1, 40)):
        assert error(model, graph, inputs(b, s)) == 0


def test_mamba2_runs_at_lengths_that_fill_their_chunks_and_at_others() -> None:
    model, graph, inputs = captured("mamba2")
    for b, s in ((2, 16), (3, 24), (2, 7), (1, 13), (1, 40)):  # chunks of 8
        assert error(model, graph, inputs(b, s)) < 1e-6


def test_llava_takes_any_number_of_images() -> None:
    model, graph, inputs = captured("llava")
    for b in (1, 2, 5):
        assert error(model, graph, inputs(b, 9)) == 0


def test_qwen2_vl_keeps_images_of_any_number_and_size_apart() -> None:
    model, graph, inputs = captured("qwen2_vl_vision")
    for b in (1, 2, 5):
        assert error(model, graph, inputs(b, 0)) < 1e-6
    three = inputs(3, 0)
    one = three["cu_seqlens"].clone()
    one[1:-1] = 0  # all patches of one image: attention must differ
    assert error(model, graph, {**three, "cu_seqlens": one[[0, -1]]}) < 1e-6
    with torch.no_grad():
        apart, together = (graph(**{**three, "cu_seqlens": c})[0] for c in (three["cu_seqlens"], one[[0, -1]]))
    assert (apart - together).abs().max() > 1e-2


def test_experts_of_transformers_become_our_grouped_linear() -> None:
    _, graph, _ = captured("mixtral")
    assert len(graph.find(ours.grouped_linear.default)) == 4  # gate-up and down of two layers
    assert not [n for n in graph.nodes if "transformers" in str(n.target)]
