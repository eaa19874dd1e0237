"""One run of a graph over many batches, part by part: each part runs all batches before the next, so that only its weights are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import InputFileError, ResourceError, UsageError
from .graph import Flat, Graph


@dataclass(frozen=True)
class Visit:
    """A look at values of the run: `see(batch index, values of reads)`, once a batch, as soon as all of them are there."""

    reads: tuple[fx.Node, ...]
    see: Callable[[int, tuple[Any, ...]], None]


class Walk:
    """What a run has to compute, in order: all that the visits read, and the outputs if they are asked for.

    Peak memory of a part: its weights, the values that are alive at its two ends for all batches, and what one batch needs in between.
    """

    def __init__(self, graph: Graph, batches: Sequence[Flat], visits: Iterable[Visit] = (), outputs: bool = False) -> None:
        self.graph, self.batches, self.outputs = graph, batches, outputs
        for i, flat in enumerate(batches):
            if len(flat) != len(graph.inputs):
                raise UsageError(f"batch {i} has {len(flat)} tensors; the graph takes {len(graph.inputs)}: {', '.join(graph.call.names)}")
        visits = list(visits)
        needed = _needed([*(n for v in visits for n in v.reads), *([graph.output] if outputs else [])])
        self.nodes = [n for n in graph.fx.nodes if n in needed and n.op == "call_function"]
        """The calls to run, in order."""
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self._visits: dict[int, list[Visit]] = {}
        for visit in visits:
            self._visits.setdefault(max(self.position.get(n, -1) for n in visit.reads), []).append(visit)
        self._last = self._last_reads()
        self._drops: dict[int, list[fx.Node]] = {}
        for node, i in self._last.items():
            self._drops.setdefault(i, []).append(node)

    def _last_reads(self) -> dict[fx.Node, int]:
        """Where each value (weights aside) is read for the last time; len(nodes) for outputs."""
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            last[node] = i  # a value nobody reads but a visit
            for operand in node.all_input_nodes:
                last[operand] = i
        for i, visits in self._visits.items():
            for visit in visits:
                for node in visit.reads:
                    last[node] = max(last.get(node, i), i)
        if self.outputs:
            last.update(dict.fromkeys(self.graph.output.all_input_nodes, len(self.nodes)))
        return {n: i for n, i in last.items() if n.op != "get_attr"}

    def live_bytes(self) -> list[int]:
        """Bytes alive before each call, over all batches, and after the last one. Inputs, which the caller holds, don't count."""
        size_of = value_bytes(self.graph, self.batches)
        change = [0] * (len(self.nodes) + 2)
        for node, last in self._last.items():
            if node.op == "call_function":
                change[self.position[node] + 1] += (nbytes := size_of(node))
                change[last + 1] -= nbytes
        live, total = [], 0
        for c in change[:-1]:
            total += c
            live.append(total)
        return live

    def parts(self, limit: int | None, cost: Callable[[fx.Node], int] = lambda node: 0, weights: bool = True) -> list[range]:
        """Cut the run where few bytes are alive, so that the live values, the weights and the `cost` of each part's calls stay within `limit` bytes.

        weights: whether a part's weights count (they don't where the graph holds them all anyway). One part without a limit.
        Raises ResourceError when no part that starts at some call is within it.
        """
        if limit is None or not self.nodes:
            return [range(len(self.nodes))]
        live, found, begin = self.live_bytes(), [], 0
        while begin < len(self.nodes):
            spent, seen, ends, least = 0, set(), [], math.inf  # ends: (where a part could end, its bytes)
            for i in range(begin, len(self.nodes)):
                spent += cost(self.nodes[i])
                for operand in self.nodes[i].all_input_nodes if weights else ():
                    if operand.op == "get_attr" and operand not in seen:
                        seen.add(operand)
                        spent += operand.meta["val"].nbytes
                needed = spent + max(live[begin], live[i + 1])
                least = min(least, needed)
                if needed <= limit:
                    ends.append((i + 1, spent))
                elif spent + live[begin] > limit:
                    break
            if not ends:
                node = self.nodes[begin]
                raise ResourceError(
                    f"at {node.name} ({node.meta.get('path') or 'no module'}) the smallest part of the run needs {least / 2**20:.1f} MiB, over the memory "
                    f"limit of {limit / 2**20:.1f} MiB; raise it, or use fewer or shorter inputs"
                )
            end, most = ends[-1]
            if end < len(self.nodes):  # of the last half, the place with the fewest live bytes
                end, _ = min((e for e in ends if 2 * e[1] >= most), key=lambda e: (live[e[0]], -e[0]))
            found.append(range(begin, end))
            begin = end
        return found

    def run(
        self,
        weights: Mapping[str, Tensor] | None = None,
        parts: Sequence[range] | None = None,
        after: Callable[[int], None] = lambda part: None,
    ) -> list[tuple]:
        """Run all batches through one part after another; `after` is called at the end of each.

        weights: the data of a graph captured without (see Graph.weight_from). Each weight is read once a part and let go
        after its last use there. Returns the flat outputs of every batch, if they were asked for.
        Raises InputFileError when a weight is missing or of another shape.
        """
        held = [dict(zip(self.graph.inputs, flat)) for flat in self.batches]
        with torch.no_grad():
            for i, part in enumerate(parts if parts is not None else [range(len(self.nodes))]):
                self._run_part(part, held, weights or {})
                after(i)
        if not self.outputs:
            return []
        return [fx.map_arg(self.graph.output.args[0], lambda n, env=env: env[n] if n in env else self._load(n, weights or {})) for env in held]  # type: ignore[misc]

    def _run_part(self, part: range, held: list[dict[fx.Node, Any]], weights: Mapping[str, Tensor]) -> None:
        last_use = {w: i for i in part for w in self.nodes[i].all_input_nodes if w.op == "get_attr"}
        unused: dict[int, list[fx.Node]] = {}
        for weight, i in last_use.items():
            unused.setdefault(i, []).append(weight)
        loaded: dict[fx.Node, Tensor] = {}
        for batch, env in enumerate(held):
            last_batch = batch == len(held) - 1

            def value(node: fx.Node, env: dict[fx.Node, Any] = env) -> Any:
                if node in env:
                    return env[node]
                if node not in loaded:
                    loaded[node] = self._load(node, weights)
                return loaded[node]

            if part.start == 0:
                self._see(-1, batch, env)
            for i in part:
                node = self.nodes[i]
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)  # type: ignore[misc]
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                del args, kwargs
                self._see(i, batch, env)
                for dead in self._drops.get(i, ()):
                    env.pop(dead, None)
                if last_batch:
                    for weight in unused.get(i, ()):
                        del loaded[weight]

    def _see(self, i: int, batch: int, env: dict[fx.Node, Any]) -> None:
        for visit in self._visits.get(i, ()):
            visit.see(batch, tuple(env[n] for n in visit.reads))

    def _load(self, node: fx.Node, weights: Mapping[str, Tensor]) -> Tensor:
        return load_weight(self.graph, str(node.target), weights)


