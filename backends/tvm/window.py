"""Sums, products and maxima over windows of an image, each channel for itself: depthwise convolutions and pools as one kernel.

Images have their channels last, [n, h, w, channels], so that a vector holds channels and no place is masked: what of a window lies in the
padding is left out of its loops. Places whose windows lie inside the image come in tiles, which read a vector of x once for all windows it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .arithmetic import ACTIVATIONS
from .compat import IRBuilder, T, tvm
from .rows import settled, span, wide

tirx = tvm.tirx

TILE = 4
"""Places beside each other."""


@dataclass(frozen=True)
class Window:
    """What one kernel computes. `build`: a function of (x, [w], [b], y); w is [kernel, kernel, channels], b [channels].

    Of a mean no padding is known; where it has no kernel, it is of the whole image, and y [n, 1, 1, channels].
    """

    kind: Literal["product", "maximum", "mean"]
    channels: int
    kernel: tuple[int, int] | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    activation: str | None = None

    def build(self, lanes: int, name: str) -> Any:
        """The PrimFunc."""
        return _Kernel(self, lanes).build(name)


class _Kernel:
    def __init__(self, what: Window, lanes: int) -> None:
        self.what = what
        self.lanes = min(lanes, 1 << what.channels.bit_length() - 1)
        most = 3 if lanes == 16 else 2  # vectors of channels, so that a tile of them stays in registers
        vectors = range(1, min(most, what.channels // self.lanes) + 1)
        self.vectors = min(vectors, key=lambda v: (-(-what.channels // (v * self.lanes)) * v, -v))
        self.width = self.vectors * self.lanes

    def build(self, name: str) -> Any:
        what, channels = self.what, self.what.channels
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            n, self.h, self.w, self.out_h, self.out_w = (T.int64() for _ in range(5))

            def given(key: str, shape: tuple) -> Any:
                return T.match_buffer(T.arg(key, T.handle()), shape, "float32", align=4)

            self.x = given("x", (n, self.h, self.w, channels))
            self.weight = given("weight", (*what.kernel, channels)) if what.kernel and what.kind == "product" else None
            self.b = given("b", (channels,)) if what.bias else None
            self.y = given("y", (n, self.out_h, self.out_w, channels))
            parts = -(-channels // self.width)
            with T.parallel(0, n * parts * self.out_h) as task:
                image, rest = settled(tirx.floordiv(task, parts * self.out_h)), settled(tirx.floormod(task, parts * self.out_h))
                part, row = settled(tirx.floordiv(rest, self.out_h)), settled(tirx.floormod(rest, self.out_h))
                self._row(image, row, settled(tirx.min(part * self.width, channels - self.width)))
        return builder.get()

    def _row(self, image: Any, row: Any, first: Any) -> None:
        """A row of y, channels from `first` on: the places inside in tiles, the last of which goes back; those at the sides one by one."""
        if self.what.kernel is None:
            self._place(image, row, tirx.const(0, "int64"), first)
            return
        stride, padding = self.what.stride[1], self.what.padding[1]
        reach = (self.what.kernel[1] - 1) * self.what.dilation[1]
        begin = -(-padding // stride)
        end = settled(tirx.min(self.out_w, tirx.floordiv(self.w + padding - reach - 1, stride) + 1))
        inside = settled(tirx.Select(end - begin >= TILE, end - begin, tirx.const(0, "int64")))
        before = settled(tirx.Select(inside > 0, tirx.const(begin, "int64"), tirx.const(0, "int64")))
        with T.serial(0, self.out_w - inside) as side:
            self._place(image, row, settled(tirx.Select(side < before, side, side + inside)), first)
        with T.serial(0, tirx.floordiv(inside + TILE - 1, TILE)) as t:
            self._tile(image, row, settled(tirx.min(begin + t * TILE, end - TILE)), first)

    def _steps(self, axis: int, at: Any, body: Callable[[Any, Any], None]) -> None:
        """`body(offset in the window, where in x)` for the rows or columns of a window that lie in the image.

        Each is asked for: ranges, of the maxima and minima that they are, take LLVM a second a kernel.
        """
        what, size = self.what, (self.h, self.w)[axis]
        if what.kernel is None:
            with T.serial(0, size) as offset:
                body(offset, offset)
            return
        with T.serial(0, what.kernel[axis]) as offset:
            spot = settled(self._spot(axis, at, offset))
            if what.padding[axis]:
                with T.If(tirx.And(spot >= 0, spot < size)), T.Then():
                    body(offset, spot)
            else:
                body(offset, spot)

    def _spot(self, axis: int, at: Any, offset: Any) -> Any:
        """Where in x."""
        return at * self.what.stride[axis] - self.what.padding[axis] + offset * self.what.dilation[axis]

    def _place(self, image: Any, row: Any, column: Any, first: Any) -> None:
        """One value of y in all channels of a part."""
        (total,) = self._sums(1)

        def one(i: Any, line: Any, j: Any, spot: Any) -> None:
            for v in range(self.vectors):
                self._join(total, v, self._read(image, line, spot, first, v), self._weight(i, j, first, v))

        self._steps(0, row, lambda i, line: self._steps(1, column, lambda j, spot: one(i, line, j, spot)))
        self._finish(total, image, row, column, first)

    def _tile(self, image: Any, row: Any, column: Any, first: Any) -> None:
        """Values of y beside each other, whose windows lie inside; but for rows above and below."""
        sums = self._sums(TILE)

        def one(i: Any, line: Any) -> None:
            assert self.what.kernel is not None
            for j in range(self.what.kernel[1]):
                for v in range(self.vectors):
                    weight = self._weight(i, j, first, v)
                    for t, total in enumerate(sums):
                        self._join(total, v, self._read(image, line, self._spot(1, column + t, j), first, v), weight)

        self._steps(0, row, one)
        for t, total in enumerate(sums):
            self._finish(total, image, row, column + t, first)

    def _sums(self, count: int) -> list[Any]:
        start = T.float32(-math.inf) if self.what.kind == "maximum" else T.float32(0)
        sums = [T.alloc_buffer((self.width,), "float32", scope="global") for _ in range(count)]
        for total in sums:
            for v in range(self.vectors):
                at = span(v * self.lanes, self.lanes)
                T.buffer_store(total, wide(start, at), [at])
        return sums

    def _read(self, image: Any, i: Any, j: Any, first: Any, v: int) -> Any:
        return self.x[image, i, j, span(first + v * self.lanes, self.lanes)]

    def _weight(self, i: Any, j: Any, first: Any, v: int) -> Any:
        return self.weight[i, j, span(first + v * self.lanes, self.lanes)] if self.weight is not None else None

    def _join(self, total: Any, v: int, x: Any, weight: Any) -> None:
        at = span(v * self.lanes, self.lanes)
        value = tirx.max(total[at], x) if self.what.kind == "maximum" else total[at] + (x if weight is None else x * weight)
        T.buffer_store(total, value, [at])

    def _finish(self, total: Any, image: Any, row: Any, column: Any, first: Any) -> None:
        """The epilogue."""
        for v in range(self.vectors):
            where = span(first + v * self.lanes, self.lanes)
            value = total[span(v * self.lanes, self.lanes)]
            if self.what.kind == "mean":
                count = T.float32(math.prod(self.what.kernel)) if self.what.kernel else (self.h * self.w).astype("float32")
                value = value * wide(T.float32(1) / count, where)
            if self.b is not None:
                value = value + self.b[where]
            if self.what.activation:
                value = ACTIVATIONS[self.what.activation](value)
            T.buffer_store(self.y, value, [image, row, column, where])
