"""z = x y of two activations, [b, m, k] @ [b, k, n], as one kernel: register tiles of `gemm` over panels of y packed as they come.

A panel is some columns of one y: it is copied into scratch once, where the tiles of all rows of x read it in order. The columns behind the
last whole panel go in panels of one vector, the last of which begins a vector from the end, as the last tile of rows does; nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .compat import IRBuilder, T, tvm
from .gemm import Plan
from .rows import settled, span, wide

tirx = tvm.tirx

Weights = Callable[[Any, int, int], Any]
"""(k, first column in the panel, lanes) -> those values of y."""


@dataclass(frozen=True)
class Batched:
    """What one kernel computes, of any sizes. `build`: a function of (x, y, z). A shared operand has a batch of 1."""

    x_shared: bool = False
    y_shared: bool = False

    def build(self, plan: Plan, name: str) -> Any:
        """The PrimFunc."""
        return _Kernel(self, plan).build(name)


class _Kernel:
    def __init__(self, what: Batched, plan: Plan) -> None:
        self.what, self.plan = what, plan

    def build(self, name: str) -> Any:
        lanes, columns = self.plan.lanes, self.plan.columns
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            b, m, k, n = (T.int64() for _ in range(4))
            shapes = (1 if self.what.x_shared else b, m, k), (1 if self.what.y_shared else b, k, n), (b, m, n)
            self.x, self.y, self.z = (T.match_buffer(T.arg(key, T.handle()), shape, "float32", align=4) for key, shape in zip("xyz", shapes))
            self.m, self.k, self.n = m, k, n
            whole = tirx.floordiv(n, columns)
            panels = whole + tirx.floordiv(n - whole * columns + lanes - 1, lanes)
            with T.parallel(0, b * panels) as task:
                batch, panel = settled(tirx.floordiv(task, panels)), settled(tirx.floormod(task, panels))
                with T.If(panel < whole):
                    with T.Then():
                        self._panel(batch, settled(panel * columns), columns)
                    with T.Else(), T.If(n >= lanes):
                        with T.Then():
                            self._panel(batch, settled(tirx.min(whole * columns + (panel - whole) * lanes, n - lanes)), lanes)
                        with T.Else(), T.serial(0, n) as column:
                            self._panel(batch, column, 1)
        return builder.get()

    def _panel(self, batch: Any, first: Any, width: int) -> None:
        """All rows x some columns: packed where there are tiles of rows to read them, else read where they are."""
        rows, lanes = self.plan.rows, min(self.plan.lanes, width)
        source = 0 if self.what.y_shared else batch

        def there(k: Any, at: int, many: int) -> Any:
            return self.y[source, k, span(first + at, many)]

        with T.If(self.m >= rows):
            with T.Then():
                packed = T.alloc_buffer((self.k * width,), "float32", scope="global")
                with T.serial(0, self.k) as k:
                    for at in range(0, width, lanes):
                        T.buffer_store(packed, there(k, at, lanes), [span(k * width + at, lanes)])
                with T.serial(0, tirx.floordiv(self.m + rows - 1, rows)) as t:
                    self._tile(batch, settled(tirx.min(t * rows, self.m - rows)), rows, first, width, lambda k, at, many: packed[span(k * width + at, many)])
            with T.Else(), T.serial(0, self.m) as row:
                self._tile(batch, row, 1, first, width, there)

    def _tile(self, batch: Any, row: Any, rows: int, first: Any, width: int, y: Weights) -> None:
        """Rows x the columns of a panel, in registers over all of k."""
        lanes = min(self.plan.lanes, width)
        source = 0 if self.what.x_shared else batch
        starts = range(0, width, lanes)
        sums = [T.alloc_buffer((width,), "float32", scope="global") for _ in range(rows)]
        for total in sums:
            for at in starts:
                T.buffer_store(total, wide(T.float32(0), span(at, lanes)), [span(at, lanes)])
        with T.serial(0, self.k) as k:
            for i, total in enumerate(sums):
                for at in starts:
                    spot = span(at, lanes)
                    T.buffer_store(total, total[spot] + wide(self.x[source, row + i, k], spot) * y(k, at, lanes), [spot])
        for i, total in enumerate(sums):
            for at in starts:
                T.buffer_store(self.z, total[span(at, lanes)], [batch, row + i, span(first + at, lanes)])
