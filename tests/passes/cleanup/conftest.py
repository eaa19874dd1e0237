"""One way to apply a pass to a ten-line module and look at what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.cleanup import CANONICAL
from rewright.passes.rewrite import Context, Declined, Pass

torch.set_num_threads(1)


def ops(graph: Graph) -> Counter[str]:
    """How often each op is called, by short name: "linear", "attention"."""
    return Counter(str(n.target).removeprefix("aten.").removeprefix("rewright.").split(".")[0] for n in graph.nodes)


@dataclass
class Applied:
    """A module before and after passes."""

    module: nn.Module
    graph: Graph
    before: Counter[str]
    applied: list[str]
    declined: list[Declined]

    @property
    def after(self) -> Counter[str]:
        return ops(self.graph)

    @property
    def reasons(self) -> list[str]:
        return [d.why for d in self.declined]

    def error(self, *inputs: Tensor, **named: Tensor) -> float:
        """Largest difference to the module on these inputs, relative to its largest output."""
        self.graph.recompile()
        with torch.no_grad():
            expected, got = (pytree.tree_leaves(f(*inputs, **named)) for f in (self.module, self.graph))
        return max(
            float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-9))
            for a, b in zip(expected, got, strict=True)
            if isinstance(a, Tensor)
        )


@pytest.fixture(scope="session")
def apply() -> Callable[..., Applied]:
    """apply(module, inputs, Pass(), ...): captures, runs the passes, reports."""

    def run(module: nn.Module, inputs: tuple[Tensor, ...], *passes: Pass, dynamic_shapes: Any = None, named: dict[str, Tensor] | None = None) -> Applied:
        module = module.eval()
        graph = capture(module, inputs, named, dynamic_shapes)
        before, context = ops(graph), Context()
        for p in passes:
            graph = p.run(graph, context)
        graph.recompile()
        return Applied(module, graph, before, context.applied, context.declined)

    return run


@pytest.fixture(scope="session")
def canonical(apply: Callable[..., Applied]) -> Callable[..., Applied]:
    """canonical(module, inputs): the whole canonical form."""
    return lambda module, inputs=(), **more: apply(module, inputs, *(p() for p in CANONICAL), **more)
