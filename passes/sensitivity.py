"""How far a program's outputs move when something else computes some of its values: one layer at a time, or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..ir.blocks.vocabulary import is_logits
from ..ir.graph import Flat, Graph
from ..ir.verify import padding_mask, real_rows

Replacement = Callable[[Tensor], Tensor]
"""The value a node is made of -> what stands in for the node's."""
Drift = Literal["auto", "kl", "mse"]
"""KL divergence of the softmax in nats a row, or squared error relative to the output's; "auto": KL for outputs that a linear makes (logits)."""


class Sensitivity:
    """A graph's outputs on a few batches, and how far they are from there with replaced nodes.

    reads: node -> the value its replacement takes, for those that take another than their first operand.
    Holds each batch's outputs, and while it measures the values alive at one place, for all batches.
    """

    def __init__(self, graph: Graph, batches: Sequence[Flat], drift: Drift = "auto", reads: Mapping[fx.Node, fx.Node] | None = None) -> None:
        self.graph, self.batches, self.reads = graph, batches, dict(reads or {})
        self.nodes = graph.nodes
        self._outputs = [n for n in graph.output.all_input_nodes if isinstance(v := n.meta.get("val"), Tensor) and v.is_floating_point()]
        self._kl = [drift == "kl" or drift == "auto" and is_logits(n) for n in self._outputs]
        last = {operand: i for i, node in enumerate(self.nodes) for operand in [*node.all_input_nodes, *self._read(node)] if operand.op != "get_attr"}
        last.update(dict.fromkeys(graph.output.all_input_nodes, len(self.nodes)))
        self._dead: dict[int, list[fx.Node]] = {}
        for node, i in last.items():
            self._dead.setdefault(i, []).append(node)
        mask = padding_mask(graph)
        self._masks = [mask(flat) for flat in batches]
        self._reference = [self._finish(env, 0, {}) for env in self._start()]

    def together(self, replaced: Mapping[fx.Node, Replacement]) -> float:
        """The drift with all these nodes replaced."""
        return self._drift([self._finish(env, 0, replaced) for env in self._start()])

    def alone(self, places: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, Callable[[Mapping[fx.Node, Replacement]], float]]]:
        """Each place in graph order with a function: replaced nodes, none before the place -> drift. What is before it runs once, the rest every call.

        The function is good until the next place is asked for.
        """
        waiting, envs = set(places), self._start()
        for i, node in enumerate(self.nodes):
            if node in waiting:
                yield node, lambda replaced, i=i: self._drift([self._finish(dict(env), i, replaced) for env in envs])
            for env in envs:
                self._step(env, i, {})

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return [self.reads[node]] if node in self.reads else []

    def _start(self) -> list[dict[fx.Node, Any]]:
        return [dict(zip(self.graph.inputs, flat)) for flat in self.batches]

    def _finish(self, env: dict[fx.Node, Any], begin: int, replaced: Mapping[fx.Node, Replacement]) -> list[Tensor]:
        """Run from one call to the end."""
        for i in range(begin, len(self.nodes)):
            self._step(env, i, replaced)
        return [self._value(env, n) for n in self._outputs]

    def _step(self, env: dict[fx.Node, Any], i: int, replaced: Mapping[fx.Node, Replacement]) -> None:
        node: Any = self.nodes[i]
        with torch.no_grad():
            if node in replaced:
                env[node] = replaced[node](self._value(env, self.reads[node] if node in self.reads else node.args[0]))
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(env, n))  # type: ignore[misc]
                env[node] = node.target(*args, **kwargs)
        for dead in self._dead.get(i, ()):
            env.pop(dead, None)

    def _value(self, env: dict[fx.Node, Any], node: fx.Node) -> Any:
        return env[node] if node in env else self.graph.weight(node).detach()

    def _drift(self, found: Sequence[Sequence[Tensor]]) -> float:
        """The mean over rows, summed over outputs."""
        drift = 0.0
        for i, kl in enumerate(self._kl):
            rows = [
                rows_drift(real_rows(before[i], mask), real_rows(after[i], mask), kl)
                for before, after, mask in zip(self._reference, found, self._masks, strict=True)
            ]
            drift += torch.cat(rows).mean().item()
        return drift


def rows_drift(a: Tensor, b: Tensor, kl: bool) -> Tensor:
    """[rows], float64: KL divergence of softmaxes in nats, or squared error relative to the square of `a`; over the last axis."""
    a, b = (t.reshape(-1, t.shape[-1] if t.dim() else 1).double() for t in (a, b))
    if kl:
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        return (a.exp() * (a - b)).sum(-1)
    size = a.square().sum(-1)
    return (a - b).square().sum(-1) / torch.where(size == 0, 1.0, size)
