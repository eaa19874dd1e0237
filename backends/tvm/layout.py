"""Images whose channels move to the last axis, with zeros around for dense convolutions, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .compat import IRBuilder, T, tvm
from .rows import each, settled, wide

tirx = tvm.tirx

BLOCK = 64
"""Places that stay in cache while all their channels are written."""


@dataclass(frozen=True)
class Padded:
    """[n, channels, h, w] or [n, h, w, channels] -> [n, h', w', channels]. `build`: a function of (x, y).

    padding: so many rows above and below, so many columns left and right.
    """

    channels: int
    padding: tuple[int, int]
    channels_first: bool

    def build(self, lanes: int, name: str) -> Any:
        """The PrimFunc."""
        channels, (above, left) = self.channels, self.padding
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            n, h, w = (T.int64() for _ in range(3))
            shape = (n, channels, h, w) if self.channels_first else (n, h, w, channels)
            x = T.match_buffer(T.arg("x", T.handle()), shape, "float32", align=4)
            y = T.match_buffer(T.arg("y", T.handle()), (n, h + 2 * above, w + 2 * left, channels), "float32", align=4)

            def clear(image: Any, row: Any, first: Any, count: Any) -> None:
                with T.serial(0, count) as j:
                    each(channels, lanes, lambda at: T.buffer_store(y, wide(T.float32(0), at), [image, row, first + j, at]))

            def copy(image: Any, row: Any) -> None:
                if self.channels_first:
                    with T.serial(0, channels) as c, T.serial(0, w) as j:
                        T.buffer_store(y, x[image, c, row - above, j], [image, row, left + j, c])
                else:
                    with T.serial(0, w) as j:
                        each(channels, lanes, lambda at: T.buffer_store(y, x[image, row - above, j, at], [image, row, left + j, at]))

            with T.parallel(0, n * (h + 2 * above)) as task:
                image, row = settled(tirx.floordiv(task, h + 2 * above)), settled(tirx.floormod(task, h + 2 * above))
                with T.If(tirx.And(row >= above, row < h + above)):
                    with T.Then():
                        copy(image, row)
                        clear(image, row, 0, left)
                        clear(image, row, w + left, left)
                    with T.Else():
                        clear(image, row, 0, w + 2 * left)
        return builder.get()


@dataclass(frozen=True)
class ChannelsFirst:
    """[n, places, channels] -> [n, channels, places]. `build`: a function of (x, y)."""

    channels: int

    def build(self, name: str) -> Any:
        """The PrimFunc."""
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            n, places = T.int64(), T.int64()
            x = T.match_buffer(T.arg("x", T.handle()), (n, places, self.channels), "float32", align=4)
            y = T.match_buffer(T.arg("y", T.handle()), (n, self.channels, places), "float32", align=4)
            blocks = tirx.floordiv(places + BLOCK - 1, BLOCK)
            with T.parallel(0, n * blocks) as task:
                image, first = settled(tirx.floordiv(task, blocks)), settled(tirx.floormod(task, blocks) * BLOCK)
                with T.serial(0, self.channels) as c, T.serial(0, tirx.min(places - first, BLOCK)) as j:
                    T.buffer_store(y, x[image, first + j, c], [image, c, first + j])
        return builder.get()
