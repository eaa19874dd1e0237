"""A graph as Python a person can read: one call a line, shapes, dtypes and the original module beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .cost import op_name
from .graph import Graph

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool"}


def show(graph: Graph, prefix: str = "") -> str:
    """The program as text; with `prefix`, only the calls of modules below that path.

    Example line: `linear_4 = linear(layer_norm_1, W["encoder.layer.0.intermediate.dense.weight"])  # f32[batch, sequence, 1536]  encoder.layer.0`
    """
    names = {s.node.expr: name for name, s in graph.symbols.items()}
    rows: list[tuple[str, str, str]] = []
    for node in graph.nodes:
        if not node.meta.get("path", "").startswith(prefix):
            continue
        rows.append((f"{node.name} = {call_text(node)}", kind(node.meta.get("val"), names), node.meta.get("path", "")))
    width = min(max((len(r[0]) for r in rows), default=0), 110)
    typed = max((len(r[1]) for r in rows), default=0)
    inputs = ", ".join(f"{n.target}: {kind(n.meta['val'], names)}" for n in graph.inputs)
    body = "\n".join(f"    {code:<{width}}  # {what:<{typed}}  {path}".rstrip() for code, what, path in rows)
    return f"def forward({inputs}):\n{body}\n    return {_text(graph.output.args[0])}\n"


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
