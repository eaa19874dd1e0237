"""Constants in the form a runtime wants them: transposed weights and codes of 4 bits become initializers of their own."""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from ...ir.formats import pack, unpack

CODES = "rewright::BlockedCodes"
"""A node that `fold` computes: no exported model keeps one."""


def blocked_codes(packed: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """A constant uint8 [n, ...] of packed codes as [width, n], what a blocked DequantizeLinear reads: int4, int8, uint4 or uint8.

    torch has no 4-bit tensors, so `fold` makes it. signed: codes less 2^(bits-1), which need no zero point.
    """
    attributes: dict[str, Any] = {"bits": bits, "width": width, "signed": int(signed)}
    return symbolic(CODES, (packed,), attributes, dtype=torch.int8 if signed else torch.uint8, shape=(width, packed.shape[0]))


FOLDED = ("Transpose", "Slice", "Squeeze", "Gather")
"""What is computed where it reads nothing but initializers."""


def fold(model: Any) -> None:
    """Compute every BlockedCodes of an initializer, and what `FOLDED` names: behind a Transpose onnxruntime neither packs a weight nor fuses its product."""
    import onnx_ir

    for node in list(model.graph):
        if not node.inputs or node.outputs[0].is_graph_output() or any(x is None or not x.is_initializer() or x.const_value is None for x in node.inputs):
            continue
        if f"{node.domain}::{node.op_type}" == CODES:
            tensor = _blocked(node, node.inputs[0].const_value)
        elif not node.domain and node.op_type in FOLDED:
            tensor = _computed(node)
        else:
            continue
        sources = list(dict.fromkeys(node.inputs))
        value = initializer(model, f"{sources[0].name}_{node.op_type.lower()}", tensor)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
        for source in sources:
            if not source.uses() and not source.is_graph_output():
                del model.graph.initializers[source.name]
    model.opset_imports.pop(CODES.split("::")[0], None)


def separate(model: Any) -> None:
    """Give every product its own blocked DequantizeLinear with constants of its own: onnxruntime fuses none that share (R7 in specs/quant_shiftadd.md 6)."""
    import onnx_ir

    for node in _blocked_dequantizations(model):
        for reader, index in list(node.outputs[0].uses())[1:]:
            twin = onnx_ir.node("DequantizeLinear", node.inputs, attributes=dict(node.attributes))
            twin.outputs[0].type, twin.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            model.graph.insert_before(reader, twin)
            reader.replace_input_with(index, twin.outputs[0])
    for node in _blocked_dequantizations(model):
        for index, value in enumerate(node.inputs):
            if len(value.uses()) > 1:
                node.replace_input_with(index, initializer(model, f"{value.name}_copy", value.const_value))


def _blocked_dequantizations(model: Any) -> list[Any]:
    return [n for n in model.graph if n.op_type == "DequantizeLinear" and "block_size" in n.attributes]


def initializer(model: Any, name: str, tensor: Any) -> Any:
    """A new weight of the model, of this name or one like it that is free."""
    import onnx_ir

    taken = model.graph.initializers
    name = next(n for n in chain([name], (f"{name}_{i}" for i in count(1))) if n not in taken)
    value = onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(tensor.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _computed(node: Any) -> Any:
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    found: Any = ReferenceEvaluator(onnx_ir.to_proto(node)).run(None, {x.name: x.const_value.numpy() for x in node.inputs})
    return onnx_ir.tensor(found[0].copy())


def _blocked(node: Any, source: Any) -> Any:
    import onnx_ir

    bits, width, signed = (node.attributes[name].value for name in ("bits", "width", "signed"))
    packed = torch.from_numpy(source.numpy())
    codes = unpack(packed, bits, packed.shape[-1] * 8 // bits).flatten(1)[:, :width].t().contiguous()  # [width, n]
    codes = codes ^ 2 ** (bits - 1) if signed else codes  # the code less 2^(bits-1), modulo 2^bits
    dtype = onnx_ir.DataType[f"{'' if signed else 'U'}INT{bits}"]
    if bits == 8:
        return onnx_ir.tensor((codes.view(torch.int8) if signed else codes).numpy(), dtype=dtype)
    return onnx_ir.PackedTensor(pack(codes.flatten(), bits).numpy(), dtype, shape=tuple(codes.shape))
