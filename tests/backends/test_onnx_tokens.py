"""Token merging in onnxruntime: the same tokens go to the same places as in torch, ties included, by whole rows and without loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewright.backends.onnx.export import Profile, export
from rewright.backends.onnx.session import Session
from rewright.ir.capture import capture
from rewright.ir.graph import Graph

torch.set_num_threads(1)
OPS = torch.ops.rewright


class Twice(nn.Module):
    """Two merges, the second of tokens with sizes; the first tokens copied back to all places; the metric is an input of its own."""

    def __init__(self, energy: bool, mlerp: bool) -> None:
        super().__init__()
        self.op, self.margin, self.mlerp = (OPS.token_match_energy if energy else OPS.token_match), (0.3,) if energy else (), mlerp

    def forward(self, x: Tensor, metric: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        first = self.op(metric, 5, 1, *self.margin, sizes)
        y, total = OPS.token_merge(x, *first, sizes, self.mlerp)
        second = self.op(OPS.token_take(metric, first[0]), 3, 1, *self.margin)
        z, after = OPS.token_merge(y, *second, total, self.mlerp)
        places = OPS.token_places(*second, OPS.token_places(*first))
        return *first, *second, places, y, z, total, after, OPS.token_take(z, places)


EXACT = 7  # the first results are numbers of tokens


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in pairs of equal metrics, two of zeros, whose cosines are exact: ties have no rounding. The first sample ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randint(0, 2, (batch, 11, 16), generator=generator).float().mul(2).sub(1).repeat_interleave(2, 1)[:, :21]
    metric[:, 4:6] = 0
    sizes = torch.randint(1, 5, (batch, 21), generator=generator).float()
    sizes[0, 18:] = 0
    return torch.randn(batch, 21, 24, generator=generator), metric, sizes


def graph(energy: bool, mlerp: bool = False) -> Graph:
    return capture(Twice(energy, mlerp), inputs(2), dynamic_shapes={n: {0: "batch"} for n in ("x", "metric", "sizes")})


@pytest.fixture(scope="module")
def bipartite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    module, path = graph(False), tmp_path_factory.mktemp("tokens") / "m.onnx"
    export(module, path)
    return module, path


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def assert_the_same(module: Graph, path: Path) -> None:
    session = Session(path)
    for batch in range(1, 9):
        flat = inputs(batch, seed=batch)
        for i, (found, expected) in enumerate(zip(session(flat), module.run(flat), strict=True)):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=0 if i < EXACT else 1e-6, atol=0 if i < EXACT else 1e-6)


def test_the_same_tokens_go_to_the_same_places_at_every_batch(bipartite: tuple[Graph, Path]) -> None:
    assert_the_same(*bipartite)


@pytest.mark.parametrize(("profile", "energy", "mlerp"), [("ort", True, False), ("pure", False, True)])
def test_so_they_do_by_energy_and_with_the_largest_norm(tmp_path: Path, profile: Profile, energy: bool, mlerp: bool) -> None:
    module = graph(energy, mlerp)
    export(module, tmp_path / "m.onnx", profile=profile)
    assert_the_same(module, tmp_path / "m.onnx")


class Match(nn.Module):
    def __init__(self, energy: bool) -> None:
        super().__init__()
        self.op = OPS.token_match_energy if energy else OPS.token_match

    def forward(self, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.op(metric, 16, 1)


@pytest.mark.parametrize("energy", [False, True])
def test_the_keys_of_a_vit_are_matched_as_in_torch(tmp_path: Path, energy: bool) -> None:
    torch.manual_seed(0)
    metric = torch.randn(4, 99, 64).repeat_interleave(2, 1)[:, :197]  # 197 tokens, each twice
    metric[1] = torch.randn(197, 64)
    module = capture(Match(energy), metric, dynamic_shapes={"metric": {0: "batch"}})
    export(module, tmp_path / "m.onnx")
    for found, expected in zip(Session(tmp_path / "m.onnx")((metric,)), module.run((metric,)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_twenty_runs_are_the_same_bit_for_bit(bipartite: tuple[Graph, Path], threads: int) -> None:
    session, flat = Session(bipartite[1], threads), inputs(8)
    first = session(flat)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(session(flat), first))


def test_rows_are_moved_whole_without_loops_by_standard_operators(bipartite: tuple[Graph, Path]) -> None:
    nodes = onnx.load(bipartite[1]).graph.node
    assert {node.domain for node in nodes} == {""}
    found = kinds(bipartite[1])
    assert not {"Loop", "Scan", "If", "ScatterElements", "NonZero"} & set(found)
    assert found["ScatterND"] == 4, "sizes and tokens, twice"
    assert found["TopK"] == 6, "two a match, one for places"
    assert found["GatherElements"] == 2 * 2 + 2 + 3, "of numbers alone: sizes, partners, places"


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        heads = tuple(t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
        bias = (heads[0] - 1) @ heads[1].mT
        masked = OPS.attention(*heads, sizes > 1, bias=bias, sizes=sizes)
        return OPS.multi_head_attention(q, k, v, 2, 2, sizes=sizes), OPS.attention(*heads, sizes=sizes), OPS.attention(*heads, bias=bias, sizes=sizes), masked


@pytest.mark.parametrize("profile", ["ort", "pure"])
def test_attention_weighs_keys_by_their_sizes_and_hides_padding(tmp_path: Path, profile: Profile) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 7, 16)
    sizes = torch.randint(1, 4, (2, 7)).float()
    sizes[0, 5:] = 0
    module = capture(Attend(), (q, k, v, sizes), dynamic_shapes={n: {0: "batch"} for n in ("q", "k", "v", "sizes")})
    done = export(module, tmp_path / "m.onnx", [(q, k, v, sizes)], profile)
    assert done.parity is not None and done.parity.relative_error < 1e-6
    assert kinds(tmp_path / "m.onnx")["Attention"] == (4 if profile == "ort" else 0)
    found = Session(tmp_path / "m.onnx")((q, k, v, sizes))[0]
    for b, count in enumerate(sizes.long()):
        repeated = OPS.multi_head_attention(q[b : b + 1], *(t[b : b + 1].repeat_interleave(count, 1) for t in (k, v)), 2, 2)
        torch.testing.assert_close(found[b : b + 1], repeated, rtol=1e-5, atol=1e-6)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *x.sort(dim=1, stable=True), *x.sort(dim=-1, descending=True, stable=True), *x.sort(dim=0, stable=True)


def test_a_stable_sort_keeps_equal_values_in_order(tmp_path: Path) -> None:
    x = torch.randint(3, (4, 9, 6)).float()
    module = capture(Sorted(), x, dynamic_shapes={"x": {0: "batch", 1: "tokens"}})
    export(module, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for values in (x, torch.randint(3, (1, 1, 6)).float(), torch.randint(3, (2, 40, 6)).float()):
        for found, expected in zip(session((values,)), module.run((values,)), strict=True):
            assert torch.equal(found, expected)
