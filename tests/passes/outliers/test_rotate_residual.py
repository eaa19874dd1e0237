"""R1: the same function in another basis, for every kind of writer and reader; outliers gone; a refusal for each reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.graph import Graph
from rewright.passes.fusion.add_rms_norm import FuseAddRMSNorm
from rewright.passes.fusion.merge_linears import MergeLinears
from rewright.passes.outliers.rotate_residual import RotateResidual
from rewright.passes.pipeline import Pipeline

from ...ir.block_models import Attention, Block, Gated, Model, Plain, canonical
from .rotation_models import edited, error, ids, language_model, moved, only

torch.set_num_threads(1)
aten, ours = torch.ops.aten, torch.ops.rewright
PIECE = 1e-5


def _block(norm: str = "pre-norm") -> Block:
    return Block(norm, Attention(kv=2), Gated())


@cache
def _usual(norm: str = "pre-norm", layers: int = 2, tied: bool = False) -> Graph:
    return language_model(*(_block(norm) for _ in range(layers)), tied=tied)


def _rotated(graph: Graph, **options: object) -> Graph:
    after, log = edited(graph, RotateResidual(**options))  # type: ignore[arg-type]
    assert len(log.applied) == 1, log.declined
    return after


# -- the same function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["hadamard", "random"])
def test_layer_norms_become_rms_norms_of_a_centred_stream(matrix: str) -> None:
    graph = _usual()
    after = _rotated(graph, matrix=matrix)
    assert error(graph, after, ids()) <= PIECE
    assert after.find(aten.layer_norm.default) == []
    assert all(bool((after.weight(n.args[1]) == 1).all()) for n in after.find(ours.rms_norm.default))  # type: ignore[arg-type]
    assert len(after.nodes) == len(graph.nodes)
    assert len(after.find(ours.rms_norm.default)) == 5


def test_another_seed_is_another_basis_and_the_same_function() -> None:
    graph = _usual()
    one, two = _rotated(graph), _rotated(graph, seed=7)
    assert not torch.equal(*(g.weight("embed.weight_rotated") for g in (one, two)))
    assert error(one, two, ids()) <= PIECE


def test_a_parallel_block_folds_one_norm_into_both_branches() -> None:
    graph = _usual("parallel")
    assert error(graph, _rotated(graph), ids()) <= PIECE


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (32,), self.weight, 1e-3)


def _with_rms(model: Model) -> Model:
    for owner in [model, *model.layers]:
        for name in ("one", "two", "three", "final"):
            if hasattr(owner, name):
                setattr(owner, name, RMSNorm())
    return model


@cache
def _usual_rms() -> Graph:
    torch.manual_seed(1)
    return canonical(moved(_with_rms(Model(_block(), _block()))))


def test_rms_norms_keep_their_eps_and_the_mean_of_the_stream() -> None:
    graph = _usual_rms()
    after = _rotated(graph)
    assert error(graph, after, ids()) <= PIECE
    assert {n.args[2] for n in after.find(ours.rms_norm.default)} == {1e-3}


class Scaled(Plain):
    """With LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_layer_scale_goes_into_the_weights_before_it() -> None:
    graph = language_model(Block("pre-norm", Attention(), Scaled()))
    after = _rotated(graph)
    assert error(graph, after, ids()) <= PIECE
    assert len(after.nodes) == len(graph.nodes) - 1
    assert not any("scale" in name for name in after.weights())


class Placed(nn.Module):
    """A vision transformer's start: patches by a convolution, a class token, positions; a head on the class token."""

    def __init__(self, pooled: str = "class") -> None:
        super().__init__()
        self.patch, self.cls, self.place = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 5, 32))
        self.block, self.final, self.head = Block("pre-norm", Attention(), Scaled()), nn.LayerNorm(32), nn.Linear(32, 7)
        self.pooled = pooled

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        x = self.final(self.block(x, torch.ones(x.shape[:2])))
        if self.pooled == "values":
            return self.head(x[:, 0]), x
        return (self.head(x[:, 0] if self.pooled == "class" else x.mean(1)),)


