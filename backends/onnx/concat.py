"""QuantizeLinear(Concat(a, b)) -> Concat(QuantizeLinear(a), QuantizeLinear(b)): a quarter of the bytes are joined, the codes are the same."""

from __future__ import annotations

from typing import Any


def quantize_parts(model: Any) -> None:
    """Quantize what is joined (heads of attention as a rule) before it is joined, where nothing else reads it whole and one scale serves all of it."""
    import onnx_ir

    for node in [n for n in model.graph if n.op_type == "QuantizeLinear"]:
        whole, scale = node.inputs[0], node.inputs[1]
        joined = whole.producer()
        if joined is None or joined.op_type != "Concat" or len(whole.uses()) != 1 or whole.is_graph_output() or len(scale.shape) != 0:
            continue
        parts = []
        for part in joined.inputs:
            own = onnx_ir.node("QuantizeLinear", [part, *node.inputs[1:]], attributes=dict(node.attributes))
            own.outputs[0].type, own.outputs[0].shape = node.outputs[0].type, part.shape
            model.graph.insert_before(joined, own)
            parts.append(own.outputs[0])
        codes = onnx_ir.node("Concat", parts, attributes=dict(joined.attributes))
        codes.outputs[0].type, codes.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        model.graph.insert_before(joined, codes)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], codes.outputs[0])
        model.graph.remove(node, safe=True)
        model.graph.remove(joined, safe=True)
