"""Which channel of a producer each channel of a value is: index tensors pushed through the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph import Graph
from .channel_tracer import ChannelTracer, Origin, Step


@dataclass(frozen=True)
class ChannelMap:
    """index: int64 [channels of the value], the producer's channel each one is, -1 for none. steps: what lies between, in graph order."""

    producer: fx.Node
    index: Tensor
    steps: tuple[Step, ...]


def channel_map(graph: Graph, producer: fx.Node, value: fx.Node, axis: int = -1) -> ChannelMap | str:
    """Which channel of `producer` each channel of `value` (along `axis`: -1 for linears, 1 for convolutions) is, or why that can't be said.

    Follows layout ops, repeat_kv, fused projections, attention (v to its output), gates (from the side that is asked for), depthwise
    convolutions and constants; a caller decides from `steps` which of them it can edit through.
    """
    found = ChannelTracer(graph, producer).origin(value, (axis,))
    if isinstance(found, str):
        return found
    return ChannelMap(producer, torch.where(found.which < 0, -1, found.channel), found.steps)


def origin(graph: Graph, value: fx.Node, axes: tuple[int, ...] = (-1,)) -> Origin | str:
    """The linears, convolutions or embeddings that make the channels of a value (counted along `axes`), or why that can't be said."""
    return ChannelTracer(graph).origin(value, axes)
