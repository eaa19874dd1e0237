"""Parts of a graph, run: single nodes at chosen sizes (what a mask hides, where a channel or a token ends up), chosen values on whole inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .errors import UsageError
from .graph import Graph
from .nodes import number

LARGE = 16
"""Numbers from here on may be window widths. They are replaced by small ones, so that masks of thirty tokens show them."""

WIDTHS = {"add", "sub", "rsub", "lt", "le", "gt", "ge", "eq", "ne", "tril", "triu", "clamp", "clamp_min", "clamp_max"}
"""Ops whose number arguments may be window widths."""


class Evaluator:
    """Runs single nodes of a graph on the CPU at chosen sizes of its dynamic dims, with chosen values for some nodes.

    widths: large numbers in the graph -> what to compute with instead.
    """

    def __init__(self, graph: Graph, sizes: dict[str, int], given: dict[fx.Node, Any], widths: dict[int, int] | None = None) -> None:
        self.graph, self.given, self.widths = graph, dict(given), widths or {}
        self._known: dict[Any, int] = {}
        self._sizes = {graph.symbols[name].node.expr: size for name, size in sizes.items()}

    def size(self, value: Any) -> int:
        """An int for a size of the graph at the chosen sizes."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        expression = value.node.expr
        if expression not in self._known:
            self._known[expression] = int(expression.subs(self._sizes))
        return self._known[expression]

    def shape(self, node: fx.Node) -> list[int]:
        """The shape a node has at the chosen sizes."""
        return [self.size(s) for s in node.meta["val"].shape]

    def run(self, node: fx.Node) -> Any:
        """The value of a node. Raises whatever its ops raise at these sizes."""
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [n for n in operands(top) if n not in self.given] if top not in self.given else []
            if missing:
                stack += missing
                continue
            if top not in self.given:
                self.given[top] = self._call(top)
            stack.pop()
        return self.given[node]

    def _call(self, node: fx.Node) -> Any:
        if is_size(node):
            return self.size(node.meta["val"])
        if node.op == "get_attr":
            width = self.widths.get(width_of(self.graph, node))  # type: ignore[arg-type]
            value = self.graph.weight(node).detach().cpu()
            return value if width is None else torch.full_like(value, width).copysign(value).to(value.dtype)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._operand)  # type: ignore[misc]
        if op_name(node) in WIDTHS:
            args = tuple(self._narrowed(a) for a in args)  # type: ignore[union-attr]
        if kwargs.get("device") is not None:  # type: ignore[union-attr]
            kwargs = {**kwargs, "device": torch.device("cpu")}  # type: ignore[dict-item]  # a meta or CUDA capture proves its masks on the CPU
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _operand(self, node: fx.Node) -> Any:
        if node in self.given:
            return self.given[node]
        return torch.empty(self.shape(node), dtype=node.meta["val"].dtype)  # only its shape matters: zeros_like, new_ones

    def _narrowed(self, value: Any) -> Any:
        if type(value) not in (int, float) or abs(value) not in self.widths:
            return value
        return type(value)(self.widths[abs(value)] * (1 if value > 0 else -1))


def operands(node: fx.Node) -> list[fx.Node]:
    """What must be known before a node can run: nothing for a size, which follows from the dims; no values where a shape is enough."""
    if is_size(node):
        return []
    like = op_name(node).startswith("new_") or op_name(node).endswith("_like")
    return [n for n in node.all_input_nodes if not (like and n is node.args[0])]


def width_of(graph: Graph, node: fx.Node) -> int | None:
    """The large integer a constant of one element holds."""
    if graph.weight(node).is_floating_point() or (value := number(graph, node)) is None:
        return None
    return abs(int(value)) if abs(value) >= LARGE else None


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size: it follows from the dims alone."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def op_name(node: fx.Node) -> str:
    """An op's name without namespace and overload; nothing for a plain Python function."""
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def values_of(graph: Graph, names: Sequence[str]) -> fx.GraphModule:
    """Flat inputs -> the values of these nodes: the graph's program over the graph's own weights. UsageError for a name it lacks."""
    program = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    program.graph_copy(graph.fx, copied)
    by_name = {old.name: new for old, new in copied.items()}
    if missing := [n for n in names if n not in by_name]:
        raise UsageError(f"the graph has no value {missing[0]!r}")
    program.output(tuple(by_name[n] for n in names))
    program.eliminate_dead_code()
    return fx.GraphModule(graph.module, program)
