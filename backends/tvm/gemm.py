"""y = act(act(x W^T + b) + r) as one kernel: register tiles over packed weights, any number of rows, the epilogue in the tile.

Weights are packed once at compile time into panels of `Plan.columns` output channels, [panels, in, columns] (and for int8
[panels, in / 4, columns, 4], the operand of VPDPBUSD), so that the inner loop reads them in order. The rows of x are walked in tiles; the
last tile begins `rows` from the end and computes some rows twice, so that no tile is ever masked. Fewer rows than a tile go one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arithmetic import ACTIVATIONS, like
from .compat import IRBuilder, T, tvm
from .rows import Sink

tirx = tvm.tirx

VNNI = "llvm.x86.avx512.vpdpbusd.512"
BLOCK = 64
"""Rows of x that stay in cache while all panels pass."""
QUANTIZED_BLOCK = 16
"""Rows whose outputs wait, all of them, for their largest value."""


def lanes_of(features: Collection[str]) -> int:
    """Values of float32 in a vector of a CPU with these features."""
    return 16 if "avx512f" in features else 8


@dataclass(frozen=True)
class Plan:
    """How a CPU computes a product: lanes of float32 in a vector, output channels of a panel, rows of a tile, whether it has VPDPBUSD."""

    lanes: int
    columns: int
    rows: int
    vnni: bool

    @classmethod
    def of(cls, features: Collection[str], out: int) -> Plan:
        """For a CPU with these features: 24 accumulators of the 32 registers of AVX-512, 12 of the 16 of AVX2. Panels that fit `out` best."""
        lanes = lanes_of(features)
        wide = lanes == 16
        choices = ((3 * lanes, 8), (4 * lanes, 6), (2 * lanes, 8)) if wide else ((2 * lanes, 6), (lanes, 8))
        columns, rows = min(choices, key=lambda c: -out % c[0])
        return cls(lanes, columns, rows, wide and "avx512_vnni" in features)

    def panels(self, out: int) -> int:
        """Panels that hold `out` channels."""
        return -(-out // self.columns)


def pack(w: Tensor, plan: Plan) -> Tensor:
    """w [out, in] of a float type -> [panels, in, columns]; channels that aren't there are zero."""
    out, width = w.shape
    padded = torch.nn.functional.pad(w.detach(), (0, 0, 0, -out % plan.columns))
    return padded.view(-1, plan.columns, width).transpose(1, 2).contiguous()


