"""Which layer a node of a file came from: what its exporter wrote beside it, or the names of the node and of its weights say so."""

from __future__ import annotations

import ast
from typing import Any

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata torch's exporter gives a node: the paths of the modules around it, outermost first, and its own name."""


def layer_of(node: Any) -> str:
    """The module path of a node, such as "encoder.layer.0.attention.self", or "".

    1. torch's exporter says it.  2. The node is called by its scopes, /encoder/layer.0/MatMul (torch.jit, TensorFlow).
    3. A weight it reads has a dotted name: what is left of the last dot.
    """
    if (scopes := node.metadata_props.get(SCOPES)) is not None and (found := _last_scope(scopes)) is not None:
        return found
    if node.name and "/" in node.name.strip("/"):
        return ".".join(node.name.strip("/").split("/")[:-1])
    weights = [v.name for v in node.inputs if v is not None and v.is_initializer() and v.name and "." in v.name.strip("./")]
    return weights[0].rpartition(".")[0].strip("/.") if weights else ""


def _last_scope(scopes: str) -> str | None:
    """The module's path out of "['', 'encoder', 'encoder.layer.0', 'linear']"; None for what is no such list."""
    try:
        listed = ast.literal_eval(scopes) if len(scopes) < 10_000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(listed, list) or not listed or not all(isinstance(s, str) for s in listed):
        return None
    return next((s for s in reversed(listed[:-1]) if s), "")
