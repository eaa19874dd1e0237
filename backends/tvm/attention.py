"""softmax(mask(scale q k^T + bias)) v as one kernel: a head at a time, a few queries' scores in cache, nothing of size [Q, K] in memory.

Keys are transposed and values copied once a head into scratch, padded to whole vectors: the rest is the tile of `gemm`. Padded and masked
keys count as -inf, exponentials by `arithmetic.exp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arithmetic import const, exp_negative, tanh
from .compat import IRBuilder, T, tvm
from .rows import Sink, each, folded, further

tirx = tvm.tirx

HIDDEN = -1e30
"""The score of a key that is not seen: exp gives 0, and a query that sees none has an average, not NaN."""


@dataclass(frozen=True)
class Attention:
    """What one kernel computes. `build`: a function of (q, k, v, [key_mask], [sizes], [bias], [grid], y).

    heads_apart: q, k, v, y are [B, H, N, D]; else q, k, v are [B, N, row] with a head's D values beside each other from an offset on, as
    packed projections leave them, and y is [B * N, H * D]. A row of the packed q, k, v may hold more than its heads: `rows` and `offsets` say where they are.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float
    heads_apart: bool
    rows: tuple[int, int, int] = (0, 0, 0)
    offsets: tuple[int, int, int] = (0, 0, 0)
    key_mask: bool = False
    sizes: bool = False
    """[B, K], how many equal keys each one stands for."""
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    sink: Sink | None = None
    """The result is quantized on a fixed grid; heads beside each other only."""
    bias: tuple[bool, bool, bool, bool] | None = None
    """Which axes of the bias [B, H, Q, K] are more than one broadcast value."""

    def build(self, lanes: int, name: str) -> Any:
        """The PrimFunc."""
        return _Kernel(self, lanes).build(name)


