"""ONNX operators that move, cut, join and make values without arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import Known, NeedsValue, Value, as_objects

Sizes = Sequence[Any]
"""Ints and symbolic sizes."""


def shape(x: Value, start: int = 0, end: int | None = None) -> Known:
    return Known(as_objects(list(x.shape)[start:end]), torch.int64)


def size(x: Value) -> Known:
    return Known.of(math.prod(x.shape))


def reshape(x: Tensor, sizes: Sizes, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if not allowzero and isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)])


def flatten(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    if axes is None:
        axes = [i for i, s in enumerate(x.shape) if isinstance(s, int) and s == 1]
    drop = {int(a) % x.dim() for a in axes}
    return x.reshape([s for i, s in enumerate(x.shape) if i not in drop]) if len(drop) != 1 else x.squeeze(drop.pop())


def unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(int(a) % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def transpose(x: Tensor, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(reversed(range(x.dim()))) if perm is None else list(perm))


def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, axis)


def split(
    x: Tensor, parts: Sizes | None = None, axis: int = 0, num_outputs: int | None = None, split: Sizes | None = None, outputs: int = 1
) -> tuple[Tensor, ...]:
    parts = split if parts is None else parts
    if parts is None:
        step = -(-x.shape[axis] // (num_outputs or outputs))
        parts = [step] * ((num_outputs or outputs) - 1)
        parts = [*parts, x.shape[axis] - sum(parts)]
    return torch.split(x, list(parts), axis)


def cut(x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None) -> Tensor:
    axes = list(range(len(starts))) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts)):
        axis = int(axis) % x.dim()
        x = _cut_backwards(x, axis, start, end, step) if step < 0 else x[(slice(None),) * axis + (slice(start, end, step),)]
    return x


def _cut_backwards(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    whole = isinstance(start, int) and isinstance(end, int) and (start == -1 or start >= 2**31 - 1) and end <= -(2**31 - 1)
    if not whole:
        length = int(x.shape[axis])
        start = max(start + length, -1) if start < 0 else min(start, length - 1)
        end = max(end + length, -1) if end < 0 else min(end, length)
        return x.index_select(axis, torch.arange(start, end, step)) if start > end else x.narrow(axis, 0, 0)
    x = x.flip(axis)
    return x if step == -1 else x[(slice(None),) * axis + (slice(None, None, -step),)]


def gather(x: Tensor, indices: Value, axis: int = 0) -> Tensor:
    axis = axis % x.dim()
    if isinstance(indices, Known):
        if not indices.shape:
            return x.select(axis, indices.scalar())
        known, indices = indices.concrete, indices.tensor()
        if known and bool((indices < 0).any()):
            return x[(slice(None),) * axis + (indices.long(),)]
    if isinstance(x, torch.nn.Parameter) and x.dim() == 2 and axis == 0:  # an embedding; the import's notes say that its indices may not be negative
        return F.embedding(indices, x)
    return x[(slice(None),) * axis + (indices.long(),)]


def _positive(indices: Tensor, length: Any) -> Tensor:
    return torch.where(indices < 0, indices + length, indices).long()


def gather_elements(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def _nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> tuple[Tensor, ...]:
    batches = []
    for axis in range(batch_dims):
        view = [1] * (indices.dim() - 1)
        view[axis] = -1
        batches.append(torch.arange(x.shape[axis]).reshape(view))
    return (*batches, *(indices[..., i].long() for i in range(int(indices.shape[-1]))))


def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    return x[_nd(x, indices, batch_dims)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none") -> Tensor:
    indices = _positive(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction], include_self=True)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    if reduction in ("none", "add"):
        return torch.index_put(x, _nd(x, indices), updates, accumulate=reduction == "add")
    depth = int(indices.shape[-1])
    flat, inner = torch.zeros(indices.shape[:-1], dtype=torch.int64), math.prod(x.shape[depth:])
    for i in range(depth):
        flat = flat * x.shape[i] + _positive(indices[..., i], x.shape[i])
    rows = flat.reshape(-1, 1).expand(-1, inner)
    return x.reshape(-1, inner).scatter_reduce(0, rows, updates.reshape(-1, inner), _REDUCTIONS[reduction], include_self=True).reshape(x.shape)


def expand(x: Tensor, sizes: Sizes) -> Tensor:
    missing = len(sizes) - x.dim()
    have = [1] * max(missing, 0) + list(x.shape)
    want = [1] * max(-missing, 0) + list(sizes)
    return x.expand([h if isinstance(w, int) and w == 1 else w for h, w in zip(have, want)])


def tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(*repeats)


def pad(x: Tensor, pads: Sizes, value: Value | None = None, axes: Sizes | None = None, mode: str = "constant") -> Tensor:
    axes = list(range(x.dim())) if axes is None else [int(a) % x.dim() for a in axes]
    before, after = dict(zip(axes, pads)), dict(zip(axes, pads[len(axes) :]))
    if mode == "constant":
        reach = [p for axis in reversed(range(x.dim())) for p in (before.get(axis, 0), after.get(axis, 0))]
        while len(reach) > 2 and all(isinstance(p, int) and p == 0 for p in reach[-2:]):
            reach = reach[:-2]
        return _pad_with(x, reach, value)
    for axis in axes:
        x = _pad_axis(x, axis, before[axis], after[axis], mode)
    return x


def _pad_with(x: Tensor, reach: list[Any], value: Value | None) -> Tensor:
    if isinstance(value, Tensor):
        inside = F.pad(torch.ones_like(x, dtype=torch.uint8), reach) != 0
        return torch.where(inside, _pad_with(x, reach, None), value.reshape(()))
    if x.dtype == torch.bool:
        return _pad_with(x.to(torch.uint8), reach, value).to(torch.bool)
    return F.pad(x, reach, value=0.0 if value is None else float(value.scalar()))


def _pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    length = int(x.shape[axis])
    if before == 0 and after == 0:
        return x
    at = torch.arange(-before, length + after)
    if mode == "edge":
        at = at.clamp(0, length - 1)
    elif mode == "wrap":
        at = at % length
    else:
        around = max(2 * (length - 1), 1)
        at = at % around
        at = torch.minimum(at, around - at) if length > 1 else torch.zeros_like(at)
    return x.index_select(axis, at)


def pad_attribute(x: Tensor, pads: Sizes, mode: str = "constant", value: float = 0.0) -> Tensor:
    return pad(x, pads, Known.of(value, x.dtype), None, mode)


def slice_attribute(x: Tensor, starts: Sizes, ends: Sizes, axes: Sizes | None = None) -> Tensor:
    return cut(x, starts, ends, axes)


def constant_of_shape(sizes: Sizes, value: Tensor | None = None) -> Tensor:
    if value is None:
        return torch.zeros(list(sizes))
    return torch.full(list(sizes), value.reshape(-1).tolist()[0], dtype=value.dtype)


def arange(start: Known, limit: Known, delta: Known) -> Tensor:
    if not all(isinstance(v, Known) for v in (start, limit, delta)):
        raise NeedsValue("its bounds are computed from data")
    return torch.arange(start.scalar(), limit.scalar(), delta.scalar(), dtype=start.dtype)


def eye_like(x: Tensor, k: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    rows, columns = x.shape
    on = torch.arange(columns)[None, :] - torch.arange(rows)[:, None] == k
    return on.to(dtype or x.dtype)


def one_hot(indices: Tensor, depth: Sizes, values: Tensor, axis: int = -1) -> Tensor:
    count = int(depth[0])
    axis = axis % (indices.dim() + 1)
    places = torch.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.dim() + 1)])
    whole = indices.to(torch.int64)
    whole = torch.where(whole < 0, whole + count, whole)
    return torch.where(whole.unsqueeze(axis) == places, values[1], values[0])


def top_k(x: Tensor, k: Sizes, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)  # among equals the first index comes first, which torch.topk leaves open
    axis = axis % x.dim()
    at = (slice(None),) * axis + (slice(0, k[0]),)
    return values[at], indices[at]


def top_k_attribute(x: Tensor, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    return top_k(x, [k], axis)


def triangle(x: Tensor, k: Sizes | None = None, upper: int = 1) -> Tensor:
    diagonal = k[0] if k else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def depth_to_space(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)
    return x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)


def cumulative_sum(x: Tensor, axis: Sizes, exclusive: int = 0, reverse: int = 0) -> Tensor:
    at = int(axis[0])
    x = x.flip(at) if reverse else x
    total = torch.cumsum(x, at, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(at) if reverse else total


def cumulative_product(x: Tensor, axis: Sizes, exclusive: int = 0, reverse: int = 0) -> Tensor:
    at = int(axis[0]) % x.dim()
    x = x.flip(at) if reverse else x
    if exclusive:
        x = torch.cat([torch.ones_like(x.narrow(at, 0, 1)), x.narrow(at, 0, int(x.shape[at]) - 1)], at)
    total = torch.cumprod(x, at, dtype=x.dtype)
    return total.flip(at) if reverse else total


def reverse_sequence(x: Tensor, lengths: Tensor, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    steps = x.shape[time_axis]
    t = torch.arange(steps)[:, None]
    at = torch.where(t < lengths[None, :], lengths[None, :] - 1 - t, t)  # [time, batch]
    at = at if time_axis == 0 else at.t()
    return x.gather(time_axis, at.reshape([*at.shape, *[1] * (x.dim() - 2)]).expand(x.shape))


def compress(x: Tensor, condition: Value, axis: int | None = None) -> Tensor:
    if not isinstance(condition, Known) or not condition.concrete:
        raise NeedsValue("its condition is computed from data, so the size of its output is")
    kept = torch.tensor([i for i, c in enumerate(condition.flat()) if c], dtype=torch.int64)
    return x.flatten().index_select(0, kept) if axis is None else x.index_select(axis, kept)


def cast(x: Tensor, to: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    if not to.is_floating_point or to.itemsize > 1:
        return x.to(to)
    if not saturate:
        raise NeedsValue("it casts to 8-bit floats without saturation, which torch does not do")
    limit = torch.finfo(to).max
    return (x if x.is_floating_point() else x.float()).clamp(-limit, limit).to(to)


def cast_like(x: Tensor, like: Value, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return cast(x, like.dtype, saturate, round_mode)


def bit_cast(x: Tensor, to: torch.dtype) -> Tensor:
    return x.view(to)


def identity(x: Value) -> Value:
    return x


def dropout(x: Tensor, ratio: Value | None = None, training: Value | None = None, *, outputs: int = 1, **_: Any) -> Tensor | tuple[Tensor, Tensor]:
    if training is not None and not (isinstance(training, Known) and not training.scalar()) and not (isinstance(ratio, Known) and ratio.scalar() == 0):
        raise NeedsValue("it drops values at random (training_mode), which a captured model does not")
    return x if outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


def center_crop_pad(x: Tensor, sizes: Sizes, axes: Sequence[int] | None = None) -> Tensor:
    for axis, want in zip(range(x.dim()) if axes is None else [a % x.dim() for a in axes], sizes):
        have = int(x.shape[axis])
        if have > want:
            x = x.narrow(axis, (have - want) // 2, want)
        elif have < want:
            before = (want - have) // 2
            x = pad(x, [before, want - have - before], None, [axis])
    return x


def column_to_image(x: Tensor, image: Sizes, block: Sizes, dilations: Any = None, pads: Any = None, strides: Any = None) -> Tensor:
    count = len(image)
    pads = [0] * 2 * count if pads is None else list(pads)
    if count != 2 or pads[:2] != pads[2:]:
        raise NeedsValue("it is not two-dimensional with equal padding on both sides, which is all torch's fold does")
    return F.fold(x, (image[0], image[1]), (block[0], block[1]), dilations or 1, pads[:2], strides or 1)


def tensor_scatter(past: Tensor, update: Tensor, write: Tensor | None = None, axis: int = -2, mode: str = "linear") -> Tensor:
    axis = axis % past.dim()
    steps = torch.arange(update.shape[axis])
    start = torch.zeros(past.shape[0], dtype=torch.int64) if write is None else write
    at = start[:, None] + steps[None, :]
    at = at % past.shape[axis] if mode == "circular" else at
    view = [1] * past.dim()
    view[0], view[axis] = at.shape[0], at.shape[1]
    return past.scatter(axis, at.reshape(view).expand(update.shape), update)
