"""Kernels that walk a tensor row by row: normalisations, with a sum before them, and the quantization of what follows.

A row is read from memory once: its sum and its normalised values stay in a scratch row, which fits in L1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .arithmetic import const, like
from .compat import IRBuilder, T, tvm

tirx = tvm.tirx

PARTS = 2
"""Vectors of partial sums: they hide the latency of an addition."""


def pieces(width: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, lanes) of a row: whole vectors in a loop, what is left one by one."""
    whole = width // lanes
    if whole:
        yield 0, whole, lanes
    if width % lanes:
        yield whole * lanes, width % lanes, 1


def each(width: int, lanes: int, body: Callable[[Any], None]) -> None:
    """`body(index)` for all of a row, the index a ramp of lanes or one number."""
    for start, count, many in pieces(width, lanes):
        with T.serial(0, count) as k:
            body(T.ramp(start + k * many, 1, many) if many > 1 else start + k)


def span(first: Any, lanes: int) -> Any:
    """The index of some values beside each other."""
    return T.ramp(first, 1, lanes) if lanes > 1 else first


def settled(number: Any) -> Any:
    """An int64 computed here once: what uses a bound variable is compiled with its definition put in, which takes seconds where they pile up."""
    buffer = T.alloc_buffer((1,), "int64", scope="global")
    T.buffer_store(buffer, number, [0])
    return buffer[0]


def further(at: Any, offset: Any) -> Any:
    """An index, or a ramp of them, moved on."""
    return T.ramp(at.base + offset, at.stride, at.lanes) if isinstance(at, tirx.Ramp) else at + offset


def folded(buffer: Any, lanes: int, join: Callable[[Any, Any], Any]) -> Any:
    """One value of the `lanes` of a buffer, as a tree."""
    while lanes > 1:
        lanes //= 2
        low, high = (T.ramp(at, 1, lanes) if lanes > 1 else at for at in (0, lanes))
        T.buffer_store(buffer, join(buffer[low], buffer[high]), [low])
    return buffer[0]