class _Kernel:
    def __init__(self, what: Attention, lanes: int) -> None:
        self.what, self.lanes = what, lanes
        self.value_vectors = -(-what.value_dim // lanes)
        self.rows = max(1, min(8, 24 // self.value_vectors))  # so many accumulators stay in registers
        self.key_block = 2 * lanes

    def build(self, name: str) -> Any:
        what = self.what
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            self.batch, self.queries, self.keys = T.int64(), T.int64(), T.int64()

            def given(key: str, shape: tuple, dtype: str = "float32") -> Any:
                return T.match_buffer(T.arg(key, T.handle()), shape, dtype, align=4 if dtype == "float32" else 1)

            if what.heads_apart:
                self.q = given("q", (self.batch, what.heads, self.queries, what.dim))
                self.k = given("k", (self.batch, what.kv_heads, self.keys, what.dim))
                self.v = given("v", (self.batch, what.kv_heads, self.keys, what.value_dim))
            else:
                counts = (self.queries, self.keys, self.keys)
                self.q, self.k, self.v = (given(key, (self.batch, count, row)) for key, count, row in zip("qkv", counts, what.rows))
            self.mask = given("mask", (self.batch, self.keys), "bool") if what.key_mask else None
            self.counts = given("sizes", (self.batch, self.keys)) if what.sizes else None
            sizes = (self.batch, what.heads, self.queries, self.keys)
            self.bias = given("bias", tuple(s if many else 1 for s, many in zip(sizes, what.bias))) if what.bias else None
            self.own = what.sink.reads() if what.sink else None
            joined = what.heads * what.value_dim
            shape = (self.batch, what.heads, self.queries, what.value_dim)
            if not what.heads_apart:
                shape = (self.batch * self.queries, what.sink.width(joined) if what.sink else joined)
            self.y = given("y", shape, "uint8" if what.sink else "float32")
            with T.parallel(0, self.batch * what.kv_heads) as task:
                self._head(tirx.floordiv(task, what.kv_heads), tirx.floormod(task, what.kv_heads))
        return builder.get()

    def _at(self, which: int, b: Any, head: Any, token: Any, i: Any) -> Any:
        """A value of q, k or v (0, 1, 2)."""
        buffer = (self.q, self.k, self.v)[which]
        if self.what.heads_apart:
            return buffer[b, head, token, i]
        width = self.what.value_dim if which == 2 else self.what.dim
        return buffer[b, token, further(i, self.what.offsets[which] + head * width)]

    def _head(self, b: Any, kv: Any) -> None:
        what, lanes = self.what, self.lanes
        padded = tirx.floordiv(self.keys + self.key_block - 1, self.key_block) * self.key_block
        # of key_block keys after each other, so that a tile reads them in order
        kt = T.alloc_buffer((padded * what.dim,), "float32", scope="global")
        vs = T.alloc_buffer((padded * self.value_vectors * lanes,), "float32", scope="global")
        seen = T.alloc_buffer((padded,), "float32", scope="global")
        scores = T.alloc_buffer((padded * self.rows,), "float32", scope="global")
        value_row = self.value_vectors * lanes
        with T.serial(0, padded) as j:
            block, inside = tirx.floordiv(j, self.key_block), tirx.floormod(j, self.key_block)
            with T.If(j < self.keys):
                with T.Then():
                    with T.serial(0, what.dim) as d:
                        T.buffer_store(kt, self._at(1, b, kv, j, d), [(block * what.dim + d) * self.key_block + inside])
                    each(what.value_dim, lanes, lambda at, j=j: T.buffer_store(vs, self._at(2, b, kv, j, at), [further(at, j * value_row)]))
                    for d in range(what.value_dim, value_row):
                        T.buffer_store(vs, T.float32(0), [j * value_row + d])
                    weight = T.float32(0)  # added to the scores
                    if self.counts is not None:
                        weight = tirx.Select(self.counts[b, j] > T.float32(0), tirx.log(tirx.max(self.counts[b, j], T.float32(1e-30))), T.float32(HIDDEN))
                    if self.mask is not None:
                        weight = tirx.Select(self.mask[b, j], weight, T.float32(HIDDEN))
                    T.buffer_store(seen, weight, [j])
                with T.Else():
                    with T.serial(0, what.dim) as d:
                        T.buffer_store(kt, T.float32(0), [(block * what.dim + d) * self.key_block + inside])
                    with T.serial(0, value_row) as d:
                        T.buffer_store(vs, T.float32(0), [j * value_row + d])
                    T.buffer_store(seen, T.float32(HIDDEN), [j])
        self.kt, self.vs, self.seen, self.scores, self.padded = kt, vs, seen, scores, padded
        group = what.heads // what.kv_heads
        with T.serial(0, group) as g:
            head = kv * group + g
            with T.If(self.queries >= self.rows):
                with T.Then(), T.serial(0, tirx.floordiv(self.queries + self.rows - 1, self.rows)) as t:
                    self._tile(b, head, tirx.min(t * self.rows, self.queries - self.rows), self.rows)
                with T.Else(), T.serial(0, self.queries) as row:
                    self._tile(b, head, row, 1)

    def _tile(self, b: Any, head: Any, row: Any, rows: int) -> None:
        """Some queries of a head."""
        lanes, block = self.lanes, self.key_block
        blocks = tirx.floordiv(self.padded, block)
        whole = T.ramp(0, 1, lanes)
        largest = self._scores(b, head, row, rows)
        parts = [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(rows)]
        for i in range(rows):
            T.buffer_store(largest[i], folded(largest[i], lanes, tirx.max), [0])
            T.buffer_store(parts[i], tirx.Broadcast(T.float32(0), lanes), [whole])
        with T.serial(0, blocks) as p:
            for v in range(block // lanes):
                for i in range(rows):
                    at = self._spot(p, rows, i, v * lanes, lanes)
                    T.buffer_store(self.scores, exp_negative(self.scores[at] - tirx.Broadcast(largest[i][0], lanes)), [at])
                    T.buffer_store(parts[i], parts[i][whole] + self.scores[at], [whole])

        sums = [[T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(self.value_vectors)] for _ in range(rows)]
        for totals in sums:
            for total in totals:
                T.buffer_store(total, tirx.Broadcast(T.float32(0), lanes), [whole])
        with T.serial(0, blocks) as p, T.serial(0, block) as j:
            for i, totals in enumerate(sums):
                weight = tirx.Broadcast(self.scores[self._spot(p, rows, i, j, 1)], lanes)
                for v, total in enumerate(totals):
                    value = self.vs[T.ramp(((p * block + j) * self.value_vectors + v) * lanes, 1, lanes)]
                    T.buffer_store(total, total[whole] + weight * value, [whole])
        for i, totals in enumerate(sums):
            T.buffer_store(parts[i], T.float32(1) / folded(parts[i], lanes, lambda a, c: a + c), [0])
            for v, total in enumerate(totals):
                self._store(total, parts[i][0], b, head, row + i, v * lanes)

    def _spot(self, p: Any, rows: int, i: int, inside: Any, lanes: int) -> Any:
        """Where a query's scores lie: a block of keys for all queries of a tile, then the next block, so that distances are constants."""
        first = (p * rows + i) * self.key_block + inside
        return T.ramp(first, 1, lanes) if lanes > 1 else first

    def _store(self, total: Any, inverse: Any, b: Any, head: Any, row: Any, first: int) -> None:
        """One vector of a query's result; what there is of it."""
        what, lanes = self.what, self.lanes
        there = min(lanes, what.value_dim - first)
        for start, many in [(0, lanes)] if there == lanes else [(i, 1) for i in range(there)]:
            at, column = (T.ramp(x, 1, many) if many > 1 else x for x in (start, first + start))
            value = total[at] * (tirx.Broadcast(inverse, many) if many > 1 else inverse)
            value = what.sink.code(value, self.own) if what.sink else value
            beside = [b * self.queries + row, further(column, head * what.value_dim)]
            T.buffer_store(self.y, value, [b, head, row, column] if what.heads_apart else beside)

    def _scores(self, b: Any, head: Any, row: Any, rows: int) -> list[Any]:
        """Writes the scores of some queries; the largest of each, lane by lane."""
        what, lanes, block = self.what, self.lanes, self.key_block
        largest = [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(rows)]
        whole = T.ramp(0, 1, lanes)
        for row_largest in largest:
            T.buffer_store(row_largest, tirx.Broadcast(T.float32(HIDDEN), lanes), [whole])
        with T.serial(0, tirx.floordiv(self.padded, block)) as p:
            sums = [T.alloc_buffer((block,), "float32", scope="global") for _ in range(rows)]
            spots = [T.ramp(v * lanes, 1, lanes) for v in range(block // lanes)]
            for total in sums:
                for at in spots:
                    T.buffer_store(total, tirx.Broadcast(T.float32(0), lanes), [at])
            with T.serial(0, what.dim) as d:
                for i, total in enumerate(sums):
                    q = tirx.Broadcast(self._at(0, b, head, row + i, d), lanes)
                    for v, at in enumerate(spots):
                        T.buffer_store(total, total[at] + q * self.kt[T.ramp((p * what.dim + d) * block + v * lanes, 1, lanes)], [at])
            for i, total in enumerate(sums):
                for v, at in enumerate(spots):
                    first = p * block + v * lanes
                    value = total[at] * tirx.Broadcast(T.float32(what.scale), lanes)
                    if what.softcap is not None:
                        value = tanh(value * const(1 / what.softcap, value)) * const(what.softcap, value)
                    value = value + self.seen[T.ramp(first, 1, lanes)]
                    value = self._near(value, row + i, first)
                    T.buffer_store(self.scores, value, [self._spot(p, rows, i, v * lanes, lanes)])
                    if self.bias is None:
                        T.buffer_store(largest[i], tirx.max(largest[i][whole], value), [whole])
        if self.bias is not None:
            for i in range(rows):
                with T.serial(0, self.keys) as j:
                    spot = [x if many else 0 for x, many in zip((b, head, row + i, j), what.bias)]  # type: ignore[arg-type]
                    at = self._spot(tirx.floordiv(j, block), rows, i, tirx.floormod(j, block), 1)
                    T.buffer_store(self.scores, tirx.max(self.scores[at] + self.bias[spot[0], spot[1], spot[2], spot[3]], T.float32(HIDDEN)), [at])
                    T.buffer_store(largest[i], tirx.max(largest[i][0], self.scores[at]), [0])
        return largest

    def _near(self, value: Any, row: Any, first: Any) -> Any:
        """Scores with the keys hidden that come after the query, or are too far."""
        what, lanes = self.what, self.lanes
        if not what.causal and what.window is None:
            return value
        query = tirx.Broadcast((row + self.keys - self.queries).astype("int32"), lanes)
        distance = query - T.ramp(first.astype("int32"), 1, lanes)
        hidden = tirx.Broadcast(T.float32(HIDDEN), lanes)
        if what.causal:
            value = tirx.Select(distance < const(0, distance), hidden, value)
        if what.window is not None:
            far = distance >= const(what.window, distance)
            value = tirx.Select(far, hidden, value)
            if not what.causal:
                value = tirx.Select(distance <= const(-what.window, distance), hidden, value)
        return value
