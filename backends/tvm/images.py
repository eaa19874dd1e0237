"""What nodes of images become: convolutions and pools, by kernels that read and write channels last.

The converter keeps such values as [n, *space, channels] for as long as nobody wants another order (`Converter.last`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.nodes import arguments
from . import elementwise
from .compat import te, tvm
from .convolution import Convolution, pack_windows, plan_of
from .gemm import Product, pack, pack_channels
from .layout import ChannelsFirst, Padded
from .window import Window

if TYPE_CHECKING:
    from .convert import Converter, Fused

tirx = tvm.tirx
aten = torch.ops.aten

CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default}
NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
"""Of the second only the first result is anything."""
POOLS = {aten.adaptive_avg_pool2d.default, aten.max_pool2d.default, aten.avg_pool2d.default}


def each(value: Any, count: int) -> tuple[int, ...]:
    """One number for every axis, of a list or of one for all."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def pair(value: Any, space: int, one: int = 1) -> tuple[int, int]:
    """Of rows and columns; a signal is an image of one row, where they are `one`."""
    rows, columns = ((one,) * (2 - space) + each(value, space))[-2:]
    return rows, columns


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def last_of(shape: Sequence[Any]) -> tuple[Any, ...]:
    """A shape with its channels last."""
    return (shape[0], *shape[2:], shape[1])


# -- orders ----------------------------------------------------------------------------------------------------------------


def channels_last(c: Converter, node: fx.Node, padding: tuple[int, int] = (0, 0)) -> Any:
    """A value as [n, h, w, channels], of a signal as [n, 1, length, channels], with zeros around."""
    c.compute(node)
    n, channels, *space = node.meta["val"].shape
    h, w = (1, *space)[-2:]
    there = node in c.last
    if there and not any(padding):
        return c.last[node] if len(space) == 2 else c.reshaped(c.last[node], (n, h, w, channels))
    value = c.last[node] if there else c.value(node)
    if not there and not any(padding) and all(map(is_one, space)):
        return c.reshaped(value, (n, h, w, channels))
    if len(space) == 1:
        value = c.reshaped(value, (n, h, w, channels) if there else (n, channels, h, w))
    what = Padded(int(channels), padding, channels_first=not there)
    shape = n, h + 2 * padding[0], w + 2 * padding[1], channels
    found = c.kernel("padded", (what, c.lanes), lambda name: what.build(c.lanes, name), [value], [c.type(shape, "float32")])
    if not any(padding):
        c.last[node] = found if len(space) == 2 else c.reshaped(found, last_of((n, channels, *space)))
    return found


def channels_first(c: Converter, node: fx.Node) -> Any:
    """A value that is kept with its channels last in its own order."""
    shape = node.meta["val"].shape
    n, channels, *space = shape
    if all(map(is_one, space)) or is_one(channels):
        return c.reshaped(c.last[node], shape)
    if node.meta["val"].dtype is not torch.float32 or not isinstance(channels, int):
        return c.te(shape, lambda x: lambda n, channel, *at: x(n, *at, channel), c.last[node])
    places, what = math.prod(space), ChannelsFirst(channels)
    value = c.reshaped(c.last[node], (n, places, channels))
    return c.reshaped(c.kernel("turned", what, what.build, [value], [c.type((n, channels, places), "float32")]), shape)


def in_order(c: Converter, node: fx.Node) -> Any:
    """A value as [n, *space, channels]."""
    if node not in c.last:
        shape = last_of(node.meta["val"].shape)
        if node.meta["val"].dtype is torch.float32 and isinstance(shape[-1], int) and len(shape) < 5:
            channels_last(c, node)
        else:
            c.last[node] = c.te(shape, lambda x: lambda n, *at: x(n, at[-1], *at[:-1]), c.value(node))
    return c.last[node]


# -- convolutions ----------------------------------------------------------------------------------------------------------


def by_kernel(c: Converter, node: fx.Node) -> bool:
    """Whether a kernel computes a convolution, and takes in what follows."""
    a = arguments(node)
    (out, own), groups = a["weight"].meta["val"].shape[:2], a["groups"]
    if not all(c.graph.is_weight(t) for t in (a["weight"], a["bias"]) if t is not None):
        return False
    return depthwise(a) or plan_of(c.features, int(own) * groups, int(out), groups) is not None


def depthwise(a: dict[str, Any]) -> bool:
    """Whether a convolution with these arguments has a filter for each channel alone."""
    out, own = a["weight"].meta["val"].shape[:2]
    return own == 1 and a["groups"] == out > 1


