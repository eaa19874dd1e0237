"""Which rows of a value count: real tokens only, without the positions the user leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.graph import Flat, Graph
from ...ir.nodes import same_shape
from ...ir.verify import padding_mask


class RowSelection:
    """Values as rows of channels, padding left out.

    The key mask of the model says which tokens are real (ir.verify.padding_mask). Positions count from each text's first
    real token, so that left padding does not move them. A value without a token axis (a pooled one) counts whole.
    """

    def __init__(self, graph: Graph, batches: Sequence[Flat], exclude_positions: tuple[int, ...] = ()) -> None:
        if any(p < 0 for p in exclude_positions):
            raise UsageError(f"exclude_positions counts from the first token, 0; got {list(exclude_positions)}")
        self.batches, self.exclude = batches, torch.tensor(exclude_positions, dtype=torch.long)
        self.mask = padding_mask(graph)
        self.tokens = next((n for n in graph.inputs if n.meta["val"].dim() == 2 and not n.meta["val"].is_floating_point()), None)
        self._index = graph.inputs.index(self.tokens) if self.tokens is not None else -1
        self._known: dict[tuple[int, int, int], Tensor | None] = {}

    def token_axis(self, value: fx.Node, axis: int = -1) -> int | None:
        """The axis of a value's tokens (0: batch and tokens are one axis), None where it has none.

        Raises UsageError where it can't be told.
        """
        shape = list(value.meta["val"].shape)
        channel = axis % len(shape)
        if self.tokens is None:
            return 1 if len(shape) == 3 and channel != 1 and len(self.exclude) else None
        batch, length = self.tokens.meta["val"].shape
        if channel != 0 and same_shape(shape[:1], [batch * length]):
            return 0
        axes = [i for i in range(1, len(shape)) if i != channel and same_shape([shape[i]], [length])]
        if not axes or not same_shape(shape[:1], [batch]):
            return None
        if len(axes) > 1 and self._needs_selection():
            raise UsageError(f"{value.name} has {len(axes)} axes of the size of the tokens, {shape}; which one is padded can't be told")
        return axes[0]

    def _needs_selection(self) -> bool:
        return len(self.exclude) > 0 or any(self.mask(flat) is not None for flat in self.batches)

    def rows(self, batch: int, value: Tensor, token_axis: int | None, axis: int = -1) -> Tensor:
        """[rows, channels] of one batch's value, float32 or float64; a view where nothing is left out."""
        value = value.movedim(axis, -1)
        width = value.shape[-1]
        if token_axis is not None:
            token_axis -= token_axis > axis % value.dim()  # where it lies once the channels are last
            value = value.movedim(token_axis, 1) if token_axis else value
            length = value.shape[1] if token_axis else 0
            index = self._kept(batch, value.shape[0], length)
            if index is not None:
                value = value.reshape(value.shape[0] * (length or 1), -1, width).index_select(0, index.to(value.device))
        rows = value.reshape(-1, width)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _kept(self, batch: int, first: int, length: int) -> Tensor | None:
        """Indices of the [batch * tokens] rows that count, or None for all."""
        place = (batch, first, length)
        if place not in self._known:
            flat = self.batches[batch]
            mask = self.mask(flat)
            if mask is None:
                shape = tuple(flat[self._index].shape) if self.tokens is not None else (first, length)
                mask = torch.ones(shape, dtype=torch.bool)
            if len(self.exclude):
                mask = mask & ~torch.isin(mask.long().cumsum(1) - 1, self.exclude.to(mask.device))
            self._known[place] = None if bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        return self._known[place]


def channels(node: fx.Node, axis: int) -> int:
    """The number of channels of a value along an axis. Raises UsageError for one that statistics can't be taken of."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UsageError(f"{node.name} is {what}; statistics are of floating-point tensors")
    if not -value.dim() <= axis < value.dim():
        raise UsageError(f"{node.name} has {value.dim()} axes; there is no channel axis {axis}")
    if isinstance(size := value.shape[axis], torch.SymInt):
        raise UsageError(f"axis {axis} of {node.name} is dynamic, {list(value.shape)}; channels need a fixed number")
    return size