def pack_codes(w: Tensor, plan: Plan) -> Tensor:
    """w [out, in] of int8 -> [panels, ceil(in / 4), columns * 4]."""
    out, width = w.shape
    padded = torch.nn.functional.pad(w.detach(), (0, -width % 4, 0, -out % plan.columns))
    return padded.view(-1, plan.columns, padded.shape[1] // 4, 4).transpose(1, 2).flatten(2).contiguous()


def pack_channels(values: Tensor, plan: Plan) -> Tensor:
    """A number an output channel, with as many zeros behind as the panels have channels more."""
    return torch.nn.functional.pad(values.detach(), (0, -values.shape[0] % plan.columns)).contiguous()


@dataclass(frozen=True)
class Product:
    """What one kernel computes. `build`: a function of (x, [step], w, [offset, scale], [b], [r], [grid], y, [steps of y])."""

    width: int
    out: int
    codes: bool = False
    """x is what `rows.quantize` gives, uint8 codes with a step a row; the weights are int8 with a scale a channel."""
    bias: bool = True
    activation: str | None = None
    residual: bool = False
    """A tensor of the result's shape is added after the activation."""
    stepped: bool = True
    """Codes of x have a step a row; else one for all, which is part of `scale`."""
    sink: Sink | None = None
    """The result is quantized again: what the next product reads."""
    after: str | None = None
    """The activation behind the addition."""

    @property
    def padded(self) -> int:
        """Channels of x as the kernel reads it: codes come in fours."""
        return Sink.width(self.width) if self.codes else self.width

    def build(self, plan: Plan, name: str) -> Any:
        """The PrimFunc."""
        return Kernel(self, plan).build(name)


class Kernel:
    """Writes a product."""

    def __init__(self, product: Product, plan: Plan) -> None:
        self.product, self.plan = product, plan
        self.vectors = plan.columns // plan.lanes

    def build(self, name: str) -> Any:
        product, plan = self.product, self.plan
        panels = plan.panels(product.out)
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            n = self.n = T.int64()

            def given(key: str, shape: tuple, dtype: str) -> Any:
                return T.match_buffer(T.arg(key, T.handle()), shape, dtype, align=4)

            if product.codes:
                self.x = given("x", (n, product.padded), "uint8")
                self.step = given("step", (n,), "float32") if product.stepped else None
                self.w = given("w", (panels, product.padded // 4, plan.columns * 4), "int8")
                self.offset, self.scale = (given(key, (panels * plan.columns,), dtype) for key, dtype in (("offset", "int32"), ("scale", "float32")))
            else:
                self.x = self._operand(given)
                self._weights(given, panels)
            self.b = given("b", (panels * plan.columns,), "float32") if product.bias else None
            self.r = given("r", (n, product.out), "float32") if product.residual else None
            sink = product.sink
            grid = sink.reads() if sink else None
            self.y = given("y", (n, sink.width(product.out) if sink else product.out), "uint8" if sink else "float32")
            self.own = (grid if sink.fixed else sink.writes(n)) if sink else None
            if sink is not None and not sink.fixed:
                self._a_step_a_row(panels, sink)
            else:
                self._plain(panels)
        return builder.get()

    def _operand(self, given: Callable[..., Any]) -> Any:
        """Declare x."""
        return given("x", (self.n, self.product.width), "float32")

    def _weights(self, given: Callable[..., Any], panels: int) -> None:
        """Declare them."""
        self.w = given("w", (panels, self.product.width, self.plan.columns), "float32")

    def _plain(self, panels: int) -> None:
        """Blocks of rows and groups of panels side by side, so that few rows still have work for all threads."""
        n = self.n
        groups = next(g for g in (8, 6, 4, 3, 2, 1) if panels % g == 0)
        with T.parallel(0, tirx.floordiv(n + BLOCK - 1, BLOCK) * groups) as task:
            block, group = tirx.floordiv(task, groups), tirx.floormod(task, groups)
            with T.serial(0, panels // groups) as p:
                panel = group * (panels // groups) + p
                with T.If(n >= self.plan.rows):
                    with T.Then():
                        self._block(block * BLOCK, panel, panels)
                    with T.Else(), T.serial(0, n) as row:
                        self._row(row, panel, panels)

    def _block(self, first: Any, panel: Any, panels: int) -> None:
        """A block of rows x one panel."""
        n, rows = self.n, self.plan.rows
        with T.serial(0, tirx.floordiv(tirx.min(n - first, BLOCK) + rows - 1, rows)) as t:
            self._tile(tirx.min(first + t * rows, n - rows), rows, panel, panels, self.y)

    def _row(self, row: Any, panel: Any, panels: int) -> None:
        """A single row x one panel."""
        self._tile(row, 1, panel, panels, self.y)

    def _a_step_a_row(self, panels: int, sink: Sink) -> None:
        """A block of rows at a time: its outputs, then its steps and codes while they are in cache."""
        n, rows, out = self.n, self.plan.rows, self.product.out
        with T.parallel(0, tirx.floordiv(n + QUANTIZED_BLOCK - 1, QUANTIZED_BLOCK)) as block:
            count = tirx.min(n - block * QUANTIZED_BLOCK, QUANTIZED_BLOCK)
            first = block * QUANTIZED_BLOCK
            held = T.alloc_buffer((QUANTIZED_BLOCK, out), "float32", scope="global")
            with T.serial(0, panels) as panel, T.If(count >= rows):
                with T.Then(), T.serial(0, tirx.floordiv(count + rows - 1, rows)) as t:
                    start = tirx.min(t * rows, count - rows)
                    self._tile(first + start, rows, panel, panels, held, start)
                with T.Else(), T.serial(0, count) as row:
                    self._tile(first + row, 1, panel, panels, held, row)
            with T.serial(0, count) as row:
                sink.emit_row(lambda at: held[row, at], self.y, self.own, first + row, out, self.plan.lanes)

    def _tile(self, row: Any, rows: int, panel: Any, panels: int, y: Any, y_row: Any = None) -> None:
        """Rows x one panel: accumulators in registers over all of `width`, then the epilogue."""
        lanes, columns = self.plan.lanes, self.plan.columns
        codes, dtype = self.product.codes, "int32" if self.product.codes else "float32"
        sums = [T.alloc_buffer((columns,), dtype, scope="global") for _ in range(rows)]  # "global" and below 1 KiB: on the stack, so in registers
        for total in sums:
            for v in range(self.vectors):
                start = self.offset[T.ramp(panel * columns + v * lanes, 1, lanes)] if codes else tirx.Broadcast(T.float32(0), lanes)
                T.buffer_store(total, start, [T.ramp(v * lanes, 1, lanes)])
        self._accumulate(sums, row, panel)
        for i, total in enumerate(sums):
            self._finish(total, row + i, row + i if y_row is None else y_row + i, panel, panels, y)

    def _accumulate(self, sums: list[Any], row: Any, panel: Any) -> None:
        """Add the products of rows from `row` on to their sums."""
        codes, lanes = self.product.codes, self.plan.lanes
        with T.serial(0, self.product.padded // 4 if codes else self.product.width) as k:
            for i, total in enumerate(sums):
                for v in range(self.vectors):
                    at = T.ramp(v * lanes, 1, lanes)
                    T.buffer_store(total, self._dot(total[at], row + i, k, panel, v) if codes else self._multiply(total[at], row + i, k, panel, v), [at])

    def _multiply(self, total: Any, row: Any, k: Any, panel: Any, v: int) -> Any:
        lanes = self.plan.lanes
        return total + tirx.Broadcast(self.x[row, k], lanes) * self.w[panel, k, T.ramp(v * lanes, 1, lanes)]

    def _dot(self, total: Any, row: Any, k: Any, panel: Any, v: int) -> Any:
        """total += four products a lane, of unsigned codes of x and signed ones of w."""
        lanes = self.plan.lanes
        if self.plan.vnni:
            four = tirx.reinterpret("int32", self.x[row, T.ramp(k * 4, 1, 4)])
            return T.call_llvm_intrin(
                f"int32x{lanes}",
                VNNI,
                total,
                tirx.reinterpret(f"uint8x{4 * lanes}", tirx.Broadcast(four, lanes)),
                self.w[panel, k, T.ramp(v * lanes * 4, 1, lanes * 4)],
            )
        for part in range(4):
            w = self.w[panel, k, T.ramp(v * lanes * 4 + part, 4, lanes)].astype(f"int32x{lanes}")
            total = total + tirx.Broadcast(self.x[row, k * 4 + part].astype("int32"), lanes) * w
        return total

    def _finish(self, total: Any, row: Any, y_row: Any, panel: Any, panels: int, y: Any) -> None:
        """The epilogue of one row of a tile. Channels behind the last are left out, those of a short vector one by one."""
        lanes, columns, out = self.plan.lanes, self.plan.columns, self.product.out

        def store(v: int) -> None:
            self._store(total, row, y_row, panel * columns + v * lanes, v * lanes, lanes, y)

        whole = out % columns == 0
        if whole:
            for v in range(self.vectors):
                store(v)
            return
        short = out - (panels - 1) * columns
        with T.If(panel < panels - 1):
            with T.Then():
                for v in range(self.vectors):
                    store(v)
            with T.Else():
                for v in range(short // lanes):
                    store(v)
                for c in range(short - short % lanes, short):
                    self._store(total, row, y_row, panel * columns + c, c, 1, y)

    def _store(self, total: Any, row: Any, y_row: Any, column: Any, at: int, lanes: int, y: Any) -> None:
        where = T.ramp(column, 1, lanes) if lanes > 1 else column
        value = total[T.ramp(at, 1, lanes) if lanes > 1 else at]
        if self.product.codes:
            scale = self.scale[where]
            if self.step is not None:
                scale = scale * (tirx.Broadcast(self.step[row], lanes) if lanes > 1 else self.step[row])
            value = value.astype(like("float32", value)) * scale
        if self.b is not None:
            value = value + self.b[where]
        if self.product.activation:
            value = ACTIVATIONS[self.product.activation](value)
        if self.r is not None:
            value = value + self.r[row, where]
        if self.product.after:
            value = ACTIVATIONS[self.product.after](value)
        if self.product.sink is not None and self.product.sink.fixed:
            value = self.product.sink.code(value, self.own)
        T.buffer_store(y, value, [y_row, where])