def convolution(c: Converter, fused: Fused) -> None:
    """Emit a convolution with what follows it."""
    a = arguments(fused.product)
    x, w, b, out = a["input"], a["weight"], a["bias"], fused.end.meta["val"].shape
    space = len(out) - 2
    kernel, stride, dilation = (pair(v, space) for v in (list(w.meta["val"].shape[2:]), a["stride"], a["dilation"]))
    padding = pair(a["padding"], space, 0)
    channels, (weight, bias) = int(x.meta["val"].shape[1]), _weights(c, fused)
    key = fused.norm or w
    if depthwise(a):
        what = Window("product", channels, kernel, stride, padding, dilation, bias is not None, fused.activation)
        given = [channels_last(c, x), c.weight((key, "window"), lambda: weight.reshape(channels, *kernel).permute(1, 2, 0))]
        _window(c, fused.end, what, given if bias is None else [*given, c.weight((fused.norm or b, "bias"), lambda: bias)])
        return
    found = plan_of(c.features, channels, int(out[1]), a["groups"])
    assert found is not None
    plan, read = found
    facts: dict[str, Any] = {"bias": bias is not None, "activation": fused.activation, "residual": fused.residual is not None, "after": fused.after}
    if kernel == stride == (1, 1) and padding == (0, 0) and a["groups"] == 1:
        product = Product(channels, int(out[1]), **facts)
        given = [rows(c, x), c.weight((key, plan), lambda: pack(weight.flatten(1), plan))]
    else:
        product = Convolution(
            read * math.prod(kernel), int(out[1]), **facts, channels=channels, kernel=kernel, stride=stride, dilation=dilation, groups=a["groups"]
        )
        given = [channels_last(c, x, padding), c.weight((key, "windows", plan), lambda: pack_windows(weight, product, plan))]
    if bias is not None:
        given.append(c.weight((fused.norm or b, "bias", plan), lambda: pack_channels(bias, plan)))
    if fused.residual is not None:
        given.append(rows(c, fused.residual))
    places = out[0] * math.prod(out[2:])
    result = c.kernel("convolution", (product, plan), lambda name: product.build(plan, name), given, [c.type((places, out[1]), "float32")])
    c.last[fused.end] = c.reshaped(result, last_of(out))


def _weights(c: Converter, fused: Fused) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution, with the batch norm behind it."""
    a = arguments(fused.product)
    weight, bias = c.graph.weight(a["weight"]).detach(), None if a["bias"] is None else c.graph.weight(a["bias"]).detach()
    if fused.norm is None:
        return weight, bias
    scale, shift = scale_and_shift(c, arguments(fused.norm))
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.float(), (shift if bias is None else bias.double() * scale + shift).float()


def scale_and_shift(c: Converter, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a batch norm with these arguments multiplies and adds, in float64."""
    mean, variance = (c.graph.weight(a[n]).detach().double() for n in ("running_mean", "running_var"))
    scale = (variance + a["eps"]).rsqrt() * (1 if a["weight"] is None else c.graph.weight(a["weight"]).detach().double())
    return scale, (0 if a["bias"] is None else c.graph.weight(a["bias"]).detach().double()) - mean * scale


def normalised(node: fx.Node) -> fx.Node | None:
    """The one value of a batch norm, if it is one."""
    if node.target is aten.batch_norm.default:
        return node
    users = list(node.users)
    return users[0] if node.target in NORMS and len(users) == 1 and users[0].args[1] == 0 else None


def rows(c: Converter, node: fx.Node) -> Any:
    """A value as [places, channels]."""
    n, channels, *space = node.meta["val"].shape
    return c.reshaped(channels_last(c, node), (n * math.prod(space), channels))


def _window(c: Converter, end: fx.Node, what: Window, given: Sequence[Any]) -> None:
    n, channels, *space = end.meta["val"].shape
    shape = n, *(1, *space)[-2:], channels
    found = c.kernel("window", (what, c.lanes), lambda name: what.build(c.lanes, name), given, [c.type(shape, "float32")])
    c.last[end] = found if len(space) == 2 else c.reshaped(found, last_of((n, channels, *space)))


