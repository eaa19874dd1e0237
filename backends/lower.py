"""Graph + Target -> the graph with kernels in it, and for every op of ours what runs it and why. The last step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.graph import Graph
from ..ir.ops import OPS
from .kernel_ops import kernel_op
from .table import KERNELS, Kernel
from .target import Target


@dataclass(frozen=True)
class Choice:
    """What runs one node."""

    node: str
    """Its name in the lowered graph (and in the one given)."""
    path: str
    """The module it came from."""
    op: str
    kernel: str
    """A backend of the table, or 'torch'."""
    why: str


@dataclass(frozen=True)
class Lowered:
    """A graph ready to run on a target."""

    graph: Graph
    choices: tuple[Choice, ...]

    @property
    def module(self) -> fx.GraphModule:
        """The callable: the original's signature, trainable, torch.compile works on it."""
        return self.graph.module


def lower(graph: Graph, target: Target, available: Collection[str] | None = None) -> Lowered:
    """Give each op of ours the first kernel of the table that fits the target and the dtype of its first tensor.

    available: backends to take as installed (to lower for another machine); None asks this one.
    The graph given is not touched. A node no kernel fits stays in torch, and its choice says why each declined.
    """
    graph = graph.clone()
    semantic = {getattr(torch.ops.rewright, op).default: op for op in OPS}
    choices = []
    for node in graph.find(*semantic):
        op = semantic[node.target]
        kernel, why = _choose(op, target.kind, _dtype(node), available)
        if kernel is not None:
            node.target = kernel_op(kernel)
        choices.append(Choice(node.name, node.meta.get("path", ""), op, kernel.backend if kernel else "torch", why))
    graph.recompile()
    return Lowered(graph, tuple(choices))


def _choose(op: str, device: str, dtype: torch.dtype, available: Collection[str] | None) -> tuple[Kernel | None, str]:
    declined = []
    for kernel in (k for k in KERNELS if k.op == op):
        reason = kernel.why_not(device, dtype, available)
        if reason is None:
            return kernel, "; ".join([f"{kernel.backend}'s {op} takes {dtype} on {device}", *declined])
        declined.append(reason)
    return None, "; ".join(declined) or f"the table has no kernel for {op}"


def _dtype(node: fx.Node) -> torch.dtype:
    return next(n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))
