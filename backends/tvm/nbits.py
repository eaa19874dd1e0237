"""y = act(x W^T + b) + r with weights kept in 4 bits, a scale and a zero point every few channels: memory is read once, as it is stored.

For a single row (decoding) products are made with the codes themselves, and scaled once a group; for blocks of rows a panel is decoded into
scratch and multiplied as in `gemm`: that saves memory, not time (specs/backends.md 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compat import T, tvm
from .gemm import Kernel, Plan, Product
from .rows import further, reduced

tirx = tvm.tirx


@dataclass(frozen=True)
class Grouped(Product):
    """`build`: a function of (x, w, scale, shift, [b], [r], [grid], y), as `pack_groups` gives them. Groups are an even number of channels."""

    group: int = 32

    @property
    def groups(self) -> int:
        """A row of weights has so many."""
        return -(-self.width // self.group)

    def build(self, plan: Plan, name: str) -> Any:
        """The PrimFunc."""
        return _Kernel(self, plan).build(name)


def pack_groups(codes: Tensor, scale: Tensor, zero: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """codes [out, in] 0 .. 15, scale and zero [out, groups] -> w uint8 [panels, in / 2, columns] with an even channel in the low bits, and
    scale and -scale * zero [panels, groups, columns].
    """
    out, width = codes.shape
    short = -out % plan.columns
    pairs = torch.nn.functional.pad(codes.to(torch.uint8), (0, width % 2, 0, short)).unflatten(1, (-1, 2))
    w = pairs[..., 0] | pairs[..., 1] << 4
    numbers = (torch.nn.functional.pad(v.float(), (0, 0, 0, short)) for v in (scale, -scale * zero))
    found = (v.unflatten(0, (-1, plan.columns)).transpose(1, 2).contiguous() for v in (w, *numbers))
    return tuple(found)  # type: ignore[return-value]


class _Kernel(Kernel):
    product: Grouped

    def _weights(self, given: Callable[..., Any], panels: int) -> None:
        product, columns = self.product, self.plan.columns
        self.w = given("w", (panels, (product.width + 1) // 2, columns), "uint8")
        self.scale, self.shift = (given(key, (panels, product.groups, columns), "float32") for key in ("scale", "shift"))

    def _pair(self, panel: Any, t: Any, v: int) -> tuple[Any, Any]:
        """The codes of two channels, one vector of outputs."""
        lanes = self.plan.lanes
        both = self.w[panel, t, T.ramp(v * lanes, 1, lanes)].astype(f"int32x{lanes}")
        low = both & tirx.Broadcast(T.int32(15), lanes)
        high = tirx.shift_right(both, tirx.Broadcast(T.int32(4), lanes))
        return low.astype(f"float32x{lanes}"), high.astype(f"float32x{lanes}")

    def _row(self, row: Any, panel: Any, panels: int) -> None:
        lanes, product = self.plan.lanes, self.product
        spots = [T.ramp(v * lanes, 1, lanes) for v in range(self.vectors)]
        totals, low, high = (T.alloc_buffer((self.plan.columns,), "float32", scope="global") for _ in range(3))
        for at in spots:
            T.buffer_store(totals, tirx.Broadcast(T.float32(0), lanes), [at])

        def one_group(g: Any, count: int) -> None:
            first = g * product.group
            for part in (low, high):
                for at in spots:
                    T.buffer_store(part, tirx.Broadcast(T.float32(0), lanes), [at])
            with T.serial(0, count // 2) as t:
                x = [tirx.Broadcast(self.x[row, first + t * 2 + i], lanes) for i in (0, 1)]
                for v, at in enumerate(spots):
                    for part, factor, codes in zip((low, high), x, self._pair(panel, tirx.floordiv(first, 2) + t, v)):
                        T.buffer_store(part, part[at] + factor * codes, [at])
            if count % 2:
                for v, at in enumerate(spots):
                    codes, _ = self._pair(panel, tirx.floordiv(first, 2) + count // 2, v)
                    T.buffer_store(low, low[at] + tirx.Broadcast(self.x[row, first + count - 1], lanes) * codes, [at])
            total = reduced(count, lanes, 0.0, lambda a, c: a + c, lambda at: self.x[row, further(at, first)])
            for v, at in enumerate(spots):
                scaled = (low[at] + high[at]) * self.scale[panel, g, T.ramp(v * lanes, 1, lanes)]
                shifted = tirx.Broadcast(total, lanes) * self.shift[panel, g, T.ramp(v * lanes, 1, lanes)]
                T.buffer_store(totals, totals[at] + scaled + shifted, [at])

        whole, rest = product.width // product.group, product.width % product.group
        with T.serial(0, whole) as g:
            one_group(g, product.group)
        if rest:
            one_group(tirx.const(whole, "int64"), rest)
        self._finish(totals, row, row, panel, panels, self.y)

    def _block(self, first: Any, panel: Any, panels: int) -> None:
        lanes, product = self.plan.lanes, self.product
        self.decoded = T.alloc_buffer((product.width + product.width % 2, self.plan.columns), "float32", scope="global")
        with T.serial(0, (product.width + 1) // 2) as t:
            g = tirx.floordiv(t * 2, product.group)
            for v in range(self.vectors):
                at = T.ramp(v * lanes, 1, lanes)
                for i, codes in enumerate(self._pair(panel, t, v)):
                    T.buffer_store(self.decoded, codes * self.scale[panel, g, at] + self.shift[panel, g, at], [t * 2 + i, at])
        super()._block(first, panel, panels)

    def _multiply(self, total: Any, row: Any, k: Any, panel: Any, v: int) -> Any:
        lanes = self.plan.lanes
        return total + tirx.Broadcast(self.x[row, k], lanes) * self.decoded[k, T.ramp(v * lanes, 1, lanes)]
