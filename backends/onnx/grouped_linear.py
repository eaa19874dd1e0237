"""grouped_linear as one MatMul a group: onnxruntime has no such operator, and the number of groups is fixed."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

op: Any = opset18  # its signatures call every result Optional


def translate(x: Any, w: Any, ends: Any) -> Any:
    """x: [S, n] sorted by group, w: [E, n, m], ends: [E] -> [S, m]. Rows of a group are gathered by their range: a Slice of
    unknown length would leave S as the claimed size, by which onnxruntime reuses buffers."""
    groups = int(w.shape[0])
    axis = op.Constant(value_ints=[0])
    one = op.Constant(value_int=1)
    begin = op.Constant(value_int=0)
    parts = []
    bounds = op.Split(op.Cast(ends, to=7), num_outputs=groups, axis=0) if groups > 1 else [op.Cast(ends, to=7)]  # 7: int64
    weights = op.Split(w, num_outputs=groups, axis=0) if groups > 1 else [w]
    for bound, weight in zip(bounds, weights):
        end = op.Squeeze(bound, axis)
        rows = op.Gather(x, op.Range(begin, end, one), axis=0)
        parts.append(op.MatMul(rows, op.Squeeze(weight, axis)))
        begin = end
    return op.Concat(*parts, axis=0)