@pytest.mark.parametrize("pooled", ["class", "mean"])
def test_a_patch_convolution_a_class_token_and_positions_are_writers(pooled: str) -> None:
    graph = canonical(moved(Placed(pooled)), torch.randn(2, 3, 8, 8))
    after = _rotated(graph, explicit=False)
    assert error(graph, after, (torch.randn(2, 3, 8, 8),)) <= PIECE
    rotated = {name.partition(".")[0].partition("_")[0] for name in after.weights() if name.endswith("_rotated")}
    assert rotated == {"patch", "cls", "place", "block", "head"}


def test_an_output_of_the_model_is_turned_back_and_the_head_folded() -> None:
    graph = canonical(moved(Placed("values")), torch.randn(2, 3, 8, 8))
    after = _rotated(graph)
    assert error(graph, after, (torch.randn(2, 3, 8, 8),)) <= PIECE
    assert len(after.find(aten.linear.default)) == len(graph.find(aten.linear.default)) + 1
    assert "head.weight_rotated" in after.weights()
    assert after.notes[-1] == "rotate-residual: final is turned back by a linear layer of 32 x 32"
    _, log = edited(graph, RotateResidual(explicit=False))
    assert only(log) == "the output of final is an output of the model and takes no rotation; explicit=True would turn it back by one more linear layer"


class NormedStart(Model):
    """The embedding is normed (BLOOM): the norm's output is the stream and is read by the first block's norm."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.start = nn.LayerNorm(32)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.final(self.layers[0](self.start(self.embed(tokens)), mask)))


def test_a_normed_embedding_is_turned_by_one_linear_layer() -> None:
    graph = canonical(moved(NormedStart(_block())))
    after = _rotated(graph)
    assert error(graph, after, ids()) <= PIECE
    assert after.notes[-1] == "rotate-residual: start is turned by a linear layer of 32 x 32"
    _, log = edited(graph, RotateResidual(explicit=False))
    assert "start starts the stream, and start stands between it and the sum, with a weight that differs by channel; explicit=True" in only(log)


class Experts(nn.Module):
    """Two experts, one a token, as grouped products of sorted tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 32, 64) * 0.2), nn.Parameter(torch.randn(2, 64, 32) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 32)
        score, expert = self.router(flat).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        ends = torch.stack([(expert == 0).sum(), torch.tensor(len(flat))]).to(torch.int32)
        y = ours.grouped_linear(F.silu(ours.grouped_linear(flat[order], self.up, ends)), self.down, ends) * score[order].unsqueeze(-1)
        return y[order.argsort()].reshape(x.shape)


def test_experts_and_their_router_read_the_rotated_stream() -> None:
    graph = canonical(moved(_with_rms(Model(Block("pre-norm", Attention(), Experts())))))
    after = _rotated(graph)
    assert error(graph, after, ids()) <= PIECE
    assert {"layers.0.ffn.up_rotated", "layers.0.ffn.down_rotated", "layers.0.ffn.router.weight_rotated"} <= set(after.weights())


def test_a_norm_on_the_way_in_with_one_number_as_weight_commutes() -> None:
    graph = canonical(_with_rms(Model(_block("output-norm"))).eval())
    for name, w in graph.weights().items():
        if name.endswith(("one.weight", "two.weight")):
            w.data.fill_(0.7)
    assert error(graph, _rotated(graph), ids()) <= PIECE


def test_a_layer_of_equal_weights_stays_shared() -> None:
    class Twice(Model):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.final(self.layers[0](self.layers[0](self.embed(tokens), mask), mask)))

    graph = canonical(moved(Twice(_block())))
    after = _rotated(graph)
    assert error(graph, after, ids()) <= PIECE
    assert after.weight_bytes() <= graph.weight_bytes()