def reduced(width: int, lanes: int, start: float, join: Callable[[Any, Any], Any], value: Callable[[Any], Any]) -> Any:
    """join over `value(index)` of a row, from `start`, as a scalar expression."""
    parts = T.alloc_buffer((PARTS * lanes,), "float32", scope="global")
    for p in range(PARTS):
        T.buffer_store(parts, tirx.Broadcast(T.float32(start), lanes), [T.ramp(p * lanes, 1, lanes)])
    step = PARTS * lanes
    with T.serial(0, width // step) as k:
        for p in range(PARTS):
            at = T.ramp(p * lanes, 1, lanes)
            T.buffer_store(parts, join(parts[at], value(T.ramp(k * step + p * lanes, 1, lanes))), [at])
    done = width - width % step
    if width - done >= lanes:
        at = T.ramp(0, 1, lanes)
        T.buffer_store(parts, join(parts[at], value(T.ramp(done, 1, lanes))), [at])
        done += lanes
    if width > done:
        with T.serial(0, width - done) as k:
            T.buffer_store(parts, join(parts[0], value(done + k)), [0])
    return folded(parts, step, join)


@dataclass(frozen=True)
class Sink:
    """How a result is quantized for the int8 product that reads it: to uint8 codes with a step a row as it comes, or on a fixed grid.

    `reads` and `writes` declare its own argument: the grid (1 / step, zero point), last of a kernel's inputs, or the steps, last of its outputs.
    """

    high: int = 127
    """The largest code of a row, its zero being 128."""
    fixed: bool = False

    @staticmethod
    def width(channels: int) -> int:
        """Codes come in fours."""
        return channels + -channels % 4

    def reads(self) -> Any:
        """The buffer of the fixed grid, or None."""
        return T.match_buffer(T.arg("grid", T.handle()), (2,), "float32", align=4) if self.fixed else None

    def writes(self, n: Any) -> Any:
        """The buffer of the rows' steps, or None."""
        return None if self.fixed else T.match_buffer(T.arg("steps", T.handle()), (n,), "float32", align=4)

    def code(self, x: Any, grid: Any) -> Any:
        """Codes on the fixed grid: clip(round(x / step) + zero, 0, 255), half to even."""
        like_x = const(0.0, x)
        inverse, zero = grid[0] + like_x, grid[1] + like_x
        return _rounded(tirx.min(tirx.max(x * inverse, -zero), const(255.0, x) - zero), zero)

    def emit_row(self, value: Callable[[Any], Any], codes: Any, own: Any, row: Any, width: int, lanes: int) -> None:
        """Write the codes of one row, and its step (1 for a row of zeros). own: the buffer of the grid or the steps."""
        if self.fixed:
            each(width, lanes, lambda at: T.buffer_store(codes, self.code(value(at), own), [row, at]))
        else:
            largest = reduced(width, lanes, 0.0, tirx.max, lambda at: tirx.abs(value(at)))
            scale = T.alloc_buffer((1,), "float32", scope="global")
            step = largest / T.float32(self.high)
            T.buffer_store(scale, tirx.Select(step == T.float32(0), T.float32(1), step), [0])
            T.buffer_store(own, scale[0], [row])
            T.buffer_store(scale, T.float32(1) / scale[0], [0])
            each(width, lanes, lambda at: T.buffer_store(codes, _rounded(value(at) * wide(scale[0], at), const(128.0, value(at))), [row, at]))
        if width % 4:
            with T.serial(0, -width % 4) as k:
                T.buffer_store(codes, T.uint8(0), [row, width + k])


def _rounded(x: Any, zero: Any) -> Any:
    """zero + x to the nearest, half to even, as uint8: + 1.5 * 2^23 leaves the integer in the last bits of the sum."""
    bits = tirx.reinterpret(like("int32", x), x + const(12582912.0, x)) + zero.astype(like("int32", x))
    return (bits & const(255, bits)).astype(like("uint8", x))


def quantize(width: int, sink: Sink, lanes: int, name: str) -> Any:
    """A function of (x [n, width], [grid], codes uint8 [n, width rounded up to fours], [steps])."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(T.arg("x", T.handle()), (n, width), "float32", align=4)
        grid = sink.reads()
        codes = T.match_buffer(T.arg("codes", T.handle()), (n, sink.width(width)), "uint8", align=4)
        own = grid if sink.fixed else sink.writes(n)
        with T.parallel(0, n) as row:
            sink.emit_row(lambda at: x[row, at], codes, own, row, width, lanes)
    return builder.get()


@dataclass(frozen=True)
class Norm:
    """y = norm(x [+ r]) * w [+ b] over rows. `build`: a function of (x, [r], [w], [b], [grid], [y], [h], [codes], [steps]), h being x + r."""

    width: int
    eps: float
    centred: bool = True
    """LayerNorm; without the mean (and b) it is RMSNorm."""
    residual: bool = False
    weight: bool = True
    bias: bool = True
    keep_y: bool = True
    keep_sum: bool = False
    sink: Sink | None = None

    def build(self, lanes: int, name: str) -> Any:
        """The PrimFunc."""
        d = self.width
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            n = T.int64()

            def given(key: str, shape: tuple, wanted: bool, dtype: str = "float32") -> Any:
                return T.match_buffer(T.arg(key, T.handle()), shape, dtype, align=4) if wanted else None

            x, r = given("x", (n, d), True), given("r", (n, d), self.residual)
            w, b = given("w", (d,), self.weight), given("b", (d,), self.bias)
            grid = self.sink.reads() if self.sink else None
            y, h = given("y", (n, d), self.keep_y), given("h", (n, d), self.keep_sum)
            codes = given("codes", (n, Sink.width(d)), self.sink is not None, "uint8")
            own = (grid if self.sink.fixed else self.sink.writes(n)) if self.sink else None
            with T.parallel(0, n) as row:
                held = T.alloc_buffer((d,), "float32", scope="global")

                def add(at: Any, row: Any = row, held: Any = held) -> None:
                    total = x[row, at] + r[row, at] if self.residual else x[row, at]
                    T.buffer_store(held, total, [at])
                    if self.keep_sum:
                        T.buffer_store(h, total, [row, at])

                each(d, lanes, add)
                mean = T.alloc_buffer((1,), "float32", scope="global")
                scale = T.alloc_buffer((1,), "float32", scope="global")
                total = reduced(d, lanes, 0.0, lambda a, c: a + c, lambda at: held[at]) if self.centred else T.float32(0)
                T.buffer_store(mean, total / T.float32(d), [0])

                def deviation(at: Any, held: Any = held, mean: Any = mean) -> Any:
                    return held[at] - wide(mean[0], at) if self.centred else held[at]

                square = reduced(d, lanes, 0.0, lambda a, c: a + c, lambda at: deviation(at) * deviation(at))
                T.buffer_store(scale, T.float32(1) / tirx.sqrt(square / T.float32(d) + T.float32(self.eps)), [0])

                def normalise(at: Any, row: Any = row, held: Any = held, scale: Any = scale) -> None:
                    value = deviation(at) * wide(scale[0], at)
                    value = value * w[at] if self.weight else value
                    value = value + b[at] if self.bias else value
                    if self.keep_y:
                        T.buffer_store(y, value, [row, at])
                    if self.sink is not None:
                        T.buffer_store(held, value, [at])

                each(d, lanes, normalise)
                if self.sink is not None:
                    self.sink.emit_row(lambda at: held[at], codes, own, row, d, lanes)
        return builder.get()


def wide(scalar: Any, at: Any) -> Any:
    """A scalar with as many lanes as an index has."""
    return tirx.Broadcast(scalar, int(at.lanes)) if isinstance(at, tirx.Ramp) else scalar
