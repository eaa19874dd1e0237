"""Every absorber there is: random factors and shifts leave the function, powers of two leave every bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks.edges import edges
from rewright.ir.evaluate import op_name
from rewright.ir.graph import Graph
from rewright.passes.fusion.add_layer_norm import FuseAddLayerNorm
from rewright.passes.fusion.add_rms_norm import FuseAddRMSNorm
from rewright.passes.outliers.migrate import migrate

from .migrations import (
    IDS,
    IMAGE,
    Attention,
    C,
    Embedded,
    Experts,
    Function,
    Gated,
    Migrated,
    OnePlus,
    Parallel,
    PostNorm,
    Residual,
    X,
    canonical,
    image_norm,
    migrate_all,
    numbers,
)

BOUND = 2e-6  # relative, the largest seen is 7e-7

Row = tuple[Callable[[], nn.Module], Tensor, str, str, str]
# what makes X -> module, input, site, kinds of the absorbers of a factor, of a shift ("" for none)
ABSORBERS: dict[str, Row] = {
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 8)), X, "norm-linear", "norm", "norm"),
    "layer norm without weights": (lambda: nn.Sequential(nn.LayerNorm(C, elementwise_affine=False), nn.Linear(C, 8, False)), X, "norm-linear", "norm", "norm"),
    "layer norm without bias": (lambda: nn.Sequential(nn.LayerNorm(C, bias=False), nn.Linear(C, 8)), X, "norm-linear", "norm", "norm"),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(C, eps=1e-6), nn.Linear(C, 8)), X, "norm-linear", "norm", ""),
    "Gemma's 1 + w": (OnePlus, X, "norm-linear", "norm", ""),
    "linear": (lambda: nn.Sequential(nn.Linear(C, C), nn.Linear(C, 8)), X, "linear-relu-linear", "linear", "linear"),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(C, C, False), nn.Linear(C, 8, False)), X, "linear-relu-linear", "linear", "linear"),
    "relu": (lambda: Function(F.relu), X, "linear-relu-linear", "linear", ""),
    "leaky relu": (lambda: Function(F.leaky_relu), X, "linear-relu-linear", "linear", ""),
    "abs": (lambda: Function(torch.abs), X, "linear-relu-linear", "linear", ""),
    "dropout": (lambda: nn.Sequential(nn.Linear(C, C), nn.Dropout(), nn.Linear(C, 8)), X, "linear-relu-linear", "linear", "linear"),
    "mean over tokens": (lambda: Function(lambda x: x.mean(1)), X, "linear-relu-linear", "linear", "linear"),
    "sum over tokens": (lambda: Function(lambda x: x.sum(1)), X, "other", "linear", ""),
    "times a number": (lambda: Function(lambda x: x * 3.0), X, "linear-relu-linear", "linear", "linear"),
    "over a number": (lambda: Function(lambda x: x / 3.0), X, "linear-relu-linear", "linear", "linear"),
    "LayerScale": (lambda: Function(lambda x, c: x * c, 1), X, "linear-relu-linear", "constant", "linear"),
    "constant sum": (lambda: Function(lambda x, c: c + x, 1), X, "linear-relu-linear", "constant linear", "constant"),
    "constant difference": (lambda: Function(lambda x, c: x - c, 1), X, "linear-relu-linear", "constant linear", "constant"),
    "LayerScale of a sum": (lambda: Function(lambda x, c, d: (x + c) * d, 2), X, "linear-relu-linear", "constant", "constant"),
    "v through attention": (Attention, X, "value-output", "linear", "linear"),
    "v of 2 key heads of 8": (lambda: Attention(kv=2), X, "value-output", "linear", "linear"),
    "v without bias": (lambda: Attention(kv=2, bias=False), X, "value-output", "linear", "linear"),
    "v in timm's [3, heads, dim]": (lambda: Attention(fused="thirds"), X, "value-output", "linear", "linear"),
    "v in GPT-NeoX's [heads, 3, dim]": (lambda: Attention(fused="heads"), X, "value-output", "linear", "linear"),
    "up through the gate": (Gated, X, "up-down", "linear", ""),
    "up packed with the gate": (lambda: Gated(packed=True), X, "up-down", "linear", ""),
    "embedding": (Embedded, IDS, "linear-relu-linear", "embedding", "embedding"),
    "words and positions": (lambda: Embedded(True), IDS, "other", "embedding embedding", "embedding"),
    "batch norm": (lambda: image_norm(nn.BatchNorm2d(C)), IMAGE, "norm-linear", "norm", ""),
    "batch norm alone": (lambda: nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, 8, 1)), IMAGE, "norm-linear", "norm", "norm"),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(4, C), nn.Conv2d(C, 8, 3)), IMAGE, "norm-linear", "norm", "norm"),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(C, C, 3), nn.MaxPool2d(2), nn.Conv2d(C, 8, 1)), IMAGE, "linear-relu-linear", "convolution", "convolution"),
    "depthwise convolution": (
        lambda: nn.Sequential(nn.Conv2d(C, C, 3, groups=C, bias=False), nn.Conv2d(C, 8, 1)),
        IMAGE,
        "linear-relu-linear",
        "convolution",
        "convolution",
    ),
}


def check(done: Migrated, powers: Migrated) -> None:
    assert done.error < BOUND
    assert powers.bit_equal
    assert done.done


@pytest.mark.parametrize("name", ABSORBERS)
def test_absorbers_take_factors_and_shifts(name: str) -> None:
    make, x, site, scale_into, shift_into = ABSORBERS[name]
    graph = canonical(make(), x)
    done, powers = migrate_all(graph, x), migrate_all(graph, x, powers=True)
    check(done, powers)
    edge, _, shifted = next(d for d in done.done if d[0].site == site)
    assert " ".join(sorted(a.kind for a in edge.scale_into)) == scale_into  # type: ignore[union-attr]
    assert shifted == bool(shift_into)
    if shift_into:
        assert " ".join(a.kind for a in edge.shift_into) == shift_into  # type: ignore[union-attr]
    assert [n.target for n in done.graph.nodes] == [n.target for n in graph.nodes], "nothing is computed that was not before"


@pytest.mark.parametrize(("norm", "fusion", "shifted"), [(nn.LayerNorm(C), FuseAddLayerNorm(), True), (nn.RMSNorm(C, eps=1e-6), FuseAddRMSNorm(), False)])
def test_fused_residual_norms(norm: nn.Module, fusion, shifted: bool) -> None:
    graph = canonical(Residual(norm), X, then=(fusion,))
    done = migrate_all(graph, X)
    check(done, migrate_all(graph, X, powers=True))
    assert [(e.site, s) for e, _, s in done.done] == [("norm-linear", shifted)]


def test_one_norm_in_front_of_attention_and_feed_forward_gets_one_scale() -> None:
    graph = canonical(Parallel(), X)
    done = migrate_all(graph, X)
    check(done, migrate_all(graph, X, powers=True))
    assert [(e.site, len(e.linears)) for e, *_ in done.done] == [("norm-linear", 2), ("value-output", 1), ("linear-relu-linear", 1)]


def test_the_router_and_all_experts_share_the_norms_scale() -> None:
    graph = canonical(Experts(), X)
    done = migrate_all(graph, X)
    check(done, migrate_all(graph, X, powers=True))
    assert [(e.site, len(e.linears), s) for e, _, s in done.done] == [("norm-linear", 2, False), ("up-down", 1, False)]
    assert done.done[0][0].no_shift is not None
    assert "have no bias that could give a shift back" in done.done[0][0].no_shift


@pytest.mark.parametrize("explicit", ["linear", "restore"])
def test_post_norm_feeds_the_residual_sum_as_well(explicit) -> None:
    graph = canonical(PostNorm(), X)
    done = migrate_all(graph, X, explicit=explicit)
    check(done, migrate_all(graph, X, explicit=explicit, powers=True))
    before, after = ([op_name(n) for n in g.nodes] for g in (graph, done.graph))
    added = {op: after.count(op) - before.count(op) for op in ("sub", "mul", "add", "layer_norm")}
    if explicit == "linear":  # both norms and GELU, an operation each for all its linears; v takes both
        assert added == {"sub": 3, "mul": 3, "add": 0, "layer_norm": 0}
        assert len(done.done) == 4
    else:  # two norms restored for the sums, whose other operands' biases take the shift
        assert added == {"sub": 0, "mul": 2, "add": 0, "layer_norm": 0}
        assert [e.site for e, *_ in done.done] == ["norm-linear", "value-output", "norm-linear"]


def test_a_restored_output_of_the_model_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return y, self.head(y[:, 0])

    graph = canonical(Both(), X)
    check(migrate_all(graph, X, explicit="restore"), migrate_all(graph, X, explicit="restore", powers=True))
    check(migrate_all(graph, X, explicit="linear"), migrate_all(graph, X, explicit="linear", powers=True))


def test_an_rms_norm_takes_the_factor_and_leaves_the_shift_to_an_op() -> None:
    graph = canonical(nn.Sequential(nn.RMSNorm(C, eps=1e-6), nn.Linear(C, 8)), X)
    done = migrate_all(graph, X, explicit="linear")
    check(done, migrate_all(graph, X, explicit="linear", powers=True))
    assert [str(n.target) for n in done.graph.nodes] == ["rewright.rms_norm.default", "aten.sub.Tensor", "aten.linear.default"]


def test_gelu_keeps_its_input_and_gets_one_operation_behind() -> None:
    graph = canonical(Function(F.gelu), X)
    done = migrate_all(graph, X, explicit="linear")
    check(done, migrate_all(graph, X, explicit="linear", powers=True))
    assert [op_name(n) for n in done.graph.nodes] == ["linear", "gelu", "sub", "mul", "linear"]
    again = migrate_all(done.graph, X)  # the constants it put there absorb the next one
    check(again, migrate_all(done.graph, X, powers=True))
    assert len(again.graph.nodes) == len(done.graph.nodes)


def test_weights_are_folded_in_float64() -> None:
    graph = canonical(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 8)), X)
    (edge,) = edges(graph)
    s, z = numbers(edge, 0, False)
    old = {n: w.double() for n, w in graph.weights().items()}
    migrate(graph, edge, s, z)
    graph.clean()
    new = {n.removesuffix("_migrated"): w for n, w in graph.weights().items()}
    assert torch.equal(new["0.weight"], (old["0.weight"] / s).float())
    assert torch.equal(new["0.bias"], ((old["0.bias"] - z) / s).float())
    assert torch.equal(new["1.bias"], (old["1.bias"] + old["1.weight"] @ z).float())
    assert (new["1.weight"] - old["1.weight"] * s).abs().max() < 1e-6
    assert all(w.dtype == torch.float32 for w in new.values())


def test_a_factor_makes_no_bias() -> None:
    graph = canonical(nn.Sequential(nn.Linear(C, C, False), nn.Linear(C, 8, False)), X)
    assert len(migrate_all(graph, X, powers=True).graph.weights()) == 2
    assert len(migrate_all(graph, X).graph.weights()) == 4


def test_scales_are_kept_within_bounds() -> None:
    graph = canonical(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 8)), X)
    (edge,) = edges(graph)
    old = graph.weight("0.weight").detach().clone()
    migrate(graph, edge, torch.tensor([1e-9, 1e9] * 8))
    assert torch.allclose(graph.weight("0.weight_migrated") / old, torch.tensor([1e4, 1e-4] * 8))


def test_half_precision_stays_and_powers_of_two_are_exact_in_it() -> None:
    x = X.bfloat16()
    graph = canonical(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 8)).bfloat16(), x)
    assert migrate_all(graph, x, powers=True).bit_equal
    assert {w.dtype for w in migrate_all(graph, x).graph.weights().values()} == {torch.bfloat16}


def test_a_graph_without_weights_is_filled_later() -> None:
    def graph(device: str) -> Graph:
        torch.manual_seed(0)
        return canonical(nn.Sequential(nn.LayerNorm(C), Attention(kv=2), Gated()).to(device), X.to(device))

    real, empty = graph("cpu"), graph("meta")
    stored = {n: w.detach().clone() for n, w in real.weights().items()}
    for g in (real, empty):
        for i, edge in enumerate(edges(g)):
            s, _ = numbers(edge, i, False)
            migrate(g, edge, s.index_select(0, edge.ties) if edge.site == "value-output" else s)
        g.clean()
    empty.materialize(stored)
    empty.recompile()
    with torch.no_grad():
        assert torch.equal(real(X), empty(X))
