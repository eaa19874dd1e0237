"""Which backend runs a program on a target: the one asked for, or the fastest of those that exist here."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.lower import BACKENDS, Choice, Lowered, lower
from ..backends.table import absent
from ..backends.target import Target
from ..ir.errors import RewrightError, UsageError
from ..ir.graph import Graph
from ..passes.pipeline import Pipeline
from .bench import Timing, alternate
from .models import Flat, random_inputs


@dataclass(frozen=True)
class Lowering:
    """A program as one backend runs it, and what the choice was made by."""

    lowered: Lowered
    timings: dict[str, Timing] = field(default_factory=dict)
    """Backend -> its time, where several were measured."""
    declined: dict[str, str] = field(default_factory=dict)
    """Backend -> why it was not tried."""
    shape: str = ""
    """Of the inputs that were timed."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "backend": self.lowered.backend,
            "timings": {name: t.as_dict() for name, t in self.timings.items()},
            "declined": self.declined,
            "shape": self.shape,
            "nodes": [vars(c) for c in self.lowered.choices],
        }


def canonical(graph: Graph) -> Graph:
    """A graph in canonical form, which backends want."""
    return graph if graph.canonical else Pipeline([], verify=False).run(graph).graph


def lower_for(graph: Graph, target: Target, backend: str, inputs: Flat | None = None, rounds: int = 9) -> Lowering:
    """Lower for a backend, or "auto": on the CPU we are on, torch, onnx and tvm are timed on `inputs`, alternating, and the fastest is taken;
    for a GPU the kernels of the table are (a prediction: they were chosen for being fast, not timed here).

    Raises UsageError for an unknown backend, or one that can't run there.
    """
    graph = canonical(graph)
    if backend != "auto":
        if backend not in BACKENDS:
            raise UsageError(f"no backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
        return Lowering(lower(graph, target, backend=backend))
    if target.kind != "cpu":
        return Lowering(lower(graph, target, available=("triton",)), declined=dict.fromkeys(BACKENDS, f"it was not timed: {target.name} is not this machine"))
    tried, declined = {}, {}
    for name in ("torch", "onnx", "tvm"):
        try:
            if name == "tvm" and (reason := absent(name)):
                declined[name] = reason
            else:
                tried[name] = lower(graph, target, backend=name)
        except RewrightError as error:
            declined[name] = str(error)
    flat = inputs or random_inputs(graph)
    with torch.no_grad():
        timings = alternate({name: functools.partial(found.run, flat) for name, found in tried.items()}, "torch", rounds)
    best = min(timings, key=lambda name: timings[name].median_ms)
    shape = ", ".join("x".join(map(str, x.shape)) for x in flat)
    return Lowering(tried[best], timings, declined, shape)


def in_torch(choices: tuple[Choice, ...]) -> list[str]:
    """Reasons, each once, why something stays in torch."""
    return sorted({c.why for c in choices if c.kernel == "torch"})
