"""The token axis of every value: followed through heads, grids, windows and merges; lost with a reason."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.ir.blocks import attention_blocks, token_axis
from rewright.ir.graph import Graph

from .block_models import canonical, usual

torch.set_num_threads(1)
aten = torch.ops.aten


def _said(graph: Graph, *targets) -> list[str]:
    axes = token_axis(graph)
    return [str(axes[n]) for n in graph.find(*targets)]


def test_tokens_are_axis_1_and_behind_the_heads_axis_2() -> None:
    graph = usual(kv=2)
    axes = token_axis(graph)
    (attention,) = attention_blocks(graph)
    assert [axes[n].axis for n in graph.inputs] == [1, 1]
    assert {str(axes[n]) for n in graph.find(aten.linear.default, aten.layer_norm.default, aten.gelu.default, aten.add.Tensor)} == {"axis 1"}
    assert [axes[n].axis for n in attention.attention.args[:3]] == [2, 2, 2]  # type: ignore[index]
    assert axes[attention.attention].axis == 2
    assert {str(axes[n]) for n in graph.fx.find_nodes(op="get_attr")} == {"no tokens"}


class _Vision(nn.Module):
    """A class token before the patches, and whatever a test makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(16, 16)

    def forward(self, image: Tensor) -> Tensor:
        grid = self.patch(image)
        x = torch.cat([self.token.expand(image.shape[0], -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        return self.made(x)

    def made(self, x: Tensor) -> Tensor:
        return F.gelu(x)


def _vision(made) -> Graph:
    model = _Vision()
    model.made = made.__get__(model)  # type: ignore[method-assign]
    return canonical(model, torch.randn(2, 3, 16, 16))


def test_an_image_becomes_tokens_where_its_grid_is_flattened() -> None:
    graph = _vision(lambda self, x: F.gelu(x))
    assert _said(graph, aten.conv2d.default) == ["the tokens are spread over axes 2 and 3 (an image's rows and columns)"]
    assert _said(graph, aten.reshape.default, aten.permute.default, aten.cat.default, aten.gelu.default) == ["axis 2", "axis 1", "axis 1", "axis 1"]


def test_a_sequence_joined_with_itself_is_one_of_twice_the_tokens() -> None:
    graph = _vision(lambda self, x: F.gelu(torch.cat([x, x], 1)))
    assert _said(graph, aten.gelu.default) == ["axis 1"]


def test_neighbours_joined_by_channels_are_new_tokens() -> None:
    """Patch merging (Swin): every second token beside the one after it."""
    graph = _vision(lambda self, x: F.gelu(torch.cat([x[:, 1::2], x[:, 2::2]], -1)))
    assert _said(graph, aten.gelu.default) == ["axis 1"]


def test_channels_that_are_the_same_for_all_tokens_do_not_hide_them() -> None:
    graph = _vision(lambda self, x: F.gelu(torch.cat([x, self.token.expand(x.shape)], -1)))
    assert _said(graph, aten.gelu.default) == ["axis 1"]


def test_windows_spread_the_tokens_and_put_them_back() -> None:
    def made(self, x: Tensor) -> Tensor:
        windows = x[:, 1:].view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        back = F.gelu(windows).view(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        return F.silu(back) + x[:, 1:]

    graph = _vision(made)
    assert _said(graph, aten.gelu.default) == ["the tokens are spread over axes 0 and 1 (windows)"]
    assert _said(graph, aten.silu.default, aten.add.Tensor) == ["axis 1", "axis 1"]


def test_merged_with_the_batch_is_said_and_undone() -> None:
    graph = _vision(lambda self, x: F.silu(F.gelu(x.reshape(-1, 8)).view(x.shape)))
    assert _said(graph, aten.gelu.default, aten.silu.default) == ["axis 0 counts the tokens of the whole batch", "axis 1"]


def test_a_linear_over_tokens_mixes_them_until_a_sum_brings_them_back() -> None:
    def made(self, x: Tensor) -> Tensor:
        patches = x[:, 1:]
        return F.silu(patches + F.gelu(self.mix(patches.transpose(1, 2))).transpose(1, 2))

    graph = _vision(made)
    assert _said(graph, aten.gelu.default) == ["mix mixes the tokens by a linear over them"]
    assert _said(graph, aten.silu.default) == ["axis 1"]


def test_a_mean_over_tokens_and_a_class_token_end_them() -> None:
    graph = _vision(lambda self, x: F.gelu(x.mean(1)) + F.silu(x[:, 0]))
    (mean,), (first,) = _said(graph, aten.gelu.default), _said(graph, aten.silu.default)
    assert mean.endswith("mean over the tokens")
    assert first == "one token is left"


def test_scores_pair_tokens_with_tokens() -> None:
    graph = _vision(lambda self, x: (x @ x.transpose(1, 2)).sigmoid())
    assert _said(graph, aten.sigmoid.default)[0].endswith("pairs tokens with tokens")


def test_tokens_picked_by_values_are_lost_with_the_place() -> None:
    def made(self, x: Tensor) -> Tensor:
        order = x.sum(-1).argsort(1)
        return F.gelu(x.gather(1, order[..., None].expand(-1, -1, 8)))

    (said,) = _said(_vision(made), aten.gelu.default)
    assert "by values" in said
