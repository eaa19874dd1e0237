"""Channels in order of size: the same function, groups alike, smaller errors in groups; a refusal for each reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.errors import UsageError
from rewright.ir.formats import WEIGHTS, fake_quantize
from rewright.ir.graph import Flat, Graph
from rewright.passes.outliers.sort_channels import SortChannels
from rewright.passes.pipeline import Pipeline
from rewright.passes.rewrite import Context
from rewright.passes.statistics import Calibration

from ...ir.block_models import Attention, Block, Gated, Plain, canonical
from .rotation_models import edited, error, ids, language_model, moved, only

torch.set_num_threads(1)
aten = torch.ops.aten
ORDER = 1e-6  # the sums are the same, in another order


def _sorted(graph: Graph, step: SortChannels, flat: Flat) -> tuple[Graph, Context]:
    statistics = Calibration([flat]).gather(graph, step.requests(graph)) if step.requires else None
    return edited(graph, step, Context(statistics=statistics))


@cache
def _with(ffn: str, kv: int = 2) -> Graph:
    return language_model(Block("pre-norm", Attention(kv), Plain() if ffn == "plain" else Gated(fused=ffn == "fused gated")))


@pytest.mark.parametrize("by", ["absmax", "norm", "weight"])
@pytest.mark.parametrize("ffn", ["plain", "gated", "fused gated"])
def test_the_function_stays(ffn: str, by: str) -> None:
    after, log = _sorted(_with(ffn), SortChannels(("hidden", "values", "keys"), by), ids())  # type: ignore[arg-type]
    assert len(log.applied) == 3
    assert error(_with(ffn), after, ids()) <= ORDER


def _inputs(graph: Graph, path: str, flat: Flat) -> Tensor:
    """What the linear layer of that path reads."""
    seen: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            if n.target is aten.linear.default and n.meta["path"] == path:
                seen.append(self.env[n.args[0]])  # type: ignore[index]
            return super().run_node(n)

    with torch.no_grad():
        Watch(graph.module).run(*flat, enable_io_processing=False)
    return seen[0]


def test_hidden_channels_come_largest_first() -> None:
    after, _ = _sorted(_with("gated"), SortChannels(("hidden",)), ids())
    before, now = (_inputs(g, "layers.0.ffn.down", ids()).abs().amax((0, 1)) for g in (_with("gated"), after))
    assert torch.allclose(now, before.sort(descending=True).values, rtol=1e-4)


def test_value_channels_come_largest_first_in_every_head_of_a_group() -> None:
    after, _ = _sorted(_with("gated"), SortChannels(("values",)), ids())
    size = _inputs(after, "layers.0.attention.o", ids()).abs().amax((0, 1)).view(2, 2, 8).amax(1)  # [kv heads, channels]
    assert torch.equal(size, size.sort(dim=1, descending=True).values)


def test_a_sorted_graph_is_left_alone() -> None:
    step = SortChannels(("hidden", "values", "keys"), "norm")
    after, _ = _sorted(_with("plain"), step, ids())
    again, log = edited(after, step)
    assert only(log) == "its channels are in order already"
    assert again.weights().keys() == after.weights().keys()


def test_the_pipeline_gathers_what_it_needs_and_nothing_for_weights() -> None:
    outcome = Pipeline([SortChannels()], calibration=Calibration([ids()])).run(_with("plain"), [ids(2)])
    assert [(r.applied, r.undone) for r in outcome.records[-1:]] == [(2, None)]
    outcome = Pipeline([SortChannels(by="norm")]).run(_with("plain"), [ids(2)])
    assert [(r.applied, r.undone) for r in outcome.records[-1:]] == [(2, None)]


# -- what it is for -------------------------------------------------------------------------------------------------


def _heavy_tailed() -> tuple[Graph, Flat]:
    """A feed-forward layer whose hidden channels differ by a factor of a hundred in size, at random places."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(x)))

    torch.manual_seed(0)
    model = Model().eval()
    size = torch.logspace(-1, 1, 128)[torch.randperm(128)]
    with torch.no_grad():
        model.up.weight.mul_(size[:, None])
        model.down.weight.mul_(size[torch.randperm(128)])
    x = torch.randn(4, 16, 32)
    return canonical(model, x), (x,)


def test_halves_of_a_sorted_layer_have_ranges_of_their_own() -> None:
    graph, flat = _heavy_tailed()
    after, _ = _sorted(graph, SortChannels(("hidden",)), flat)
    before, now = (_inputs(g, "down", flat).abs().amax((0, 1)).view(2, 64).amax(1) for g in (graph, after))
    assert float(before.max() / before.min()) < 2
    assert float(now[0] / now[1]) > 4


def _group_error(graph: Graph, flat: Flat) -> float:
    """Relative error of the layer's output with int4 weights that share a scale by 32 input channels."""
    x = _inputs(graph, "down", flat).reshape(-1, 128)
    (down,) = (n for n in graph.find(aten.linear.default) if n.meta["path"] == "down")
    w = graph.weight(down.args[1]).detach()  # type: ignore[arg-type]
    y = x @ w.T
    return float((x @ fake_quantize(w, WEIGHTS["int4-group"], 32).T - y).norm() / y.norm())


