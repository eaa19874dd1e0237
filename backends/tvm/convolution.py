"""y = act(act(conv(x, W) + b) + r) as the product of `gemm` whose rows are windows of an image: read where they lie, no patches in memory.

The image has its channels last and its padding around it (`layout`), so that a window is a few runs of values: a tile of places holds where
each of its windows begins. With groups, a panel of output channels reads the channels of the groups it touches, and its weights are zero
where an output does not read: panels are as narrow as they can be, and for groups of 4 channels this still beats a product a group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compat import T, tvm
from .gemm import Kernel, Plan, Product, lanes_of, pack
from .rows import settled

tirx = tvm.tirx


@dataclass(frozen=True)
class Convolution(Product):
    """`build`: a function of (x [n, h, w, channels], w as `pack_windows` gives it, [b], [r], y); r and y are [places, out], `width` is a window of a panel."""

    channels: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def read(self) -> int:
        """Channels a panel reads at each place of a window."""
        return self.width // (self.kernel[0] * self.kernel[1])

    def first(self, panel: Any, plan: Plan) -> Any:
        """The first of them."""
        own, per = self.channels // self.groups, self.out // self.groups
        begin = panel * plan.columns // per * own if isinstance(panel, int) else tirx.floordiv(panel * plan.columns, per) * own
        return (min if isinstance(panel, int) else tirx.min)(begin, self.channels - self.read)

    def build(self, plan: Plan, name: str) -> Any:
        """The PrimFunc."""
        return _Kernel(self, plan).build(name)


def plan_of(features: Collection[str], channels: int, out: int, groups: int) -> tuple[Plan, int] | None:
    """How, and how many channels a panel reads at a place; None where panels would begin or end inside groups in different ways."""
    if groups == 1:
        return Plan.of(features, out), channels
    per, lanes = out // groups, lanes_of(features)
    widths = [v * lanes for v in (1, 2, 3, 4) if per % (v * lanes) == 0 or v * lanes % per == 0]
    if not widths:
        return None
    whole = [columns for columns in widths if per % columns == 0]
    columns = max(whole) if whole else min(widths)
    read = channels // groups * max(1, columns // per)
    rows = 8 if columns <= 3 * lanes else 6
    return (Plan(lanes, columns, rows if lanes == 16 else 6, vnni=False), read) if read <= channels else None


def pack_windows(w: Tensor, what: Convolution, plan: Plan) -> Tensor:
    """w [out, channels a group, *kernel] -> [panels, width, columns], a window's values in the order rows, columns, channels."""
    w = w.detach().flatten(2).transpose(1, 2)  # [out, places, own]
    if what.groups > 1:
        out, places, own = w.shape
        wide = torch.zeros(out, places, what.read)
        for o in range(out):
            begin = o // (out // what.groups) * own - what.first(o // plan.columns, plan)
            wide[o, :, begin : begin + own] = w[o]
        w = wide
    return pack(w.flatten(1), plan)


class _Kernel(Kernel):
    product: Convolution

    def _operand(self, given: Callable[..., Any]) -> Any:
        batch, self.image_h, self.image_w = (T.int64() for _ in range(3))
        return given("x", (batch, self.image_h, self.image_w, self.product.channels), "float32")

    def _accumulate(self, sums: list[Any], row: Any, panel: Any) -> None:
        what, lanes = self.product, self.plan.lanes
        places = self._places(row, len(sums))
        first = settled(what.first(panel, self.plan)) if what.groups > 1 else 0
        # without gaps between them, the columns and channels of a window are one run
        run = what.kernel[1] if what.dilation[1] == 1 and what.groups == 1 else 1
        with T.serial(0, what.kernel[0]) as i, T.serial(0, what.kernel[1] // run) as j, T.serial(0, run * what.read) as c:
            k = (i * (what.kernel[1] // run) + j) * run * what.read + c
            for total, (image, top, left) in zip(sums, places):
                x = tirx.Broadcast(self.x[image, top + i * what.dilation[0], left + j * what.dilation[1], first + c], lanes)
                for v in range(self.vectors):
                    at = T.ramp(v * lanes, 1, lanes)
                    T.buffer_store(total, total[at] + x * self.w[panel, k, at], [at])

    def _places(self, row: Any, count: int) -> list[tuple[Any, Any, Any]]:
        """(image, top, left) of the windows of some places, the first divided out, the others counted on."""
        what = self.product
        high, wide = (
            settled(tirx.floordiv(size - (kernel - 1) * dilation - 1, stride) + 1)
            for size, kernel, dilation, stride in zip((self.image_h, self.image_w), what.kernel, what.dilation, what.stride)
        )
        at = [T.alloc_buffer((count,), "int64", scope="global") for _ in range(3)]
        image, top, left = at
        T.buffer_store(image, tirx.floordiv(row, high * wide), [0])
        T.buffer_store(top, tirx.floordiv(row - image[0] * high * wide, wide), [0])
        T.buffer_store(left, row - (image[0] * high + top[0]) * wide, [0])
        for i in range(1, count):
            last, lowest = left[i - 1] + 1 >= wide, top[i - 1] + 1 >= high
            T.buffer_store(left, tirx.Select(last, tirx.const(0, "int64"), left[i - 1] + 1), [i])
            T.buffer_store(top, tirx.Select(last, tirx.Select(lowest, tirx.const(0, "int64"), top[i - 1] + 1), top[i - 1]), [i])
            T.buffer_store(image, tirx.Select(tirx.And(last, lowest), image[i - 1] + 1, image[i - 1]), [i])
        return [(image[i], settled(top[i] * what.stride[0]), settled(left[i] * what.stride[1])) for i in range(count)]
