"""What can't be migrated, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks.edges import Edge, edges
from rewright.ir.errors import UsageError
from rewright.passes.outliers.migrate import migrate, road

from .migrations import IMAGE, Attention, C, Function, Gated, PostNorm, X, canonical


class Tied(nn.Module):
    """The head is the table; a linear reads the table's rows."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.embed, self.head, self.inner = nn.Embedding(20, C), nn.Linear(C, 20, False), nn.Linear(C, C) if inner else None
        self.norm = nn.LayerNorm(C)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x) if self.inner is None else torch.tanh(self.inner(x)))


class Twice(nn.Module):
    """ALBERT: one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.gelu(self.layer(self.norm(x))))


class Sinks(nn.Module):
    """Attention in which part of each row goes to a sink and is thrown away (GPT-OSS)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o, self.sink = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C), nn.Parameter(torch.zeros(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.cat([self.q(x) @ x.transpose(1, 2), self.sink.expand(x.shape[0], x.shape[1], 1)], -1)
        return self.o(scores.softmax(-1)[..., :-1] @ self.v(x))


class Causal(nn.Module):
    """Causal cross-attention of more queries than keys: the first queries see none."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in (self.q(x), self.k(x[:, :3]), self.v(x[:, :3])))
        return self.o(torch.ops.rewright.attention(q, k, v, None, True).squeeze(1))


def made(module: nn.Module, x: Tensor, site: str) -> Edge:
    return next(e for e in edges(canonical(module, x)) if e.site == site)


NO_FACTOR: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "gelu": (lambda: Function(F.gelu), X, "hidden", "neither a factor nor a shift passes gelu"),
    "silu": (lambda: Function(F.silu), X, "hidden", "neither a factor nor a shift passes silu"),
    "relu6": (lambda: Function(F.relu6), X, "hidden", "neither a factor nor a shift passes"),
    "softmax": (lambda: Function(lambda x: x.softmax(-1)), X, "other", "neither a factor nor a shift passes softmax"),
    "x * x": (lambda: Function(lambda x: x * x), X, "up-down", "one is also read by mul"),
    "x + x by another way": (lambda: Function(lambda x: x + torch.tanh(x)), X, "other", "neither a factor nor a shift passes tanh"),
    "x sigmoid(x)": (lambda: Function(lambda x: x * torch.sigmoid(x * 2)), X, "up-down", "one is also read by mul"),
    "a number is added": (lambda: Function(lambda x: x + 1.5), X, "linear-relu-linear", "adds 1.5 to all channels alike"),
    "another reader": (PostNorm, X, "norm-linear", "; explicit = 'linear' or 'restore' would take care of them"),
    "tied head": (lambda: Tied(False), torch.ones(2, 3, dtype=torch.long), "norm-linear", "is also read by embed: an edit would untie them"),
    "tied table": (lambda: Tied(True), torch.ones(2, 3, dtype=torch.long), "linear-relu-linear", "is also read by head: an edit would untie them"),
    "called twice": (Twice, X, "norm-linear", "layer.weight serves 2 calls: an edit for one would untie them"),
    "attention by hand": (Sinks, X, "value-output", "weighs values by hand, perhaps beside attention sinks: its weights are not known to sum to 1"),
    "an input": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(C, 8)), X, "other", "it comes from input, which is given"),
    "joined": (lambda: Function(lambda x: torch.cat([x[..., :8], x[..., 8:].tanh()], -1)), X, "other", "cat joins it from several values"),
    "moved and summed": (
        lambda: Function(lambda x: (x + x.flip(1)).view(2, 5, 2, 8).transpose(2, 3).reshape(2, 5, 16)),
        X,
        "other",
        "the channels are rearranged after add",
    ),
}

NO_SHIFT: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "rms norm": (
        lambda: nn.Sequential(nn.RMSNorm(C, eps=1e-6), nn.Linear(C, 8)),
        X,
        "norm-linear",
        "is an RMS norm, which has no bias that could take a shift",
    ),
    "relu": (lambda: Function(F.relu), X, "linear-relu-linear", "a shift does not pass relu"),
    "gate": (Gated, X, "up-down", "a shift does not pass the product"),
    "sum": (lambda: Function(lambda x: x.sum(1)), X, "other", "a shift does not pass sum"),
    "queries without keys": (Causal, X, "value-output", "has 5 queries and 3 keys: the first may see none, their weights do not sum to 1"),
    "padding": (lambda: nn.Sequential(nn.GroupNorm(4, C), nn.Conv2d(C, 8, 3, padding=1)), IMAGE, "norm-linear", "pads its input with zeros"),
    "padded by hand": (lambda: Function(lambda x: F.pad(x, (0, 0, 1, 1))), X, "linear-relu-linear", "pads with 0, which would have to move along"),
}


@pytest.mark.parametrize("name", NO_FACTOR)
def test_no_factor_and_says_why(name: str) -> None:
    make, x, site, why = NO_FACTOR[name]
    way = road(made(make(), x, site), "never")
    assert isinstance(way.scale, str)
    assert why in way.scale


@pytest.mark.parametrize("name", NO_SHIFT)
def test_a_factor_but_no_shift_and_says_why(name: str) -> None:
    make, x, site, why = NO_SHIFT[name]
    way = road(made(make(), x, site), "never")
    assert isinstance(way.scale, tuple)
    assert isinstance(way.shift, str)
    assert why in way.shift


def test_a_factor_of_zero_lets_no_shift_pass() -> None:
    graph = canonical(Function(lambda x, c: x * c, 1), X)
    with torch.no_grad():
        graph.weight("constants.0")[3] = 0
    edge = next(e for e in edges(graph) if isinstance(e.scale_into, tuple))
    assert edge.shift_into == f"a shift does not pass {edge.value.name}, which multiplies some channels by 0"


def test_explicit_ops_can_not_help_tied_consumers() -> None:
    edge = made(Tied(False), torch.ones(2, 3, dtype=torch.long), "norm-linear")
    assert "untie" in str(road(edge, "linear").scale)


def test_restoring_is_no_help_behind_gelu() -> None:
    assert road(made(Function(F.gelu), X, "hidden"), "restore").scale == "neither a factor nor a shift passes gelu"


def test_migrate_raises_what_the_road_says() -> None:
    graph = canonical(Function(F.gelu), X)
    edge = next(e for e in edges(graph) if e.site == "hidden")
    with pytest.raises(UsageError, match="no scale on the edge of gelu: neither a factor nor a shift passes gelu"):
        migrate(graph, edge, torch.full((C,), 2.0))


def test_tied_channels_need_equal_numbers() -> None:
    graph = canonical(Attention(kv=2), X)
    edge = next(e for e in edges(graph) if e.site == "value-output")
    with pytest.raises(UsageError, match=r"differs between channels that come from the same channel; take the largest of each of edge\.ties"):
        migrate(graph, edge, torch.arange(1, C + 1).double())
