"""A file of an opset before those we import, brought to the first of them by onnx's own converter."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CaptureError
from .model import OnnxFile, move_out


def brought_to(opset: int, file: OnnxFile, version: int) -> OnnxFile:
    """The file at `opset`, and a remark that says so. Raises CaptureError where the converter can't."""
    import onnx.version_converter
    import onnx_ir

    try:
        onnx_ir.external_data.load_to_model(file.model)
        proto = onnx.version_converter.convert_version(onnx_ir.to_proto(file.model), opset)
        model = onnx_ir.from_proto(proto)
    except Exception as error:  # of its adapters and of protobuf, whose files hold 2 GB
        line = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
        raise CaptureError(f"{file.path} is of opset {version}; rewright imports from {opset} on, and onnx can't bring it there ({line[:120]})") from error
    move_out(model)
    return replace(file, model=model, remarks=(*file.remarks, f"the file is of opset {version}; onnx's converter brought it to {opset}"))
