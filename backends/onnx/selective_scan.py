"""selective_scan as the Scan operator: a state that onnxruntime carries from step to step."""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnxscript import opset18

op: Any = opset18  # its signatures know no nested graphs and no Optional


def translate(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
    """x, dt: [B, d, L], a: [d, N], b, c: [B, N, L] -> [B, d, L]."""
    last, first, second = (op.Constant(value_ints=[i]) for i in (-1, 0, 1))
    steps = op.Unsqueeze(dt, last)  # [B, d, L, 1]
    decay = op.Exp(op.Mul(op.Unsqueeze(op.Unsqueeze(a, second), first), steps))  # [B, d, L, N]
    drive = op.Mul(op.Mul(steps, op.Unsqueeze(op.Transpose(b, perm=[0, 2, 1]), second)), op.Unsqueeze(x, last))  # [B, d, L, N]
    start = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), op.Concat(op.Shape(x, start=0, end=2), op.Shape(a, start=1, end=2), axis=0))
    scan = op.Scan(start, decay, drive, c, body=_step(x.dtype), num_scan_inputs=3, scan_input_axes=[2, 2, 2], scan_output_axes=[2]).producer()
    scan.resize_outputs(2)  # the exporter's builder knows no operator with any number of outputs: it made the last state alone
    return scan.outputs[1]


def _step(dtype: Any) -> onnx_ir.Graph:
    """(h, decay, drive, c) -> (decay h + drive, y = c . h)"""
    h, decay, drive, c = (onnx_ir.Value(name=f"scan_{n}", type=onnx_ir.TensorType(dtype)) for n in ("state", "decay", "drive", "c"))
    axes = onnx_ir.node("Constant", [], attributes={"value_ints": [1]}, name="scan_axes")
    kept = onnx_ir.node("Mul", [decay, h])
    state = onnx_ir.node("Add", [kept.outputs[0], drive])
    column = onnx_ir.node("Unsqueeze", [c, axes.outputs[0]])  # [B, 1, N]
    product = onnx_ir.node("Mul", [state.outputs[0], column.outputs[0]])
    last = onnx_ir.node("Constant", [], attributes={"value_ints": [-1]}, name="scan_last")
    y = onnx_ir.node("ReduceSum", [product.outputs[0], last.outputs[0]], attributes={"keepdims": 0})
    nodes = [axes, kept, state, column, product, last, y]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"scan_value_{i}"
    for value in (state.outputs[0], y.outputs[0]):
        value.type = onnx_ir.TensorType(dtype)
    return onnx_ir.Graph([h, decay, drive, c], [state.outputs[0], y.outputs[0]], nodes=nodes, name="selective_scan_step", opset_imports={"": 18})
