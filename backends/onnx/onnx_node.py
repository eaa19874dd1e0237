"""onnx_node as the nodes it holds: they go back into the file as they came, under the names the new file gives their values."""

from __future__ import annotations

from typing import Any

from ...ir.errors import UsageError
from ...ir.ops.onnx_node import decoded, described
from .opsets import NEWEST

DOMAIN = "rewright.onnx_node"
"""Of calls that stand for the nodes until the file is whole: no exported model keeps one."""

FIRST_WHOLE = 13
"""The oldest opset that a whole file is worth asking for instead."""


def translate(inputs: Any, model: str, outputs: Any) -> Any:
    """A call that `put_back` replaces."""
    import onnx_ir
    from onnxscript import evaluator

    node = onnx_ir.Node(DOMAIN, "Region", list(inputs), [onnx_ir.AttrString("model", model)], num_outputs=len(outputs))
    for value, declared in zip(node.outputs, outputs):
        value.type = onnx_ir.TensorType(onnx_ir.DataType[_ONNX[declared.split()[0]]])
    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
    return list(node.outputs)


_ONNX = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float16": "FLOAT16",
    "bool": "BOOL",
    **{f"{u}int{n}": f"{u}int{n}".upper() for u in ("", "u") for n in (8, 16, 32, 64)},
}


def put_back(model: Any) -> None:
    """Replace every call by its nodes. Raises UsageError where they can't be brought to the model's opset."""
    import onnx_ir
    from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

    calls = [n for n in model.graph if n.domain == DOMAIN]
    if not calls:
        return
    for i, node in enumerate(calls):
        region = onnx_ir.from_proto(_at(decoded(node.attributes["model"].value), model.opset_imports[""], node.attributes["model"].value))
        graph, kept = region.graph, list(region.graph.initializers.values())
        for value in kept:  # functions hold no weights
            constant = onnx_ir.node("Constant", [], attributes={"value": value.const_value})
            graph.insert_before(next(iter(graph)), constant)
            name = value.name
            onnx_ir.convenience.replace_all_uses_with(value, constant.outputs[0])
            del graph.initializers[name]
            constant.outputs[0].name = name
        node.op_type = f"Region{i}"
        del node.attributes["model"]
        for domain, version in region.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
        graph.opset_imports.update(region.opset_imports)
        model.functions[DOMAIN, node.op_type, ""] = onnx_ir.Function(DOMAIN, node.op_type, graph=graph, attributes=[])
    model.opset_imports[DOMAIN] = 1
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.opset_imports.pop(DOMAIN, None)


def _at(region: Any, opset: int, encoded: str) -> Any:
    """The region's model at another version of the standard domain."""
    import onnx
    import onnx.version_converter

    own = next((o for o in region.opset_import if o.domain in ("", "ai.onnx")), None)
    if own is None or own.version == opset:
        return region
    foreign = [o for o in region.opset_import if o.domain not in ("", "ai.onnx")]
    try:
        made = onnx.version_converter.convert_version(region, opset)
        if _ranks(made.graph.input) != _ranks(region.graph.input):  # it takes the batch from Scan's inputs at 9, but not from what makes them
            raise ValueError("the converter changes what it reads")
    except Exception as error:
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
        advice = f"; export with the opset {own.version}" if FIRST_WHOLE <= own.version <= NEWEST else ""
        raise UsageError(f"{described(encoded)} is of opset {own.version} and can't be brought to {opset} ({line[:120]}){advice}") from error
    present = {o.domain for o in made.opset_import}
    made.opset_import.extend(o for o in foreign if o.domain not in present)
    return made


def _ranks(values: Any) -> list[int]:
    return [len(v.type.tensor_type.shape.dim) for v in values]