def load_weight(graph: Graph, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Graph.weight_from, checked. Raises InputFileError, in a sentence, when a weight is missing or not what the graph was captured with."""
    try:
        tensor = graph.weight_from(name, weights).detach()
    except KeyError as error:
        missing = error.args[0]
        raise InputFileError(
            f"the graph reads {missing}, which is not among the {len(weights)} weights given; "
            f"if the model computes it when it is built, give it beside the file: WeightStore.open(folder, held={{{missing!r}: tensor}})"
        ) from error
    wanted = graph.weight(name)
    if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
        raise InputFileError(f"{name} is {tensor.dtype}{list(tensor.shape)}, the graph was captured with {wanted.dtype}{list(wanted.shape)}; capture it again")
    return tensor


def value_bytes(graph: Graph, batches: Sequence[Flat]) -> Callable[[fx.Node], int]:
    """Node -> bytes of its value over all batches, from the symbolic shapes."""
    sizes: list[dict[Any, int]] = []
    for flat in batches:
        pairs = [(s, n) for node, t in zip(graph.inputs, flat) for s, n in zip(node.meta["val"].shape, t.shape)]
        sizes.append({s.node.expr: n for s, n in pairs if isinstance(s, torch.SymInt)})
    distinct = [(dict(key), sum(1 for s in sizes if tuple(s.items()) == key)) for key in dict.fromkeys(tuple(s.items()) for s in sizes)]
    known: dict[tuple, int] = {}

    def elements(shape: tuple) -> int:
        if shape not in known:
            total = 0
            for env, times in distinct:
                count = times
                for s in shape:
                    count *= int(s.subs(env)) if hasattr(s, "subs") else int(s)
                total += count
            known[shape] = total
        return known[shape]

    def nbytes(value: Any) -> int:
        if isinstance(value, Tensor):
            return elements(tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape)) * value.dtype.itemsize
        return sum(nbytes(v) for v in value) if isinstance(value, list | tuple) else 0

    return lambda node: nbytes(node.meta.get("val"))


def _needed(wanted: list[fx.Node]) -> set[fx.Node]:
    needed, work = set(wanted), list(wanted)
    for node in work:  # grows while we walk
        fresh = [n for n in node.all_input_nodes if n not in needed]
        needed.update(fresh)
        work += fresh
    return needed
