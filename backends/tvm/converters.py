"""One function an op: what a node becomes. Products, views and pointwise ops are the converter's own (convert.py, elementwise.py); images.py has its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.nodes import arguments, same_shape
from . import elementwise, images
from .attention import Attention
from .batched import Batched
from .compat import te, tvm
from .gemm import Plan
from .images import is_one, last_of
from .rows import Norm

if TYPE_CHECKING:
    from .convert import Converter

tirx = tvm.tirx
aten, ours = torch.ops.aten, torch.ops.rewright

DTYPES = elementwise.TYPES

Convert = Callable[["Converter", fx.Node, dict[str, Any]], Any]

CONVERTERS: dict[Any, Convert] = dict(images.CONVERTS)
"""Op -> function of (converter, node, its arguments by name) that gives its value: a Relax variable, or a tuple of them."""

SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int}
"""Their parts are values of their own."""


def converts(*targets: Any) -> Callable[[Convert], Convert]:
    """Registers a converter."""

    def register(function: Convert) -> Convert:
        CONVERTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def count_of(shape: Sequence[Any]) -> Any:
    """How many rows a shape has."""
    return math.prod(shape[:-1]) if len(shape) > 1 else 1


# -- norms and attention -------------------------------------------------------------------------------------------------


def _norm(c: Converter, x: fx.Node, r: fx.Node | None, what: Norm, w: fx.Node | None, b: fx.Node | None, outputs: Sequence[fx.Node | None]) -> None:
    """Emit a norm. outputs: the nodes of its y and of its sum, where there are any."""
    y, total = outputs
    read = c.read_by(y, only=False) if y is not None else None
    keep_y = y is not None and (read is None or c.read_by(y) is None)
    what = Norm(what.width, what.eps, what.centred, r is not None, w is not None, b is not None, keep_y, total is not None, read.sink if read else None)
    given = [c.rows(x), *([c.rows(r)] if r is not None else []), *(c.value(t) for t in (w, b) if t is not None)]
    kept = [n for n, wanted in ((y, keep_y), (total, True)) if wanted and n is not None]
    if kept or read is not None:
        c.emit("norm", (what, c.lanes), lambda name: what.build(c.lanes, name), given, kept, y or kept[0], read)


@converts(aten.layer_norm.default)
def _layer_norm(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return _norm(c, a["input"], None, Norm(int(a["normalized_shape"][-1]), a["eps"]), a["weight"], a["bias"], (node, None))


@converts(ours.rms_norm.default)
def _rms_norm(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return _norm(c, a["x"], None, Norm(int(a["x"].meta["val"].shape[-1]), a["eps"], centred=False), a["w"], None, (node, None))


@converts(ours.add_layer_norm.default, ours.add_rms_norm.default)
def _add_norm(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    parts: list[fx.Node | None] = [next((u for u in node.users if u.args[1] == i), None) for i in (0, 1)]
    centred = node.target is ours.add_layer_norm.default
    what = Norm(int(a["x"].meta["val"].shape[-1]), a["eps"], centred)
    return _norm(c, a["x"], a["r"], what, a["w"], a.get("b"), parts)


@converts(ours.attention.default, ours.multi_head_attention.default)
def _attention(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    apart = node.target is ours.attention.default
    q, k, v = (a[n].meta["val"].shape for n in "qkv")
    heads, kv_heads = (q[1], k[1]) if apart else (a["heads"], a["kv_heads"])
    dim, value_dim = (q[-1], v[-1]) if apart else (q[-1] // heads, v[-1] // kv_heads)
    sources, offsets = [a[n] for n in "qkv"], [0, 0, 0]
    if not apart:
        for i, part in enumerate(sources):
            source, axis, start = c.window(part)
            if axis == 2:
                sources[i], offsets[i] = source, int(start)
    read = c.read_by(node) if not apart else None
    read = read if read is not None and read.step is not None and int(heads * value_dim) % 4 == 0 else None
    what = Attention(
        heads=int(heads),
        kv_heads=int(kv_heads),
        dim=int(dim),
        value_dim=int(value_dim),
        scale=float(a["scale"] if a["scale"] is not None else int(dim) ** -0.5),
        heads_apart=apart,
        rows=(0, 0, 0) if apart else tuple(int(s.meta["val"].shape[-1]) for s in sources),  # type: ignore[arg-type]
        offsets=tuple(offsets),  # type: ignore[arg-type]
        key_mask=a["key_mask"] is not None,
        sizes=a["sizes"] is not None,
        causal=a["causal"],
        window=a["window"],
        softcap=a["softcap"],
        sink=read.sink if read else None,
        bias=None if a["bias"] is None else tuple(not is_one(s) for s in a["bias"].meta["val"].shape),  # type: ignore[arg-type]
    )
    given = [*(c.value(s) for s in sources), *(c.value(a[n]) for n in ("key_mask", "sizes", "bias") if a[n] is not None)]
    if apart:
        return c.kernel("attention", (what, c.lanes), lambda name: what.build(c.lanes, name), given, [c.type(node.meta["val"].shape, "float32")])
    c.emit("attention", (what, c.lanes), lambda name: what.build(c.lanes, name), given, [] if read else [node], node, read)
    return None


# -- tables, parts and layouts ---------------------------------------------------------------------------------------------


@converts(aten.embedding.default)
def _embedding(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return c.te(node.meta["val"].shape, lambda w, ids: lambda *i: w(ids(*i[:-1]), i[-1]), c.value(a["weight"]), c.value(a["indices"]))


@converts(ours.embedding_int8.default)
def _embedding_int8(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    def compute(w: Any, scale: Any, ids: Any) -> Any:
        return lambda *i: w(ids(*i[:-1]), i[-1]).astype("float32") * scale(ids(*i[:-1]))

    return c.te(node.meta["val"].shape, compute, c.value(a["w"]), c.value(a["scale"]), c.value(a["ids"]))


@converts(aten.slice.Tensor)
def _slice(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape = a["self"].meta["val"].shape
    axis, start = a["dim"] % len(shape), a["start"] if a["start"] is not None else 0
    start = c.size(start)
    if not isinstance(a["start"], int) or a["start"] < 0:
        start = tirx.Select(start < 0, start + c.size(shape[axis]), start)
    return c.sliced(c.value(a["self"]), node, axis, start, a["step"])


@converts(aten.select.int)
def _select(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape = a["self"].meta["val"].shape
    axis, index = a["dim"] % len(shape), c.size(a["index"])
    if not isinstance(a["index"], int) or a["index"] < 0:
        index = tirx.Select(index < 0, index + c.size(shape[axis]), index)
    return c.te(node.meta["val"].shape, lambda x: lambda *i: x(*i[:axis], index, *i[axis:]), c.value(a["self"]))


@converts(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    rank = len(node.meta["val"].shape)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in a["dims"]]
    elif rank > 1:
        i, j = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (0, 1)
        order[i], order[j] = order[j], order[i]
    c.compute(a["self"])
    if rank > 2 and order == [0, *range(2, rank), 1] and a["self"] in c.last:
        return c.last[a["self"]]
    if rank > 2 and order == [0, rank - 1, *range(1, rank - 1)]:
        c.last[node] = c.value(a["self"])
        return None
    back = [order.index(i) for i in range(rank)]
    return c.te(node.meta["val"].shape, lambda x: lambda *i: x(*(i[b] for b in back)), c.value(a["self"]))


@converts(aten.expand.default)
def _expand(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape, out = a["self"].meta["val"].shape, node.meta["val"].shape
    return c.te(out, lambda x: lambda *i: x(*c.broadcast(i, shape, out)), c.value(a["self"]))


@converts(aten.cat.default)
def _cat(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    parts = [t for t in a["tensors"] if t.meta["val"].dim() == len(node.meta["val"].shape)]
    shape = node.meta["val"].shape
    axis, dtype = a["dim"] % len(shape), DTYPES[node.meta["val"].dtype]
    sizes = [c.size(t.meta["val"].shape[axis]) for t in parts]
    for t in parts:
        c.compute(t)
    last = all(t in c.last for t in parts)
    axis = last_of(range(len(shape))).index(axis) if last else axis

    ends = [functools.reduce(lambda p, q: p + q, sizes[: n + 1]) for n in range(len(sizes))]

    def compute(*buffers: Any) -> Any:
        def point(*i: Any) -> Any:
            values = [b(*i[:axis], i[axis] - end + size, *i[axis + 1 :]).astype(dtype) for b, end, size in zip(buffers, ends, sizes)]
            found = values[-1]
            for value, end in reversed(list(zip(values[:-1], ends))):
                found = tirx.if_then_else(i[axis] < end, value, found)
            return found

        return point

    if not last:
        return c.te(shape, compute, *(c.value(t) for t in parts))
    c.last[node] = c.te(last_of(shape), compute, *(c.last[t] for t in parts))
    return None


@converts(aten.gather.default)
def _gather(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = a["dim"] % len(node.meta["val"].shape)
    return c.te(node.meta["val"].shape, lambda x, at: lambda *i: x(*i[:axis], at(*i), *i[axis + 1 :]), c.value(a["self"]), c.value(a["index"]))


@converts(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = DTYPES[node.meta["val"].dtype]
    start, step = (c.size(a[n]) if n in a else tirx.const(d, "int64") for n, d in (("start", 0), ("step", 1)))
    return c.te(node.meta["val"].shape, lambda: lambda i: (start + i * step).astype(dtype))


@converts(
    aten.full.default,
    aten.ones.default,
    aten.zeros.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
)
def _full(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    value = a.get("fill_value", 1 if "ones" in str(node.target) else 0)
    dtype = DTYPES[node.meta["val"].dtype]
    return c.te(node.meta["val"].shape, lambda: lambda *i: elementwise.constant(value, dtype))


def _axes(a: dict[str, Any], shape: Sequence[Any]) -> list[int]:
    """The axes a reduction goes over; all of them where it names none."""
    given = a.get("dim")
    return sorted(range(len(shape)) if given is None or given == [] else [d % len(shape) for d in (given if isinstance(given, list | tuple) else [given])])


def _reduction(c: Converter, node: fx.Node, a: dict[str, Any], start: Any, join: Callable[[Any, Any], Any], value: Callable[[Any], Any] = lambda x: x) -> Any:
    """A reduction over `dim`, one result at a time."""
    shape, keep = a["self"].meta["val"].shape, a.get("keepdim", False)
    axes = _axes(a, shape)
    # sizes of axes come from the buffer: TVM gives it new symbols, which it does not put into the ranges of a reduction
    reducer = te.comm_reducer(lambda x, y: join(x, y), lambda dtype: elementwise.constant(start, str(dtype)))

    def compute(x: Any) -> Any:
        over = {d: te.reduce_axis((0, x.shape[d])) for d in axes}

        def point(*i: Any) -> Any:
            kept = iter(j for d, j in enumerate(i) if not (keep and d in over))
            return reducer(value(x(*(over[d] if d in over else next(kept) for d in range(len(shape))))), axis=list(over.values()))

        return point

    return c.te(node.meta["val"].shape, compute, c.value(a["self"]))


@converts(aten.sum.default, aten.sum.dim_IntList)
def _sum(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = DTYPES[node.meta["val"].dtype]
    return _reduction(c, node, a, 0, lambda x, y: x + y, lambda x: elementwise.constant(x, dtype))


@converts(aten.mean.default, aten.mean.dim)
def _mean(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, shape, out = DTYPES[node.meta["val"].dtype], a["self"].meta["val"].shape, node.meta["val"].shape
    axes = _axes(a, shape)
    c.compute(a["self"])
    if len(shape) == 4 and axes == [2, 3] and a["self"] in c.last and isinstance(shape[1], int) and dtype == "float32":
        return images.mean_of_image(c, node, a["self"])
    total = _reduction(c, node, a, 0, lambda x, y: x + y, lambda x: elementwise.constant(x, dtype))

    def compute(total: Any, x: Any) -> Any:  # x for its sizes
        count = functools.reduce(lambda p, q: p * q, (x.shape[d] for d in axes))
        return lambda *i: total(*i) / count.astype(dtype)

    return c.te(out, compute, total, c.value(a["self"]))


@converts(aten.amax.default)
def _amax(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(c, node, a, _lowest(node), tirx.max)


@converts(aten.amin.default)
def _amin(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = node.meta["val"].dtype
    return _reduction(c, node, a, math.inf if dtype.is_floating_point else torch.iinfo(dtype).max, tirx.min)


@converts(aten.any.default, aten.any.dim)
def _any(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(c, node, a, False, tirx.Or, lambda x: elementwise.cast(x, "bool"))


@converts(aten.all.default, aten.all.dim)
def _all(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    return _reduction(c, node, a, True, tirx.And, lambda x: elementwise.cast(x, "bool"))


def _lowest(node: fx.Node) -> float | int:
    dtype = node.meta["val"].dtype
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


@converts(aten.softmax.int, aten._softmax.default)
def _softmax(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape, dtype = node.meta["val"].shape, DTYPES[node.meta["val"].dtype]
    axis, kept = a["dim"] % len(shape), [s for d, s in enumerate(shape) if d != a["dim"] % len(shape)]

    def reduced(x: Any, start: float, join: Callable[[Any, Any], Any]) -> Any:
        reducer = te.comm_reducer(lambda x, y: join(x, y), lambda dtype: elementwise.constant(start, str(dtype)))

        def compute(x: Any) -> Any:
            over = te.reduce_axis((0, x.shape[axis]))
            return lambda *i: reducer(elementwise.constant(x(*i[:axis], over, *i[axis:]), dtype), axis=[over])

        return c.te(kept, compute, x)

    x = c.value(a["self"])
    largest = reduced(x, -math.inf, tirx.max)
    powers = c.te(shape, lambda x, m: lambda *i: elementwise.exp(elementwise.constant(x(*i), dtype) - m(*i[:axis], *i[axis + 1 :])), x, largest)
    total = reduced(powers, 0.0, lambda p, q: p + q)
    return c.te(shape, lambda p, t: lambda *i: p(*i) / t(*i[:axis], *i[axis + 1 :]), powers, total)


def _batched(c: Converter, x: fx.Node, y: fx.Node, out: Sequence[Any]) -> Any:
    """By its kernel, whose operands have one batch axis each: that of the result, or 1."""
    left, right = x.meta["val"].shape, y.meta["val"].shape
    if len(right) == 2:  # rows of all batches are rows of one product
        (m, batch), shared = (count_of(left), 1), (False, False)
    else:
        m, batch = left[-2], math.prod(out[:-2])
        shared = all(map(is_one, left[:-2])) and not is_one(batch), all(map(is_one, right[:-2])) and not is_one(batch)
    given = []
    for operand, sizes, one in ((x, (m, left[-1]), shared[0]), (y, (left[-1], out[-1]), shared[1])):
        value, shape = c.value(operand), operand.meta["val"].shape
        if len(right) > 2 and not one and not same_shape(shape[:-2], out[:-2]):
            wide = (*out[:-2], *shape[-2:])
            value = c.te(wide, lambda t, shape=shape, wide=wide: lambda *i: t(*c.broadcast(i, shape, wide)), value)
        given.append(c.reshaped(value, (1 if one else batch, *sizes)))
    plan = Plan.of(c.features, int(out[-1]) if isinstance(out[-1], int) else 0)
    what = Batched(*shared)
    found = c.kernel("matmul", (what, plan), lambda name: what.build(plan, name), given, [c.type((batch, m, out[-1]), "float32")])
    return c.reshaped(found, out)


@converts(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    """Of two activations; with a constant it is a product by then."""
    x, y = list(a.values())[:2]
    return _product(c, x, y, node.meta["val"].shape)


@converts(aten.addmm.default, aten.baddbmm.default)
def _added_product(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    """beta * added + alpha * x y."""
    added, x, y = list(a.values())[:3]
    shape, dtype = node.meta["val"].shape, DTYPES[node.meta["val"].dtype]
    alpha, beta = (elementwise.constant(a[n], dtype) for n in ("alpha", "beta"))

    def compute(product: Any, other: Any) -> Any:
        return lambda *i: product(*i) * alpha + other(*c.broadcast(i, added.meta["val"].shape, shape)) * beta

    return c.te(shape, compute, _product(c, x, y, shape), c.value(added))


def _product(c: Converter, x: fx.Node, y: fx.Node, out: Sequence[Any]) -> Any:
    """x y; of vectors, and of another type than float32, one value at a time: slow."""
    left, right = x.meta["val"].shape, y.meta["val"].shape
    vector, row = len(left) == 1, len(right) == 1
    if not vector and not row and x.meta["val"].dtype is torch.float32:
        return _batched(c, x, y, out)

    def compute(p: Any, q: Any) -> Any:
        k = te.reduce_axis((0, p.shape[-1]))

        def point(*i: Any) -> Any:
            rest = list(i)
            column = [] if row else [rest.pop()]
            line = [] if vector else [rest.pop()]
            one = c.broadcast(rest, left[: len(left) - 2], out[: len(rest)])
            other = c.broadcast(rest, right[: len(right) - 2], out[: len(rest)])
            return te.sum(p(*one, *line, k) * q(*other, k, *column), axis=[k])

        return point

    return c.te(out, compute, c.value(x), c.value(y))


@converts(*images.NORMS)
def _batch_norm(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    given = [c.weight((node, n), lambda t=t: t.float()) for n, t in zip(("scale", "shift"), images.scale_and_shift(c, a))]
    c.compute(a["input"])
    if a["input"] in c.last and node.target is aten.batch_norm.default:
        c.last[node] = c.te(last_of(a["input"].meta["val"].shape), lambda x, s, t: lambda *i: x(*i) * s(i[-1]) + t(i[-1]), c.last[a["input"]], *given)
        return None
    found = c.te(a["input"].meta["val"].shape, lambda x, s, t: lambda *i: x(*i) * s(i[1]) + t(i[1]), c.value(a["input"]), *given)
    return found if node.target is aten.batch_norm.default else [found]


@converts(aten.cumsum.default)
def _cumsum(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape, dtype = node.meta["val"].shape, DTYPES[node.meta["val"].dtype]
    axis = a["dim"] % len(shape)

    def compute(x: Any) -> Any:
        k = te.reduce_axis((0, x.shape[axis]))

        def point(*i: Any) -> Any:
            value = elementwise.constant(x(*i[:axis], k, *i[axis + 1 :]), dtype)
            return te.sum(tirx.Select(k <= i[axis], value, elementwise.constant(0, dtype)), axis=[k])

        return point

    return c.te(shape, compute, c.value(a["self"]))


@converts(aten.tril.default, aten.triu.default)
def _triangle(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype, lower = DTYPES[node.meta["val"].dtype], node.target is aten.tril.default

    def compute(x: Any) -> Any:
        def point(*i: Any) -> Any:
            distance = i[-1] - i[-2]
            kept = distance <= a["diagonal"] if lower else distance >= a["diagonal"]
            return tirx.Select(kept, x(*i), elementwise.constant(0, dtype))

        return point

    return c.te(node.meta["val"].shape, compute, c.value(a["self"]))


@converts(aten.repeat_interleave.self_int)
def _repeat(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    if a["dim"] is None:
        flat = c.reshaped(c.value(a["self"]), (a["self"].meta["val"].numel(),))
        return c.te(node.meta["val"].shape, lambda x: lambda i: x(tirx.floordiv(i, a["repeats"])), flat)
    axis = a["dim"] % len(node.meta["val"].shape)
    return c.te(node.meta["val"].shape, lambda x: lambda *i: x(*i[:axis], tirx.floordiv(i[axis], a["repeats"]), *i[axis + 1 :]), c.value(a["self"]))


@converts(aten.stack.default)
def _stack(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = a["dim"] % len(node.meta["val"].shape)

    def compute(*buffers: Any) -> Any:
        def point(*i: Any) -> Any:
            values = [b(*i[:axis], *i[axis + 1 :]) for b in buffers]
            return functools.reduce(lambda rest, pair: tirx.Select(i[axis].equal(pair[0]), pair[1], rest), enumerate(values[:-1]), values[-1])

        return point

    return c.te(node.meta["val"].shape, compute, *(c.value(t) for t in a["tensors"]))


@converts(aten.constant_pad_nd.default, aten.pad.default)
def _pad(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape, out = a["self"].meta["val"].shape, node.meta["val"].shape
    before = [0] * len(shape)
    for n in range(len(a["pad"]) // 2):
        before[len(shape) - 1 - n] = a["pad"][2 * n]
    dtype, value = DTYPES[node.meta["val"].dtype], a["value"] or 0

    def compute(x: Any) -> Any:
        def point(*i: Any) -> Any:
            spots = [j - c.size(b) for j, b in zip(i, before)]
            limits = [tirx.all(s >= 0, s < c.size(n)) for s, n in zip(spots, shape)]
            return tirx.if_then_else(tirx.all(*limits), x(*spots), elementwise.constant(value, dtype))

        return point

    return c.te(out, compute, c.value(a["self"]))


@converts(ours.rope.default)
def _rope(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape = node.meta["val"].shape
    half = int(shape[-1]) // 2

    def compute(x: Any, cos: Any, sin: Any) -> Any:
        def point(*i: Any) -> Any:
            turned = tirx.if_then_else(i[-1] < half, -x(*i[:-1], i[-1] + half), x(*i[:-1], i[-1] - half))
            angle = c.broadcast(i, a["cos"].meta["val"].shape, shape), c.broadcast(i, a["sin"].meta["val"].shape, shape)
            return x(*i) * cos(*angle[0]) + turned * sin(*angle[1])

        return point

    return c.te(shape, compute, *(c.value(a[n]) for n in ("x", "cos", "sin")))


@converts(aten.repeat.default)
def _tile(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape, out = a["self"].meta["val"].shape, node.meta["val"].shape
    return c.te(out, lambda x: lambda *i: x(*(tirx.floormod(j, c.size(s)) for j, s in zip(i[len(out) - len(shape) :], shape))), c.value(a["self"]))


@converts(aten.roll.default)
def _roll(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape = node.meta["val"].shape
    shifts = dict(zip((d % len(shape) for d in a["dims"]), a["shifts"]))

    def moved(index: Any, axis: int) -> Any:
        n = c.size(shape[axis])
        back = index + tirx.floormod(c.size(-shifts.get(axis, 0)), n)
        return tirx.Select(back >= n, back - n, back)  # not floormod: TVM 0.27 loses the shift in (i % n + shift) % n

    return c.te(shape, lambda x: lambda *i: x(*(moved(j, axis) for axis, j in enumerate(i))), c.value(a["self"]))


@converts(aten.flip.default)
def _flip(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    shape = node.meta["val"].shape
    turned = {d % len(shape) for d in a["dims"]}
    return c.te(shape, lambda x: lambda *i: x(*(c.size(n) - 1 - j if d in turned else j for d, (j, n) in enumerate(zip(i, shape)))), c.value(a["self"]))


@converts(aten.index.Tensor)
def _index(c: Converter, node: fx.Node, a: dict[str, Any]) -> Any:
    """By one tensor of integers along one axis; negative ones count from the end."""
    axis = next(i for i, n in enumerate(a["indices"]) if n is not None)
    index, size = a["indices"][axis], c.size(a["self"].meta["val"].shape[axis])
    rank = len(index.meta["val"].shape)

    def compute(x: Any, at: Any) -> Any:
        def point(*i: Any) -> Any:
            spot = at(*i[axis : axis + rank])
            return x(*i[:axis], tirx.Select(spot < 0, spot.astype("int64") + size, spot.astype("int64")), *i[axis + rank :])

        return point

    return c.te(node.meta["val"].shape, compute, c.value(a["self"]), c.value(index))


def index_why_not(node: fx.Node) -> str | None:
    """Only one tensor of integers is known."""
    given = [n for n in arguments(node)["indices"] if n is not None]
    return (
        None
        if len(given) == 1 and not given[0].meta["val"].dtype.is_floating_point and given[0].meta["val"].dtype is not torch.bool
        else "it has several indices"
    )


UNLESS: dict[Any, Callable[[fx.Node], str | None]] = {
    **images.UNLESS,
    aten.index.Tensor: index_why_not,
}
"""Converters that do not take every call of their op."""
