"""A graph as Python a person can read: one call a line, shapes, dtypes and the original module beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .cost import op_name
from .graph import Graph

DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def show(graph: Graph, prefix: str = "") -> str:
    """The program as text; with `prefix`, only the calls of modules below that path.

    Example line: `linear_4 = linear(layer_norm_1, W["encoder.layer.0.intermediate.dense.weight"])  # f32[batch, sequence, 1536]  encoder.layer.0`
    """
    rows = lines(graph, prefix)
    width = min(max((len(code) for code, _, _ in rows), default=0), 110)
    typed = max((len(what) for _, what, _ in rows), default=0)
    names = dim_names(graph)
    inputs = ", ".join(f"{n.target}: {kind(n.meta['val'], names)}" for n in graph.inputs)
    body = "\n".join(f"    {code:<{width}}  # {what:<{typed}}  {path}".rstrip() for code, what, path in rows)
    return f"def forward({inputs}):\n{body}\n    return {_text(graph.output.args[0])}\n"


def lines(graph: Graph, prefix: str = "") -> list[tuple[str, str, str]]:
    """(code, kind of the result, module path) of every call."""
    names = dim_names(graph)
    calls = [n for n in graph.nodes if f"{n.meta.get('path', '')}.".startswith(f"{prefix}." if prefix else "")]
    return [(f"{n.name} = {call_text(n)}", kind(n.meta.get("val"), names), n.meta.get("path", "")) for n in calls]


def dim_names(graph: Graph) -> dict[Any, str]:
    """Symbolic size -> the name of its dynamic dimension, for `kind`."""
    return {s.node.expr: name for name, s in graph.symbols.items()}


def call_text(node: fx.Node) -> str:
    """`add(x, y)`, `h[0]`: one call without its result."""
    if op_name(node) == "getitem":
        return f"{_text(node.args[0])}[{node.args[1]}]"
    arguments = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")]
    return f"{op_name(node)}({', '.join(arguments)})"


def kind(value: Any, names: dict[Any, str] | None = None) -> str:
    """`f32[batch, 12, sequence, 32]`; a tuple of them for several results; `int` for a size."""
    if isinstance(value, Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(_size(s, names or {}) for s in value.shape)}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(kind(v, names) for v in value)})"
    return "int" if isinstance(value, torch.SymInt) else type(value).__name__


def _size(size: Any, names: dict[Any, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    return str(size.node.expr.subs({s: s.func(n) if not hasattr(s, "is_Symbol") else type(s)(n) for s, n in names.items() if s in size.node.expr.free_symbols}))


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f'W["{value.target}"]' if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return str(value) if isinstance(value, torch.dtype) else repr(value)
