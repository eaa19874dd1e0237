"""Squared gradients of a loss, sample by sample: what first-order scores and Fisher weights are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.errors import UsageError
from ...ir.graph import Flat, Graph

Loss = Callable[[tuple, Flat], Tensor]
"""(flat outputs, flat inputs) of one sample -> scalar."""


def samples(graph: Graph, batches: Sequence[Flat]) -> list[Flat]:
    """Batches cut into samples of batch size 1; a batch stays whole where the graph fixes its size."""
    batched = [n.meta["val"].dim() > 0 and isinstance(n.meta["val"].shape[0], torch.SymInt) for n in graph.inputs]
    if not any(batched):
        return list(batches)
    return [tuple(t[i : i + 1] if b else t for t, b in zip(flat, batched)) for flat in batches for i in range(len(flat[batched.index(True)]))]


def gradients(graph: Graph, samples: Sequence[Flat], values: Sequence[fx.Node], loss: Loss) -> Iterator[Mapping[fx.Node, Tensor]]:
    """The gradient of the loss with respect to each value (a weight or an activation), one sample after another.

    Raises UsageError when the loss is no scalar, or does not depend on any of the values.
    """
    wanted = set(values)
    for flat in samples:
        env = dict(zip(graph.inputs, flat))
        with torch.enable_grad():
            for node in graph.fx.nodes:
                if node.op == "get_attr":
                    env[node] = graph.weight(node).detach()
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)  # type: ignore[misc]
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if node in wanted and not env[node].requires_grad:
                    env[node] = env[node].detach().requires_grad_()
            outputs: Any = fx.map_arg(graph.output.args[0], env.__getitem__)
            scalar = loss(tuple(outputs), flat)
        if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
            raise UsageError("the loss must be a scalar tensor computed from the graph's outputs")
        found = torch.autograd.grad(scalar, [env[n] for n in values], allow_unused=True)
        yield {n: torch.zeros_like(env[n]) if g is None else g.detach() for n, g in zip(values, found)}


class WeightGradient:
    """E[g^2] of a weight over samples, as means of its rows and of its columns."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Take in one sample's gradient: the first axis is the rows', all others together the columns'."""
        square = gradient.float().square().flatten(1) if gradient.dim() > 1 else gradient.float().square()[None]
        rows, columns = square.mean(1, dtype=torch.float64), square.mean(0, dtype=torch.float64)
        self.rows = rows if self.rows is None else self.rows + rows
        self.columns = columns if self.columns is None else self.columns + columns
        self.count += 1

    def result(self) -> dict[str, Tensor]:
        """[rows] and [columns], float64."""
        assert self.rows is not None and self.columns is not None
        return {"rows": self.rows / self.count, "columns": self.columns / self.count, "count": torch.tensor(self.count)}
