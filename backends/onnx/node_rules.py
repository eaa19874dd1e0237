"""Rewrites of ONNX nodes that onnxscript's rules leave: each takes a model, edits it in place, and gives the number of places it changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .constants import initializer


def merge_transposed_heads(model: Any) -> int:
    """Reshape(Transpose(Reshape(x, [B*H, T, D]), [0, 2, 1]), [B, H, D, T]) -> Transpose(x, [0, 1, 3, 2]): what torch's exporter makes of a key's transpose."""
    import onnx_ir

    changed = 0
    for node in _nodes(model, "Reshape"):
        turned = node.inputs[0].producer()
        if turned is None or turned.op_type != "Transpose" or _ints(turned, "perm") != [0, 2, 1] or not _only(node.inputs[0]):
            continue
        merged = turned.inputs[0].producer()
        if merged is None or merged.op_type != "Reshape" or not _only(turned.inputs[0]):
            continue
        source, middle, after = merged.inputs[0].shape, merged.outputs[0].shape, node.outputs[0].shape
        if source is None or middle is None or after is None or len(source) != 4 or len(middle) != 3 or len(after) != 4:
            continue
        if not _equal(middle[1:], source[2:]) or not _equal(after, (source[0], source[1], source[3], source[2])):
            continue
        _replace(model, node, onnx_ir.node("Transpose", [merged.inputs[0]], attributes={"perm": [0, 1, 3, 2]}))
        changed += 1
    return changed


def gather_single_parts(model: Any) -> int:
    """Squeeze(Slice(x, i, i + 1)), and Split into parts of one that are all squeezed -> Gather(x, i): the same copies, fewer nodes."""
    changed = 0
    for node in _nodes(model, "Split"):
        squeezes = [out.uses()[0].node for out in node.outputs if _only(out) and out.uses()[0].node.op_type == "Squeeze"]
        sizes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axis = _axis(node.attributes["axis"].value if "axis" in node.attributes else 0, node.inputs[0])
        if axis is None or sizes is None or any(s != 1 for s in sizes.flat) or len(squeezes) < len(node.outputs):
            continue
        if all(_squeezes(squeeze, axis) for squeeze in squeezes):
            for place, squeeze in enumerate(squeezes):
                _replace(model, squeeze, _gather(model, node.inputs[0], place, axis))
            changed += 1
    for node in _nodes(model, "Squeeze"):
        cut = node.inputs[0].producer()
        if cut is None or cut.op_type != "Slice" or not _only(node.inputs[0]) or len(cut.inputs) < 4:
            continue
        start, end, axes, step = (_number(x) for x in (*cut.inputs[1:4], cut.inputs[4] if len(cut.inputs) > 4 else None))
        if start is None or end is None or axes is None or start < 0 or end != start + 1 or len(cut.inputs) > 4 and step != 1:
            continue
        axis = _axis(int(axes), cut.inputs[0])
        size = None if axis is None or cut.inputs[0].shape is None else cut.inputs[0].shape[axis]
        if axis is not None and isinstance(size, int) and start < size and _squeezes(node, axis):
            _replace(model, node, _gather(model, cut.inputs[0], int(start), axis))
            changed += 1
    return changed


def _gather(model: Any, source: Any, place: int, axis: int) -> Any:
    import onnx_ir

    index = _add_constant(model, np.array(place, np.int64), f"place_{place}")
    return onnx_ir.node("Gather", [source, index], attributes={"axis": axis})


def merge_transposes(model: Any) -> int:
    """Transpose(Transpose(x, p), q) -> Transpose(x, [p[i] for i in q])."""
    import onnx_ir

    changed = 0
    for node in _nodes(model, "Transpose"):
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Transpose" or (p := _ints(inner, "perm")) is None or (q := _ints(node, "perm")) is None:
            continue
        _replace(model, node, onnx_ir.node("Transpose", [inner.inputs[0]], attributes={"perm": [p[i] for i in q]}))
        changed += 1
    return changed


def scale_weights(model: Any) -> int:
    """(x W + b) * g -> x (W g) + (b g), for a constant g a channel or a number; a number is taken through Reshape and Transpose."""

    changed = 0
    for node in _nodes(model, "Mul"):
        scale, value = _constant(node.inputs[1]), node.inputs[0]
        if scale is None or scale.dtype not in (np.float32, np.float64):
            continue
        while scale.size == 1 and value.producer() is not None and value.producer().op_type in ("Reshape", "Transpose") and _only(value):
            value = value.producer().inputs[0]
        add = value.producer()
        if add is None or not _only(value) or add.op_type not in ("Add", "MatMul"):
            continue
        product, bias = (add, None) if add.op_type == "MatMul" else (add.inputs[0].producer(), _constant(add.inputs[1]))
        if product is None or product.op_type != "MatMul" or not _only(product.outputs[0]) or bias is None and product is not add:
            continue
        weight = _constant(product.inputs[1])
        if weight is None or weight.ndim != 2 or weight.dtype != scale.dtype or not _only(product.inputs[1]) or scale.size not in (1, weight.shape[1]):
            continue
        if scale.size > 1 and scale.shape[-1] != scale.size or bias is not None and bias.ndim != 1:
            continue
        if node.inputs[0].shape is None or scale.ndim > len(node.inputs[0].shape):
            continue
        factor = scale.reshape(-1)
        product.replace_input_with(1, _add_constant(model, weight * factor, f"{product.inputs[1].name}_scaled"))
        if bias is not None:
            add.replace_input_with(1, _add_constant(model, bias * factor, f"{add.inputs[1].name}_scaled"))
        _bypass(model, node)
        changed += 1
    return changed


def divide(model: Any) -> int:
    """x * Reciprocal(y) -> x / y: one rounding less."""
    import onnx_ir

    changed = 0
    for node in _nodes(model, "Mul"):
        for x, other in (node.inputs, reversed(node.inputs)):
            inverse = other.producer()
            if inverse is not None and inverse.op_type == "Reciprocal" and _only(other) and x is not other:
                _replace(model, node, onnx_ir.node("Div", [x, inverse.inputs[0]]))
                changed += 1
                break
    return changed


def scale_queries_only(model: Any) -> int:
    """MatMul(q * a, k * b) of numbers a and b -> MatMul(q * ab, k): torch's exporter gives both sides the root of the scale."""
    changed = 0
    for node in _nodes(model, "MatMul"):
        scaled = [x.producer() for x in node.inputs]
        if any(s is None or s.op_type != "Mul" or not _only(x) for s, x in zip(scaled, node.inputs)):
            continue
        a, b = (_number(s.inputs[1]) for s in scaled)
        if a is None or b is None or a.dtype != b.dtype or a.dtype not in (np.float32, np.float64):
            continue
        if any(s.inputs[0].shape is None or len(s.inputs[0].shape) < s.inputs[1].const_value.numpy().ndim for s in scaled):
            continue
        product = _add_constant(model, np.asarray(a * b, a.dtype), f"{scaled[0].outputs[0].name}_scale")
        scaled[0].replace_input_with(1, product)
        node.replace_input_with(1, scaled[1].inputs[0])
        changed += 1
    return changed


