"""outputs = the ONNX nodes of `model`, run by onnxruntime on `inputs`: what we have no meaning of stays what it was, a barrier to every pass."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputFileError, UsageError
from ..onnx.checks import graphs, tensors
from ._semantic import LIBRARY

_NUMPY = {"u8": np.uint64, "i8": np.int64}
"""onnxruntime gives some 64-bit integers as another C type of that size, which torch does not take; np.array(a, np.uint64) leaves it what it is."""


def onnx_node(inputs: Sequence[Tensor], model: str, outputs: Sequence[str]) -> list[Tensor]:
    """Run a region of an ONNX file.

    inputs: tensors the region reads, in the order of the model's inputs. model: its ModelProto in base64.
    outputs: dtype and sizes of each result, such as "float32 0.0 64 ?": axis 0 of input 0, 64, known only when it has run.
    Raises UsageError where onnxruntime does not run it. Not differentiable.
    """
    session = _session(model)
    feeds = {i.name: _array(x) for i, x in zip(session.get_inputs(), inputs, strict=True)}
    try:
        found = session.run(None, feeds)
    except Exception as error:  # onnxruntime raises its own classes
        raise UsageError(f"onnxruntime can't run {described(model)}: {_line(error)}") from error
    device = inputs[0].device if inputs else torch.device("cpu")
    return [torch.from_numpy(np.array(a).view(_NUMPY.get(a.dtype.kind + str(a.dtype.itemsize), a.dtype))).to(device) for a in found]


def fake(inputs: Sequence[Tensor], model: str, outputs: Sequence[str]) -> list[Tensor]:
    """Empty tensors of the declared dtypes and sizes; an unknown size is a fresh symbol."""
    made = []
    for declared in outputs:
        dtype, *sizes = declared.split()
        made.append(torch.empty([_size(s, inputs) for s in sizes], dtype=getattr(torch, dtype), device=inputs[0].device if inputs else "cpu"))
    return made


def _size(text: str, inputs: Sequence[Tensor]) -> Any:
    if text == "?":
        return torch.library.get_ctx().new_dynamic_size()
    place, _, axis = text.partition(".")
    return inputs[int(place)].shape[int(axis)] if axis else int(text)


# the tag keeps every pass from computing it ahead or merging two of it: a node we don't know may not give the same twice
LIBRARY.define("onnx_node(Tensor[] inputs, str model, str[] outputs) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))
LIBRARY.impl("onnx_node", onnx_node, "CompositeExplicitAutograd")
torch.library.register_fake("rewright::onnx_node", fake, lib=LIBRARY)


def encoded(model: Any) -> str:
    """A ModelProto as the op's string."""
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode("ascii")


def decoded(model: str) -> Any:
    """The ModelProto of the op's string."""
    import onnx

    return onnx.load_model_from_string(base64.b64decode(model))


@functools.lru_cache(maxsize=64)
def described(model: str) -> str:
    """'Loop' or 'SplitToSequence and 2 more ONNX nodes', for messages."""
    nodes = decoded(model).graph.node
    name = f"{nodes[0].op_type}{f' of {nodes[0].domain}' if nodes[0].domain else ''}"
    return f"the ONNX node {name}" if len(nodes) == 1 else f"{name} and {len(nodes) - 1} more ONNX nodes"


@functools.lru_cache(maxsize=64)
def _session(model: str) -> Any:
    import onnxruntime

    proto = decoded(model)
    if any(t.data_location for graph in graphs(proto) for _, t in tensors(graph)):
        raise InputFileError(f"{described(model)} reads weights from a file of its own; the graph is damaged or unsafe")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UsageError(f"onnxruntime can't load {described(model)}: {_line(error)}") from error


def _array(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().numpy()


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """A loop with a sum inside, two outputs of which one is as long as an input, and a length that only the data tell."""
    import onnx

    kind = {torch.float32: "float", torch.float64: "double", torch.float16: "float16"}[dtype]
    header = '<ir_version: 8, opset_import: ["": 18]>'
    loop = f"""{header} agraph ({kind}[n, 4] x) => ({kind}[n, 4] y) {{
        count = Constant <value_int = 3> ()
        y = Loop (count, , x) <body = b (int64 i, bool c, {kind}[n, 4] h) => (bool again, {kind}[n, 4] next) {{ again = Identity (c) next = Add (h, x) }}>
    }}"""
    two = f"{header} agraph ({kind}[n] x, {kind}[m] z) => ({kind}[m] a, {kind} b) {{ a = Neg (z) b = ReduceMax <keepdims = 0> (x) }}"
    found = f"{header} agraph ({kind}[n] x) => (int64[1, m] places) {{ places = NonZero (x) }}"
    name = str(dtype).removeprefix("torch.")
    parse = onnx.parser.parse_model
    yield [torch.randn(3, 4, dtype=dtype, device=device)], encoded(parse(loop)), [f"{name} 0.0 4"]
    yield [torch.randn(2, dtype=dtype, device=device), torch.randn(5, dtype=dtype, device=device)], encoded(parse(two)), [f"{name} 1.0", name]
    yield [torch.tensor([1.0, 0.0, 2.0], dtype=dtype, device=device)], encoded(parse(found)), ["int64 1 ?"]