def test_an_untied_head_gets_a_weight_of_its_own_and_that_is_noted() -> None:
    graph = _usual(tied=True)
    after = _rotated(graph, untie=True)
    assert error(graph, after, ids()) <= PIECE
    tables = [w for w in after.weights().values() if w.shape == (50, 32)]
    assert len(tables) == 2
    assert not torch.equal(*tables)
    assert any("is no longer shared" in note for note in after.notes)


def test_fusions_and_merging_come_after() -> None:
    graph = _usual_rms()
    outcome = Pipeline([RotateResidual(), FuseAddRMSNorm(), MergeLinears()]).run(graph, [ids()])
    assert [r.undone for r in outcome.records] == [None] * len(outcome.records)
    assert [r.applied for r in outcome.records[-3:]] == [1, 4, 10]


class Forward(nn.Module):
    """In place of an attention: a layer that needs no positions, so that it can be captured without data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x)


def test_recipes_fill_a_graph_without_weights() -> None:
    torch.manual_seed(1)
    model = moved(Model(Block("pre-norm", Forward(), Scaled())))
    real = _rotated(canonical(model))
    state = dict(model.state_dict())
    empty = _rotated(canonical(model.to("meta"), *(t.to("meta") for t in ids())))
    assert empty.on_meta
    empty.materialize(state)
    assert error(real, empty, ids()) == 0


# -- what it is for -------------------------------------------------------------------------------------------------


def _crest(graph: Graph) -> list[float]:
    """max |x| / rms, mean over tokens, of every input of a linear layer that reads a norm."""
    found: list[float] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if any(u.target is aten.linear.default and u.args[0] is n for u in n.users) and "norm" in str(n.target):
                x = value.reshape(-1, value.shape[-1])  # type: ignore[attr-defined]
                found.append(float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()))
            return value

    with torch.no_grad():
        Watch(graph.module).run(*ids(), enable_io_processing=False)
    return found


def test_outlier_channels_are_gone_from_what_linear_layers_read() -> None:
    torch.manual_seed(1)
    model = moved(_with_rms(Model(_block(), _block())))
    with torch.no_grad():
        model.embed.weight[:, 5] += 40
    graph = canonical(model)
    before, after = _crest(graph), _crest(_rotated(graph))
    assert len(before) == len(after) == 5
    assert all(a < 0.7 * b for a, b in zip(after, before))
    assert min(before) > 4


# -- refusals -------------------------------------------------------------------------------------------------------


def _refusal(graph: Graph, **options: object) -> str:
    after, log = edited(graph, RotateResidual(**options))  # type: ignore[arg-type]
    assert [str(n) for n in after.fx.nodes] == [str(n) for n in graph.fx.nodes]
    return only(log)


def test_declines_post_norm() -> None:
    _, log = edited(_usual("post-norm", 1), RotateResidual())
    assert log.applied == []
    assert log.declined[0].why == "post-norm: the affine of layers.0.one lies inside the residual path, between one sum and the next"


def test_declines_a_norm_on_the_way_in_whose_weight_differs() -> None:
    why = _refusal(_usual("sandwich-norm", 1))
    assert why == "layers.0.attention.o writes to the stream, and layers.0.three stands between it and the sum, with a weight that differs by channel"


def test_declines_such_a_norm_of_one_number_too_when_a_layer_scale_follows() -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scale = nn.LayerNorm(32), nn.Parameter(torch.rand(32))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x)) * self.scale

    why = _refusal(canonical(Model(Block("pre-norm", Attention(), Normed()), _block()).eval()))
    assert why == "layers.0.ffn.down writes to the stream, and layers.0.ffn.norm stands between it and the sum, with a weight that differs by channel"


def test_declines_tied_embeddings() -> None:
    why = _refusal(_usual(tied=True))
    assert why.endswith("which need it rotated differently; untie=True gives each its own")
    assert "embed" in why and "head" in why


def _reads_raw(kind: str) -> Graph:
    class Reads(Model):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.layers:
                x = block(x, mask)
                x = x + (self.head.weight[:32] @ torch.tanh(x).transpose(1, 2)).transpose(1, 2) if kind == "tanh" else x
            return (self.head(x), self.head(self.final(x))) if kind == "linear" else self.head(self.final(x))  # type: ignore[return-value]

    torch.manual_seed(1)
    return canonical(moved(Reads(_block(), _block())))


def test_declines_a_reader_without_a_norm_where_the_mean_is_lost() -> None:
    assert _refusal(_reads_raw("linear")) == "head reads the stream without a norm, so it would miss the mean that LayerNorm takes away"


def test_a_linear_layer_may_read_the_stream_of_rms_norms() -> None:
    class Reads(Model):
        def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = self.layers[0](self.embed(tokens), mask)
            return self.layers[0].ffn(x), self.head(self.final(x))

    graph = canonical(moved(_with_rms(Reads(_block("parallel")))))
    assert edited(graph, RotateResidual())[1].declined[0].why.startswith("layers.0.ffn.gate.weight serves layers.0.ffn.gate and layers.0.ffn")
    assert error(graph, _rotated(graph, untie=True), ids()) <= PIECE


class Gate(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)


def test_declines_a_norm_read_by_something_that_is_no_linear_layer() -> None:
    assert _refusal(language_model(Block("pre-norm", Attention(), Gate()), _block())).startswith("layers.0.ffn")


class Mixed(Gate):
    def forward(self, x: Tensor) -> Tensor:
        return super(Gate, self).forward(x + torch.sin(x))


def test_says_what_reads_a_norm_inside_the_stream() -> None:
    assert _refusal(language_model(Block("pre-norm", Attention(), Mixed()), _block())) == "layers.0.ffn reads the output of layers.0.two and is no linear layer"


def test_declines_sums_that_are_fused_with_norms() -> None:
    fused, _ = edited(_usual_rms(), FuseAddRMSNorm())
    assert _refusal(fused) == "its sums are already fused with norms; rotate before fuse-add-rms-norm and fuse-add-layer-norm"


def test_declines_streams_that_both_keep_and_drop_the_mean() -> None:
    model = Model(_block())
    model.final = RMSNorm()  # type: ignore[assignment]
    assert _refusal(canonical(moved(model))) == "final keeps the mean of the stream and layers.0.one takes it away"


def test_declines_a_padded_convolution_that_reads_a_norm_with_a_bias() -> None:
    class Local(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.conv(x.transpose(1, 2)).transpose(1, 2)

    assert (
        _refusal(language_model(Block("pre-norm", Attention(), Local()), _block()))
        == "layers.0.ffn.conv reads the output of layers.0.two and is no linear layer"
    )


class GatedByToken(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(3 * super().forward(x))


class GatedByMean(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x.mean((0, 1)))


@pytest.mark.parametrize("ffn", [GatedByToken, GatedByMean])
def test_declines_a_writer_whose_channels_are_gated_by_values(ffn: type[Plain]) -> None:
    why = _refusal(language_model(Block("pre-norm", Attention(), ffn()), _block()))
    assert why == "layers.0.ffn.down writes to the stream, and layers.0.ffn multiplies its channels by computed values"


def test_a_width_without_hadamard_matrix_is_rotated_in_blocks_and_noted() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.up, self.down, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(self.norm(x + self.down(F.gelu(self.up(self.norm(x))))))

    graph = canonical(moved(Narrow()), torch.ones(2, 5, dtype=torch.long))
    after = _rotated(graph)
    assert error(graph, after, (torch.arange(8).view(2, 4),)) <= PIECE
    assert after.notes[-1] == "rotate-residual: no Hadamard matrix of size 6 can be constructed; Q is block-diagonal with blocks of 2"