def by_points(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    """A convolution no kernel takes, one value at a time: slow."""
    x, w, b = a["input"], a["weight"], a["bias"]
    shape, kernel, out = x.meta["val"].shape, w.meta["val"].shape, node.meta["val"].shape
    space, per = len(shape) - 2, int(out[1]) // a["groups"]
    stride, padding, dilation = (each(a[n], space) for n in ("stride", "padding", "dilation"))

    def compute(x: Any, weight: Any, *bias: Any) -> Any:
        channel, offset = te.reduce_axis((0, int(kernel[1]))), [te.reduce_axis((0, int(k))) for k in kernel[2:]]

        def point(n: Any, o: Any, *at: Any) -> Any:
            spots = [i * s + k * d - p for i, s, k, d, p in zip(at, stride, offset, dilation, padding)]
            limits = [tirx.all(s >= 0, s < c.size(n)) for s, n in zip(spots, shape[2:])]
            value = x(n, tirx.floordiv(o, per) * int(kernel[1]) + channel, *spots)
            value = tirx.if_then_else(tirx.all(*limits), value, elementwise.constant(0, "float32")) if any(padding) else value
            return te.sum(value * weight(o, channel, *offset), axis=[channel, *offset])

        return point

    found = c.te(out, compute, c.value(x), c.value(w))
    return found if b is None else c.te(out, lambda y, v: lambda *i: y(*i) + v(i[1]), found, c.value(b))


def convolution_why_not(node: fx.Node) -> str | None:
    """Images come in batches."""
    rank = arguments(node)["weight"].meta["val"].dim()
    return None if arguments(node)["input"].meta["val"].dim() == rank else "it has no batch axis"


# -- pools -----------------------------------------------------------------------------------------------------------------


def pool(c: Converter, node: fx.Node, a: dict[str, Any]) -> None:
    """Emit a pool."""
    x = a["self"]
    shape, out = x.meta["val"].shape, node.meta["val"].shape
    if node.target is aten.adaptive_avg_pool2d.default:
        size = None if all(map(is_one, out[-2:])) else (int(shape[-2]) // int(out[-2]), int(shape[-1]) // int(out[-1]))
        what = Window("mean", int(shape[1]), size, size or (1, 1))
    else:
        size = pair(a["kernel_size"], 2)
        stride = pair(a["stride"], 2) if a["stride"] else size
        largest = node.target is aten.max_pool2d.default
        dilation = pair(a["dilation"], 2) if largest else (1, 1)
        what = Window("maximum" if largest else "mean", int(shape[1]), size, stride, pair(a["padding"], 2), dilation)
    _window(c, node, what, [channels_last(c, x)])


def mean_of_image(c: Converter, node: fx.Node, x: fx.Node) -> Any:
    """The mean over the whole space, [n, channels] or [n, channels, 1, 1]."""
    n, channels = x.meta["val"].shape[:2]
    what = Window("mean", int(channels), None)
    given, kind = [channels_last(c, x)], [c.type((n, 1, 1, channels), "float32")]
    found = c.kernel("window", (what, c.lanes), lambda name: what.build(c.lanes, name), given, kind)
    if node.meta["val"].dim() == 4:
        c.last[node] = found
        return None
    return c.reshaped(found, (n, channels))


def pool_why_not(node: fx.Node) -> str | None:
    """Pools whose windows differ from place to place are not known."""
    a, image = arguments(node), node.args[0].meta["val"]  # type: ignore[union-attr]
    if image.dim() != 4 or image.dtype is not torch.float32 or not isinstance(image.shape[1], int):
        return "it is not of a batch of images in float32"
    if node.target is aten.adaptive_avg_pool2d.default:
        out = node.meta["val"].shape[-2:]
        return None if all(map(is_one, out)) or all(isinstance(n, int) and n % o == 0 for n, o in zip(image.shape[-2:], out)) else "its windows differ"
    size = each(a["kernel_size"], 2)
    stride, padding = each(a["stride"], 2) if a["stride"] else size, each(a["padding"], 2)
    partial = any(not isinstance(n, int) or (n + 2 * p - k) % s for n, p, k, s in zip(image.shape[-2:], padding, size, stride))
    if a["ceil_mode"] and partial or node.target is aten.avg_pool2d.default and (a["divisor_override"] or any(padding)):
        return "its windows differ"
    return None


CONVERTS: dict[Any, Callable[[Converter, fx.Node, dict[str, Any]], Any]] = {**dict.fromkeys(CONVOLUTIONS, by_points), **dict.fromkeys(POOLS, pool)}
UNLESS: dict[Any, Callable[[fx.Node], str | None]] = {**dict.fromkeys(CONVOLUTIONS, convolution_why_not), **dict.fromkeys(POOLS, pool_why_not)}