def test_int4_groups_of_sorted_weights_lose_less() -> None:
    graph, flat = _heavy_tailed()
    after, _ = _sorted(graph, SortChannels(("hidden",), "weight"), flat)
    assert _group_error(after, flat) < 0.8 * _group_error(graph, flat)


def test_norms_of_rows_estimate_the_size_of_activations() -> None:
    graph, flat = _heavy_tailed()
    after, _ = _sorted(graph, SortChannels(("hidden",), "norm"), flat)
    size = after.weight("up.weight_sorted").norm(dim=1)
    assert torch.equal(size, size.sort(descending=True).values)
    ranges = _inputs(after, "down", flat).abs().amax((0, 1)).view(2, 64).amax(1)
    assert float(ranges[0] / ranges[1]) > 4


# -- keys and RoPE --------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """4 query heads of 8 on 2 key heads; half-split RoPE with stored tables (six places) or computed from given places."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)
        frequency = 10.0 ** -torch.arange(4.0).div(4)
        angle = torch.arange(6.0)[:, None] * frequency.repeat(2)
        self.register_buffer("frequency", frequency)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        cos, sin = self.cos, self.sin
        if places is not None:
            angle = places[:, None] * self.frequency.repeat(2)  # type: ignore[operator]
            cos, sin = angle.cos(), angle.sin()
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_keys_with_stored_cosines_move_in_pairs_and_the_tables_along() -> None:
    flat = (torch.randn(2, 6, 32),)
    graph = canonical(moved(Rotary()), *flat)
    after, log = _sorted(graph, SortChannels(("keys",)), flat)
    assert len(log.applied) == 1
    assert error(graph, after, flat) <= ORDER
    assert {"cos_sorted", "sin_sorted", "k.weight_sorted", "k.bias_sorted", "q.weight_sorted", "q.bias_sorted"} == {
        n for n in after.weights() if "_sorted" in n
    }


def test_keys_are_sorted_by_the_norm_of_their_rows() -> None:
    flat = (torch.randn(2, 6, 32),)
    after, _ = _sorted(canonical(moved(Rotary()), *flat), SortChannels(("keys",), "norm"), flat)
    size = after.weight("k.weight_sorted").norm(dim=1).view(2, 2, 4).amax((0, 1))  # heads, halves, pairs
    assert torch.equal(size, size.sort(descending=True).values)


def test_declines_keys_whose_cosines_are_computed() -> None:
    flat = (torch.randn(2, 6, 32), torch.arange(6.0))
    _, log = _sorted(canonical(moved(Rotary()), *flat), SortChannels(("keys",), "norm"), flat)
    assert only(log).startswith("its cosines and sines are computed (")


def test_declines_keys_with_a_norm() -> None:
    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(self.norm(q), self.norm(k), v).transpose(1, 2).flatten(2))

    graph = language_model(Block("pre-norm", Normed(), Plain()))
    _, log = edited(graph, SortChannels(("keys",), "norm"))
    assert only(log) == "layers.0.attention.norm stands between layers.0.attention.q and the attention (norm)"


# -- refusals -------------------------------------------------------------------------------------------------------


def test_declines_hidden_channels_that_something_else_reads() -> None:
    class Read(Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(x))
            return self.down(h) + h.sum(-1, keepdim=True) * x

    _, log = edited(language_model(Block("pre-norm", Attention(), Read())), SortChannels(("hidden",), "norm"))
    assert only(log) == "the activation's result has 2 readers"


def test_declines_a_constant_that_differs_by_channel() -> None:
    class Shifted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)) * self.shift)

    _, log = edited(language_model(Block("pre-norm", Attention(), Shifted())), SortChannels(("hidden",), "norm"))
    assert only(log) == "layers.0.ffn.shift differs by channel between layers.0.ffn.up and layers.0.ffn.down"


def test_declines_weights_without_data_unless_sorted_by_statistics() -> None:
    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = Plain()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.ffn(x)

    torch.manual_seed(0)
    model, x = Feed(), torch.randn(2, 5, 32)
    real, state = canonical(model, x), {k: v.clone() for k, v in model.state_dict().items()}
    empty = canonical(model.to("meta"), x.to("meta"))
    _, log = edited(empty, SortChannels(("hidden",), "norm"))
    assert only(log) == "its weights have no data to be measured; sort by absmax"
    step = SortChannels(("hidden",))
    statistics = Calibration([(x,)], weights=state).gather(empty, step.requests(empty))
    filled, _ = edited(empty, step, Context(statistics=statistics))
    filled.materialize(state)
    assert error(_sorted(real, step, (x,))[0], filled, (x,)) == 0


def test_unknown_options_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no site named 'hiden'\. Did you mean hidden\?|no site named 'hiden'"):
        SortChannels(("hiden",))
    with pytest.raises(UsageError, match="channels can't be sorted by 'size'"):
        SortChannels(by="size")  # type: ignore[arg-type]
