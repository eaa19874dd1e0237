"""R2: values in another basis in every head, grouped and fused ones too; a refusal for each reason."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.graph import Graph
from rewright.passes.fusion.pack_heads import PackHeads
from rewright.passes.outliers.hadamard import Rotation
from rewright.passes.outliers.rotate_residual import RotateResidual
from rewright.passes.outliers.rotate_values import RotateValues

from ...ir.block_models import Attention, Block, Plain, canonical
from .rotation_models import edited, error, ids, language_model, moved, only

torch.set_num_threads(1)
aten = torch.ops.aten


@cache
def _with(kv: int = 4, fused: str = "") -> Graph:
    return language_model(Block("pre-norm", Attention(kv, fused), Plain()))


@pytest.mark.parametrize(("kv", "fused"), [(4, ""), (2, ""), (1, ""), (4, "thirds"), (4, "heads")])
@pytest.mark.parametrize("matrix", ["hadamard", "random"])
def test_the_function_stays(kv: int, fused: str, matrix: str) -> None:
    graph = _with(kv, fused)
    after, log = edited(graph, RotateValues(matrix=matrix))  # type: ignore[arg-type]
    assert log.applied == ["layers.0.attention"]
    assert error(graph, after, ids()) <= 1e-5
    assert {n for n in after.weights() if n.endswith("_rotated")} == {
        f"layers.0.attention.{name}_rotated" for name in (("qkv" if fused else "v") + ".weight", ("qkv" if fused else "v") + ".bias", "o.weight")
    }


def test_rows_and_columns_of_each_head_are_turned() -> None:
    after, _ = edited(_with(2), RotateValues(seed=3))
    q = Rotation(8, seed=3).matrix()
    before = _with(2).weights()
    v, o = before["layers.0.attention.v.weight"].double(), before["layers.0.attention.o.weight"].double()
    turned = after.weights()
    assert torch.allclose(turned["layers.0.attention.v.weight_rotated"].double(), (q.T @ v.view(2, 8, 32)).reshape(16, 32), atol=1e-6)
    assert torch.allclose(turned["layers.0.attention.o.weight_rotated"].double(), (o.view(32, 4, 8) @ q).reshape(32, 32), atol=1e-6)


def test_queries_and_keys_of_a_fused_projection_stay() -> None:
    after, _ = edited(_with(4, "thirds"), RotateValues())
    assert torch.equal(after.weight("layers.0.attention.qkv.weight_rotated")[:64], _with(4, "thirds").weight("layers.0.attention.qkv.weight")[:64])


def test_packed_heads_and_a_rotated_stream_are_no_matter() -> None:
    packed, _ = edited(_with(2), PackHeads())
    assert len(packed.find(torch.ops.rewright.multi_head_attention.default)) == 1
    rotated, log = edited(edited(packed, RotateResidual())[0], RotateValues())
    assert len(log.applied) == 1
    assert error(_with(2), rotated, ids()) <= 1e-5


def test_a_head_width_without_hadamard_matrix_is_noted_once() -> None:
    class Odd(nn.Module):
        """Two heads of six."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                q, k, v = (f(x).unflatten(-1, (2, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
                return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x

    x = torch.randn(2, 5, 12)
    graph = canonical(moved(Odd()), x)
    after, _ = edited(graph, RotateValues())
    assert error(graph, after, (x,)) <= 1e-5
    assert after.notes[-1:] == ["rotate-values: no Hadamard matrix of size 6 can be constructed; Q is block-diagonal with blocks of 2"]


# -- refusals -------------------------------------------------------------------------------------------------------


def _refusal(attention: nn.Module) -> str:
    _, log = edited(language_model(Block("pre-norm", attention, Plain())), RotateValues())
    return only(log)


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GatedOutput(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(_attend(*map(_split, (self.q(x), self.k(x), self.v(x)))) * torch.sigmoid(x))


class NormedOutput(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(self.norm(_attend(*map(_split, (self.q(x), self.k(x), self.v(x))))))


class ActivatedValues(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(_attend(*map(_split, (self.q(x), self.k(x), nn.functional.silu(self.v(x))))))


class ScaledValues(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(_attend(*map(_split, (self.q(x), self.k(x), self.v(x) * self.scale))))


class KeysAreValues(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k = _split(self.k(x))
        return self.o(_attend(_split(self.q(x)), k, k))


class ValuesReadTwice(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        v = self.v(x)
        return self.o(_attend(*map(_split, (self.q(x), self.k(x), v)))) + torch.tanh(v)


class HeadsTurned(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(*map(_split, (self.q(x), self.k(x), self.v(x))))
        return self.o(y.permute(0, 2, 3, 1).flatten(2))


class Shared(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(_attend(*map(_split, (self.q(x), self.k(x), self.v(x))))) + self.v(torch.tanh(x))


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        (GatedOutput, "no linear alone reads the attention's output"),
        (NormedOutput, "no linear alone reads the attention's output"),
        (ActivatedValues, "v comes from silu, not from a linear"),
        (ScaledValues, "layers.0.attention stands between v and layers.0.attention.o (scale)"),
        (KeysAreValues, "what layers.0.attention.k makes is also read by attention of layers.0.attention"),
        (ValuesReadTwice, "what layers.0.attention.v makes is also read by tanh of layers.0.attention"),
        (HeadsTurned, "layers.0.attention.o reads more than the heads of this attention in order"),
        (Shared, "its weights serve 2 calls: an edit changes them all"),
    ],
)
def test_declines(attention: type[Attention], sentence: str) -> None:
    assert _refusal(attention()) == sentence


def test_declines_values_that_are_an_output() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.attention
            v = _split(a.v(x))
            return a.o(_attend(_split(a.q(x)), _split(a.k(x)), v)), v

    _, log = edited(canonical(Cached(), torch.randn(2, 5, 32)), RotateValues())
    assert only(log) == "what attention.v makes is also an output of the model"