RULES = (merge_transposed_heads, merge_transposes, gather_single_parts, divide, scale_queries_only, scale_weights)


def _nodes(model: Any, op_type: str) -> list[Any]:
    return [n for n in model.graph if n.op_type == op_type and n.domain in ("", "ai.onnx") and all(x is not None for x in n.inputs)]


def _only(value: Any) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _ints(node: Any, name: str) -> list[int] | None:
    return list(node.attributes[name].value) if name in node.attributes else None


def _constant(value: Any) -> np.ndarray | None:
    """A weight's numbers, unless a caller may give others (a weight that is an input too)."""
    return None if value is None or value.const_value is None or value.is_graph_input() else value.const_value.numpy()


def _number(value: Any) -> np.ndarray | None:
    array = _constant(value)
    return None if array is None or array.size != 1 else array.reshape(())


def _squeezes(node: Any, axis: int) -> bool:
    """Whether a Squeeze takes away just this axis."""
    axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(_ints(node, "axes") or [])
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else None
    return axes is not None and axes.size == 1 and (axes.flat[0] == axis or rank is not None and axes.flat[0] + rank == axis)


def _axis(axis: int, value: Any) -> int | None:
    """An axis counted from the front, or None where the rank is not known."""
    return axis if axis >= 0 else None if value.shape is None else axis + len(value.shape)


def _equal(a: Any, b: Any) -> bool:
    """Whether sizes are the same numbers or the same names."""
    return len(a) == len(b) and all(x == y and (isinstance(x, int) or x.value is not None) for x, y in zip(a, b))


def _add_constant(model: Any, array: np.ndarray, name: str) -> Any:
    import onnx_ir

    return initializer(model, name, onnx_ir.tensor(array))


def _bypass(model: Any, node: Any) -> None:
    """Take a node out whose first input has become its value; a graph output keeps its name."""
    import onnx_ir

    old, source = node.outputs[0], node.inputs[0]
    if not old.is_graph_output():
        onnx_ir.convenience.replace_all_uses_with(old, source)
        return model.graph.remove(node, safe=True)
    _replace(model, node, onnx_ir.node("Identity", [source]))


def _replace(model: Any, node: Any, new: Any) -> None:
    """Put `new` in the place of `node`; its value keeps the name, type and shape of the old one."""
    import onnx_ir

    old = node.outputs[0]
    new.outputs[0].type, new.outputs[0].shape, new.name = old.type, old.shape, node.name
    model.graph.insert_before(node, new)
    name = old.name
    onnx_ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)
    old.name = None
    new.outputs[0].name = name
    model.graph.remove(node, safe=True)
