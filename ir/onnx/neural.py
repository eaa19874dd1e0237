"""ONNX operators of networks: products, convolutions, pools, norms, resizing, losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import NeedsValue

Ints = Sequence[int]


def gemm(a: Tensor, b: Tensor, c: Any = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    a = a.t() if transA else a
    if (
        alpha == 1
        and (c is None or beta == 1 and isinstance(c, Tensor) and c.dim() == 1 and c.shape[0] == b.shape[0 if transB else 1])
        and a.is_floating_point()
    ):
        return F.linear(a, b if transB else b.t(), c)
    y = torch.matmul(a, b.t() if transB else b)
    y = y if alpha == 1 else (y * alpha).to(y.dtype)
    if c is None:
        return y
    return y + (c if beta == 1 else (c * beta).to(y.dtype))


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(x * alpha + beta, 0, 1),
    "Clip": lambda x, low, high: torch.clamp(x, low, high),
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
}


def _activated(x: Tensor, name: str, parameters: Sequence[float | None]) -> Tensor:
    if name not in _ACTIVATIONS:
        raise NeedsValue(f"its activation is {name}; rewright knows {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](x, *(p for p in parameters if p is not None))


def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Any = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    **attributes: Any,
) -> Tensor:
    """com.microsoft: a Gemm and what follows it."""
    return _activated(gemm(a, b, c, **attributes), activation, (activation_alpha, activation_beta, activation_gamma))


def fused_conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None, *, activation: str = "", activation_params: Sequence[float] = (), **attributes: Any
) -> Tensor:
    """com.microsoft: a Conv, a sum, and what follows them."""
    y = conv(x, w, b, **attributes)
    y = y if z is None else y + z
    return _activated(y, activation, activation_params) if activation else y


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def fused_matmul(a: Tensor, b: Tensor, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0, transBatchB: int = 0) -> Tensor:
    if transBatchA or transBatchB:
        raise NeedsValue("it moves batch axes (transBatchA), which rewright does not know")
    y = torch.matmul(a.mT if transA else a, b.mT if transB else b)
    return y if alpha == 1 else y * alpha


def einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


# -- windows --------------------------------------------------------------------------------------------------------


def _places(
    x: Tensor, kernel: Ints, strides: Ints | None, dilations: Ints | None, pads: Ints | None, auto_pad: str
) -> tuple[list[int], list[int], list[int], list[int]]:
    """(strides, dilations, padding before, padding after) of every spatial axis."""
    n = len(kernel)
    strides, dilations = list(strides or [1] * n), list(dilations or [1] * n)
    if auto_pad in ("NOTSET", ""):
        pads = list(pads or [0] * 2 * n)
        return strides, dilations, pads[:n], pads[n:]
    if auto_pad == "VALID":
        return strides, dilations, [0] * n, [0] * n
    total = [max((-(-s // st) - 1) * st + (k - 1) * d + 1 - s, 0) for s, k, st, d in zip(map(int, x.shape[2:]), kernel, strides, dilations)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (strides, dilations, small, large) if auto_pad == "SAME_UPPER" else (strides, dilations, large, small)


def _around(x: Tensor, before: Ints, after: Ints, value: float = 0.0) -> Tensor:
    return F.pad(x, [p for pair in zip(reversed(before), reversed(after)) for p in pair], value=value) if any(before) or any(after) else x


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    kernel_shape: Ints | None = None,
    strides: Ints | None = None,
    pads: Ints | None = None,
    dilations: Ints | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
) -> Tensor:
    strides, dilations, before, after = _places(x, list(map(int, w.shape[2:])), strides, dilations, pads, auto_pad)
    if before != after:
        x, before = _around(x, before, after), [0] * len(before)
    return _CONV[len(before)](x, w, b, strides, before, dilations, group)


_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    kernel_shape: Ints | None = None,
    strides: Ints | None = None,
    pads: Ints | None = None,
    dilations: Ints | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
) -> Tensor:
    kernel = list(map(int, w.shape[2:]))
    n = len(kernel)
    strides, dilations, more = list(strides or [1] * n), list(dilations or [1] * n), list(output_padding or [0] * n)
    whole = [
        (int(s) - 1) * st + (k - 1) * d + 1 + o if output_shape or auto_pad.startswith("SAME") else 0
        for s, st, k, d, o in zip(x.shape[2:], strides, kernel, dilations, more)
    ]
    if output_shape or auto_pad.startswith("SAME"):
        want = list(output_shape)[-n:] if output_shape else [int(s) * st for s, st in zip(x.shape[2:], strides)]
        total = [w_ - t for w_, t in zip(whole, want)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    else:
        pads = list(pads or [0] * 2 * n)
        before, after = pads[:n], pads[n:]
    run = _CONV_TRANSPOSE[n]
    if before == after and min(before) >= 0 and all(o < max(s, d) for o, s, d in zip(more, strides, dilations)):
        return run(x, w, b, strides, before, more, group, dilations)
    y = run(x, w, b, strides, 0, 0, group, dilations)
    bias = 0.0 if b is None else b.reshape(1, -1, *[1] * n)
    y = _around(y - bias, [-p for p in before], [o - p for o, p in zip(more, after)])
    return y + bias


_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def max_pool(
    x: Tensor,
    kernel_shape: Ints,
    strides: Ints | None = None,
    pads: Ints | None = None,
    dilations: Ints | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    n = len(kernel_shape)
    strides, dilations, before, after = _places(x, kernel_shape, strides, dilations, pads, auto_pad)
    if not x.is_floating_point():
        assert outputs == 1, "indices of integer pools"
        return max_pool(x.float(), kernel_shape, strides, [*before, *after], dilations, "NOTSET", ceil_mode).to(x.dtype)  # type: ignore[union-attr]  # 8-bit values are exact in f32
    legal = before == after and all(2 * p <= k for p, k in zip(before, kernel_shape))
    if outputs == 1:
        if not legal:
            x, before = _around(x, before, after, -math.inf), [0] * n
        return _MAX[n](x, list(kernel_shape), strides, before, dilations, bool(ceil_mode))
    if not legal:
        raise NeedsValue("it wants the indices of a pool with unequal padding")
    y, indices = _MAX[n](x, list(kernel_shape), strides, before, dilations, bool(ceil_mode), return_indices=True)
    inner = math.prod(x.shape[2:])
    if storage_order:  # column by column
        h, w = x.shape[2], x.shape[3]
        indices = indices % w * h + indices // w
    offset = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * n) * inner
    return y, indices + offset


_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def average_pool(
    x: Tensor,
    kernel_shape: Ints,
    strides: Ints | None = None,
    pads: Ints | None = None,
    dilations: Ints | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    n = len(kernel_shape)
    strides, dilations, before, after = _places(x, kernel_shape, strides, dilations, pads, auto_pad)
    if all(d == 1 for d in dilations) and before == after and all(2 * p <= k for p, k in zip(before, kernel_shape)):
        return _AVERAGE[n](x, list(kernel_shape), strides, before, bool(ceil_mode), bool(count_include_pad))
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    counted = _around(ones, before, after, 1.0 if count_include_pad else 0.0)
    total, count = (_window_sum(_around(v, before, after), kernel_shape, strides, dilations, ceil_mode) for v in (x, ones))
    if count_include_pad:
        count = _window_sum(counted, kernel_shape, strides, dilations, ceil_mode)
    return total / count


def _window_sum(x: Tensor, kernel: Ints, strides: list[int], dilations: list[int], ceil_mode: int) -> Tensor:
    """Sums of the windows, by a convolution with ones; a window that starts within the (padded) input may hang over its end."""
    if ceil_mode:
        sizes = list(map(int, x.shape[2:]))
        over = []
        for s, k, st, d in zip(sizes, kernel, strides, dilations):
            reach = d * (k - 1) + 1
            count = -(-(s - reach) // st) + 1
            count -= (count - 1) * st >= s
            over.append(max((count - 1) * st + reach - s, 0))
        x = _around(x, [0] * len(over), over)
    channels = x.shape[1]
    ones = torch.ones([channels, 1, *kernel], dtype=x.dtype)
    return _CONV[len(kernel)](x, ones, None, strides, 0, dilations, channels)


def lp_pool(
    x: Tensor,
    kernel_shape: Ints,
    p: int = 2,
    strides: Ints | None = None,
    pads: Ints | None = None,
    dilations: Ints | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Tensor:
    strides, dilations, before, after = _places(x, kernel_shape, strides, dilations, pads, auto_pad)
    return _window_sum(_around(x.abs() ** p, before, after), kernel_shape, strides, dilations, ceil_mode) ** (1 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(_spatial(x), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(_spatial(x), keepdim=True)


def global_lp_pool(x: Tensor, p: int = 2) -> Tensor:
    return (x.abs() ** p).sum(_spatial(x), keepdim=True) ** (1 / p)


def max_unpool(x: Tensor, indices: Tensor, sizes: Any = None, kernel_shape: Ints = (), strides: Ints | None = None, pads: Ints | None = None) -> Tensor:
    n = len(kernel_shape)
    strides, pads = list(strides or [1] * n), list(pads or [0] * 2 * n)
    own = [*x.shape[:2], *((s - 1) * st - pads[i] - pads[n + i] + k for i, (s, st, k) in enumerate(zip(x.shape[2:], strides, kernel_shape)))]
    made = torch.zeros(math.prod(own), dtype=x.dtype).scatter(0, indices.flatten(), x.flatten()).reshape(own)
    if sizes is not None and list(sizes) != own:
        raise NeedsValue("its output_shape differs from the size of the pooled input, which leaves open what its indices mean")
    return made


# -- norms ----------------------------------------------------------------------------------------------------------


def _channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    if not training_mode and x.dim() > 1:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    if not training_mode:
        return (x - mean) / torch.sqrt(variance + epsilon) * scale + bias
    axes = [0, *_spatial(x)]
    now, spread = x.mean(axes), x.var(axes, unbiased=False)
    y = F.batch_norm(x, now, spread, scale, bias, False, 0.0, epsilon)
    return y, mean * momentum + now * (1 - momentum), variance * momentum + spread * (1 - momentum)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def group_norm_by_group(x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Opset 18: scale and bias a group."""
    per = int(x.shape[1]) // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(per), bias.repeat_interleave(per), epsilon)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Tensor | tuple[Tensor, ...]:
    axis = axis % x.dim()
    shape = list(x.shape[axis:])
    if outputs == 1 and all(isinstance(s, int) for s in shape) and list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    axes = list(range(axis, x.dim()))
    f = x.float() if x.dtype.itemsize < 4 else x
    mean = f.mean(axes, keepdim=True)
    inverse = torch.rsqrt((f - mean).square().mean(axes, keepdim=True) + epsilon)
    y = ((f - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


def rms_norm(x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    shape = list(x.shape[axis % x.dim() :])
    if all(isinstance(s, int) for s in shape) and list(scale.shape) == shape:
        return F.rms_norm(x, shape, scale, epsilon)
    f = x.float() if x.dtype.itemsize < 4 else x
    return (f * torch.rsqrt(f.square().mean(list(range(axis % x.dim(), x.dim())), keepdim=True) + epsilon)).to(x.dtype) * scale


def lp_normalization(x: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    length = x.norm(p, axis, keepdim=True)
    return torch.where(length == 0, torch.zeros_like(x), x / length)


def mean_variance_normalization(x: Tensor, axes: Ints = (0, 2, 3)) -> Tensor:
    mean = x.mean(list(axes), keepdim=True)
    return (x - mean) / (((x * x).mean(list(axes), keepdim=True) - mean * mean).sqrt() + 1e-9)


def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    squares = F.pad(x.square(), [0, 0] * (x.dim() - 2) + [before, after])
    total = sum(squares.narrow(1, i, x.shape[1]) for i in range(size))
    return x / (bias + alpha / size * total) ** beta


# -- resizing -------------------------------------------------------------------------------------------------------


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    antialias: int = 0,
    axes: Ints | None = None,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Axis by axis: every output value is a weighted sum of the inputs around its place."""
    where = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    if sizes is not None and len(sizes):
        want = list(sizes)
        if keep_aspect_ratio_policy != "stretch":
            pick = min if keep_aspect_ratio_policy == "not_larger" else max
            factor = pick(int(s) / int(x.shape[a]) for s, a in zip(want, where))
            want, factors = [int(factor * int(x.shape[a]) + 0.5) for a in where], [factor] * len(where)
        else:
            factors = [s / x.shape[a] if isinstance(s, int) and isinstance(x.shape[a], int) else None for s, a in zip(want, where)]
    else:
        factors = list(scales)
        want = [_scaled(x.shape[a], f) for f, a in zip(factors, where)]
    if (
        fast := _torch_resize(x, where, want, factors, mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, exclude_outside, antialias)
    ) is not None:
        return fast
    scale_of: list[float] = [int(size) / int(x.shape[axis]) if factor is None else float(factor) for axis, size, factor in zip(where, want, factors)]
    regions = list(roi) if roi else [0.0] * len(where) + [1.0] * len(where)
    for i, (axis, size, factor) in enumerate(zip(where, want, scale_of)):
        if coordinate_transformation_mode != "tf_crop_and_resize" and (factor == 1 or size is x.shape[axis]):
            continue
        place, outside = _source(coordinate_transformation_mode, int(size), int(x.shape[axis]), factor, regions[i], regions[len(where) + i])
        x = _resample(x, axis, place, factor if antialias else 1.0, mode, nearest_mode, cubic_coeff_a, exclude_outside)
        if outside is not None:
            view = [-1 if j == axis else 1 for j in range(x.dim())]
            x = torch.where(outside.reshape(view), torch.full((), extrapolation_value, dtype=x.dtype), x)
    return x


def _scaled(size: Any, factor: float) -> Any:
    """floor(size * factor), also of a symbolic size."""
    return size * int(factor) if float(factor).is_integer() else torch.sym_int(factor * size)


def _torch_resize(
    x: Tensor, where: list[int], want: list[Any], factors: list[Any], mode: str, coordinates: str, nearest: str, a: float, exclude: int, antialias: int
) -> Tensor | None:
    """torch's own upsampling where it is the same: NCHW, sizes or exact scales."""
    full: dict[int, tuple[Any, Any]] = {axis: (size, f) for axis, size, f in zip(where, want, factors)}
    inner = list(range(2, x.dim()))
    if x.dim() not in (3, 4, 5) or antialias or exclude or not x.is_floating_point() or any(full.get(i, (x.shape[i], 1))[0] != x.shape[i] for i in (0, 1)):
        return None
    size = [full.get(i, (x.shape[i], 1))[0] for i in inner]
    given = all(f is not None for _, f in full.values())
    exact = all(f is None or float(f).is_integer() or isinstance(x.shape[i], int) and isinstance(s, int) and s == f * x.shape[i] for i, (s, f) in full.items())
    odd = given and exact and all(f % 2 == 1 for _, f in full.values())
    if (
        mode == "nearest"
        and exact
        and (coordinates == "asymmetric" and nearest == "floor" or odd and coordinates == "half_pixel" and nearest == "round_prefer_floor")
    ):
        return F.interpolate(x, size=size, mode="nearest")
    kinds = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}.get(mode, {})
    if x.dim() not in kinds or coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners") or mode == "cubic" and a != -0.75:
        return None
    if coordinates != "half_pixel" and any(isinstance(s, int) and s == 1 for s in size):
        return None
    if coordinates == "align_corners" or exact:
        return F.interpolate(x, size=size, mode=kinds[x.dim()], align_corners=coordinates == "align_corners")
    if not given:
        return None
    scale = [float(full.get(i, (x.shape[i], 1))[1]) for i in inner]
    return F.interpolate(x, scale_factor=scale, mode=kinds[x.dim()], align_corners=False)  # the places follow the scale, not the sizes' ratio


def _source(coordinates: str, size: int, length: int, factor: float, start: float, end: float) -> tuple[Tensor, Tensor | None]:
    """Where in the input every output lies, and which lie outside (crops only)."""
    at = torch.arange(size, dtype=torch.float64)
    if coordinates == "asymmetric":
        return at / factor, None
    if coordinates == "align_corners":
        return (at * 0 if size == 1 else at * (length - 1) / (size - 1)), None
    if coordinates == "pytorch_half_pixel" and size == 1:
        return at * 0, None
    if coordinates == "half_pixel_symmetric":
        return length / 2 * (1 - size / (factor * length)) + (at + 0.5) / factor - 0.5, None
    if coordinates == "tf_half_pixel_for_nn":
        return (at + 0.5) / factor, None
    if coordinates == "tf_crop_and_resize":
        place = start * (length - 1) + at * ((end - start) * (length - 1) / (size - 1)) if size > 1 else at * 0 + 0.5 * (start + end) * (length - 1)
        return place, (place < 0) | (place > length - 1)
    return (at + 0.5) / factor - 0.5, None


def _resample(x: Tensor, axis: int, place: Tensor, factor: float, mode: str, nearest: str, a: float, exclude: int) -> Tensor:
    length = int(x.shape[axis])
    if mode == "nearest":
        rounding = {
            "floor": torch.floor,
            "ceil": torch.ceil,
            "round_prefer_floor": lambda p: torch.ceil(p - 0.5),
            "round_prefer_ceil": lambda p: torch.floor(p + 0.5),
        }[nearest]
        return x.index_select(axis, rounding(place).clamp(0, length - 1).long())
    stretch = min(factor, 1.0)  # antialiasing widens the kernel when the image shrinks
    reach = math.ceil((1 if mode == "linear" else 2) / stretch)
    around = torch.floor(place)[:, None] + torch.arange(-reach, reach + 1)  # [size, 2 reach + 1]
    distance = ((place[:, None] - around) * stretch).abs()
    if mode == "linear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weight = torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    if exclude:
        weight = torch.where((around < 0) | (around > length - 1), torch.zeros_like(weight), weight)
    if exclude or stretch < 1:
        weight = weight / weight.sum(1, keepdim=True)
    matrix = torch.zeros(place.shape[0], length, dtype=torch.float64).scatter_add(1, around.clamp(0, length - 1).long(), weight)
    return torch.matmul(x.movedim(axis, -1), matrix.to(x.dtype).t()).movedim(-1, axis)


def resize_10(x: Tensor, scales: Any, mode: str = "nearest") -> Tensor:
    return resize(x, None, scales, None, mode, "asymmetric", "floor")


def upsample_7(x: Tensor, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    return resize_10(x, list(scales), mode)


_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(x: Tensor, grid: Tensor, mode: str = "linear", padding_mode: str = "zeros", align_corners: int = 0) -> Tensor:
    return F.grid_sample(x, grid.to(x.dtype), _MODES.get(mode, mode), padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, sizes: Sequence[Any], align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, list(sizes), bool(align_corners))


# -- losses, matrices -----------------------------------------------------------------------------------------------


def negative_log_likelihood(scores: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int | None = None, reduction: str = "mean") -> Tensor:
    target = target.long()
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    safe = torch.where(ignored, 0, target)
    w = (torch.ones_like(safe, dtype=scores.dtype) if weight is None else weight[safe]) * (~ignored)
    loss = -scores.gather(1, safe.unsqueeze(1)).squeeze(1) * w
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / w.sum()


def softmax_cross_entropy(
    scores: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int | None = None, reduction: str = "mean", outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    logs = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood(logs, target, weight, ignore_index, reduction)
    return loss if outputs == 1 else (loss, logs)


def determinant(x: Tensor) -> Tensor:
    return torch.linalg.det(x)
