"""Graph + Target -> something callable, and for every op what runs it and why. The last step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.ops import OPS
from .kernel_ops import kernel_op
from .table import KERNELS, Kernel, absent
from .target import Target

BACKENDS = ("torch", "kernels", "triton", "tvm", "onnx")
"""torch: as it is. kernels: torch, with the best kernel of the table for every op that has one; triton: only Triton's. tvm and onnx
(onnxruntime) compile the whole graph, for the CPU we are on."""

Run = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Choice:
    """What runs one node."""

    node: str
    """Its name in the lowered graph (and in the one given)."""
    path: str
    """The module it came from."""
    op: str
    kernel: str
    """A backend."""
    why: str


class Lowered:
    """A graph ready to run on a target."""

    def __init__(self, graph: Graph, choices: tuple[Choice, ...], backend: str, run: Run | None = None) -> None:
        self.graph, self.choices, self.backend = graph, choices, backend
        self.run: Run = run or graph.run
        """Flat inputs -> flat outputs."""
        self.module: nn.Module = graph.module if run is None else Program(graph, run)
        """The callable, with the original's signature; a torch module that trains and compiles, or a program that only runs."""


class Program(nn.Module):
    """A graph compiled by a backend, called like the original. It has no gradients."""

    def __init__(self, graph: Graph, run: Run) -> None:
        super().__init__()
        self.graph, self.run = graph, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's signature and output structure."""
        return self.graph.call.unflatten(self.run(self.graph.flat_inputs(args, kwargs)))


def lower(graph: Graph, target: Target, available: Collection[str] | None = None, backend: str = "kernels") -> Lowered:
    """Make a graph run on a target by one backend; the graph given is not touched.

    available: kernels' backends to take as installed (to lower for another machine); None asks this one. Of the table's kernels for an
    op the first is taken that fits the target and the dtype of its first tensor; a node none fits stays in torch, and its choice says why.
    Raises UsageError where the backend is unknown, not installed, or can't run on the target.
    """
    if backend not in BACKENDS:
        raise UsageError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend in ("tvm", "onnx"):
        if target.kind != "cpu":
            raise UsageError(f"{backend} compiles for a CPU here, and {target.name} is none: choose torch, kernels or triton")
        return _with_tvm(graph) if backend == "tvm" else _with_onnxruntime(graph)
    graph = graph.clone()
    semantic = {getattr(torch.ops.rewright, op).default: op for op in OPS}
    choices = []
    for node in graph.find(*semantic):
        op = semantic[node.target]
        kernel, why = (None, "torch was asked for") if backend == "torch" else _choose(op, target, _dtype(node), available, backend)
        if kernel is not None:
            node.target = kernel_op(kernel)
        choices.append(Choice(node.name, node.meta.get("path", ""), op, kernel.backend if kernel else "torch", why))
    graph.recompile()
    return Lowered(graph, tuple(choices), backend)


def _choose(op: str, target: Target, dtype: torch.dtype, available: Collection[str] | None, backend: str) -> tuple[Kernel | None, str]:
    declined = []
    for kernel in (k for k in KERNELS if k.op == op and backend in ("kernels", k.backend)):
        reason = kernel.why_not(target.kind, dtype, available, target.features)
        if reason is None:
            return kernel, "; ".join([f"{kernel.backend}'s {op} takes {dtype} on {target.kind}", *declined])
        declined.append(reason)
    return None, "; ".join(declined) or f"the table has no kernel for {op}"


def _dtype(node: fx.Node) -> torch.dtype:
    return next(n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))


def _with_tvm(graph: Graph) -> Lowered:
    if reason := absent("tvm"):
        raise UsageError(reason)
    from .tvm.build import compile_graph

    run = compile_graph(graph)
    choices = []
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor | tuple | list) and isinstance(node.target, torch._ops.OpOverload):
            stays = run.in_torch.get(node.name)
            why = f"TVM has no converter for {stays}" if stays else "compiled with the whole graph"
            choices.append(Choice(node.name, node.meta.get("path", ""), _op(node), "torch" if stays else "tvm", why))
    return Lowered(graph, tuple(choices), "tvm", run)


def _with_onnxruntime(graph: Graph) -> Lowered:
    from .onnx.export import export
    from .onnx.session import Session

    with TemporaryDirectory() as folder:
        session = Session(export(graph, Path(folder) / "model.onnx").path, torch.get_num_threads())
    nodes = [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return Lowered(graph, tuple(Choice(n.name, n.meta.get("path", ""), _op(n), "onnx", "exported with the whole graph") for n in nodes), "onnx", session)


def _op(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.name.split("::")[1]
