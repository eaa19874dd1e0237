"""Graph -> .onnx: one re-export, our ops in the forms onnxruntime runs fast, checked in onnxruntime before it gets its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...ir.errors import PromiseBroken, UsageError
from ...ir.files import replacing
from ...ir.graph import Graph, graph_module, quiet
from ...ir.nodes import argument
from ...ir.verify import Drift, compare, example_inputs, padding_mask, rounding_sensitivity
from . import concat, constants, onnx_node, stable_sort
from .linear_nbits import unrounded
from .opsets import NEWEST, OLDEST
from .session import Session
from .silence import silent
from .tidy import tidy

Profile = Literal["ort", "pure"]

# op of ours -> profiles in which it has an ONNX form in the file of its name, with the first opset of that form;
# elsewhere it decomposes into its meaning
FORMS: dict[str, dict[Profile, int]] = {
    "add_layer_norm": {"ort": 17},
    "attention": {"ort": 23},
    "block_attention": {"ort": 13, "pure": 13},
    "block_dense_linear": {"ort": 13, "pure": 13},
    "block_shuffle_linear": {"ort": 13, "pure": 13},
    "embedding_nbits": {"ort": 14},
    "linear_fp8": {"ort": 19, "pure": 19},
    "linear_int8_dynamic": {"ort": 11, "pure": 11},
    "linear_int8_static": {"ort": 13, "pure": 13},
    "linear_nbits": {"ort": 14, "pure": 21},
    "linear_token": {"ort": 13, "pure": 13},
    "multi_head_attention": {"ort": 23},
    "shift_linear": {"ort": 13, "pure": 13},
    "ternary_linear": {"ort": 18, "pure": 18},
}

TRANSLATED = ("grouped_linear", "onnx_node", "selective_scan")
"""Ops of ours that never dissolve: `translate` in the file of their name builds their ONNX nodes."""

ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default)

ROUNDED_COSINE = 0.99
"""Least cosine between a graph and its file where onnxruntime rounds activations that the graph keeps in float."""

EXTERNAL_BYTES = 1_800_000_000  # a protobuf holds 2 GB at most


@dataclass(frozen=True)
class Exported:
    """What was written, and how far onnxruntime is from the Graph over the shapes tried."""

    path: Path
    bytes: int
    nodes: int
    opset: int
    profile: Profile
    parity: Drift | None
    """None when there were no inputs to run on. Weight-only layers: with their activations rounded as onnxruntime does by default."""


def export(
    graph: Graph,
    path: Path | str,
    inputs: Sequence[tuple[Tensor, ...]] = (),
    profile: Profile = "ort",
    opset: int | None = None,
    max_error: float = 1e-3,
    metadata: Mapping[str, str] | None = None,
    tidied: bool = False,
) -> Exported:
    """Write `path` (and `path.data` when the weights exceed 1.8 GB, or lay beside the file that the graph was imported from).

    inputs: flat inputs; parity is checked on them, at batch 1 and at other sizes. The relative error must stay below
    `max_error`, or, where the graph is that sensitive to rounding (8-bit activations), the cosine must be as near to 1 as
    that of the graph with its own copy disturbed in the last place, within a factor of 3. Weight-only layers are checked so
    without the rounding of activations that onnxruntime adds to them, and with it to a cosine of 0.99.
    profile: "ort" uses the forms measured fastest in onnxruntime, "pure" decomposes all but quantized layers, for other runtimes.
    opset: default that of an imported file (18 where it is older, 25 where it is newer), else 20, or 23 in the "ort" profile where that brings the
    Attention operator (not with RoPE: from 23 on the exporter makes RotaryEmbedding nodes of it that onnxruntime refuses at batch > 1; specs/capture_ir.md 5).
    metadata: properties to write into the file. tidied: its nodes are tidied too (see `tidy`).
    Raises PromiseBroken when onnxruntime disagrees, UsageError for a graph without weights; the old file then stays.
    """
    path = Path(path)
    if graph.on_meta:
        raise UsageError("the graph was captured without weights (meta device); fill it with Graph.materialize before export")
    opset = default_opset(graph, profile) if opset is None else opset
    if opset > NEWEST:
        raise UsageError(f"opset {opset} can't be written; the newest that can is {NEWEST}")
    model = to_onnx_ir(graph, profile, opset)
    if tidied:
        model = tidy(model).model
    model.metadata_props.update({**(graph.source.metadata if graph.source is not None else {}), **(metadata or {})})
    data = f"{path.name}.data"
    outside = graph.weight_bytes() > EXTERNAL_BYTES or graph.source is not None and graph.source.external
    external = data if outside else None
    flats = [*example_inputs(graph, inputs[0]), *inputs[1:]] if inputs else []
    rounds = any(n.op_type == "MatMulNBits" or "block_size" in n.attributes for n in model.graph)
    parity = None
    with replacing(path, data) as temporary:
        if flats and rounds:
            with unrounded(model):
                _save(model, temporary, external)
            _parity(graph, Session(temporary, round_activations=False), flats, max_error, path)
        _save(model, temporary, external)
        if flats:
            parity = _rounded_parity(graph, Session(temporary), flats, path) if rounds else _parity(graph, Session(temporary), flats, max_error, path)
        size = sum(f.stat().st_size for f in (temporary, temporary.parent / data) if f.exists())
    return Exported(path, size, sum(1 for _ in model.graph), opset, profile, parity)


def _parity(graph: Graph, session: Session, flats: list[tuple[Tensor, ...]], max_error: float, path: Path) -> Drift:
    found = compare(graph.run, session, flats, padding_mask(graph))
    if found.relative_error > max_error:
        allowed = rounding_sensitivity(graph, flats)
        if 1 - found.cosine > 3 * (1 - allowed.cosine) + 1e-6:
            raise PromiseBroken(
                f"the exported model does not agree with the graph in onnxruntime: relative error {found.relative_error:.2g}, cosine {found.cosine:.5f} "
                f"(rounding alone moves the graph to cosine {allowed.cosine:.5f}); {path} was not written"
            )
    return found


def _rounded_parity(graph: Graph, session: Session, flats: list[tuple[Tensor, ...]], path: Path) -> Drift:
    """Of weight-only layers, whose activations onnxruntime rounds to 8 bits a group: known to be right without, and near enough with it."""
    found = compare(graph.run, session, flats, padding_mask(graph))
    if found.cosine < ROUNDED_COSINE:
        raise PromiseBroken(
            f"onnxruntime rounds the activations of weight-only layers to 8 bits, and that alone moves this graph to cosine {found.cosine:.5f}, below "
            f"{ROUNDED_COSINE}; leave its most sensitive layers out of the quantization. {path} was not written"
        )
    return found


def default_opset(graph: Graph, profile: Profile) -> int:
    """An imported file's own, from 18 to 25, where all has a form in it; else 23 where the Attention operator helps and RoPE does not forbid it, or 20."""
    ours = torch.ops.rewright
    least = 21 if profile == "pure" and graph.find(ours.linear_nbits.default) else OLDEST  # for blocked DequantizeLinear
    if graph.source is not None:
        return max(least, min(graph.source.opset, NEWEST), 19 if graph.find(ours.linear_fp8.default) else OLDEST)
    attention = graph.find(ours.attention.default, ours.multi_head_attention.default)
    return max(least, 23 if profile == "ort" and attention and not graph.find(ours.rope.default) else 20)


def to_onnx_ir(graph: Graph, profile: Profile = "ort", opset: int = 20) -> Any:
    """The graph as an onnx_ir.Model with the original's input, output and dim names."""
    module, examples = _flat_module(graph, profile, opset)
    dims = [{axis: torch.export.Dim.AUTO for axis, size in enumerate(n.meta["val"].shape) if isinstance(size, torch.SymInt)} for n in graph.inputs]
    with quiet(), silent(), _one_sentence():
        exported = torch.export.export(module, examples, dynamic_shapes=[d or None for d in dims], strict=False)
        program = torch.onnx.export(
            exported,
            (),
            dynamo=True,
            opset_version=opset,
            optimize=True,
            input_names=list(graph.call.names),
            output_names=_output_names(graph),
            custom_translation_table=translations(graph),
            verbose=False,
        )
    assert program is not None
    model = program.model
    onnx_node.put_back(model)
    constants.fold(model)
    constants.separate(model)
    concat.quantize_parts(model)
    _name_dims(model, graph)
    _free_output_names(model)
    _own_names(model, graph)
    _drop_traces(model)
    model.producer_name, model.doc_string = "rewright", None
    return model


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """The exporter's errors fill screens; what went wrong is at their bottom."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UsageError(f"the ONNX exporter can't express the graph: {next(iter(str(cause).splitlines()), type(cause).__name__)}") from error


def _drop_traces(model: Any) -> None:
    """The exporter's notes hold stack traces with paths of this machine, and outweigh small graphs."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _flat_module(graph: Graph, profile: Profile, opset: int) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph with flat inputs and outputs and ONNX forms in place of our ops, and example tensors of its example sizes."""
    forms = load_forms(profile, opset)
    flat = fx.Graph()
    output = flat.graph_copy(graph.fx, {})
    flat.output(output)
    for node in flat.nodes:
        if node.op == "call_function" and node.target in forms:
            node.target = forms[node.target]
    _drop_assertions(flat)
    module = graph_module(graph.module, flat)
    least = max((3 * argument(n, "block") for n in graph.find(torch.ops.rewright.block_attention.default)), default=2)
    examples = []
    for node in graph.inputs:
        value = node.meta["val"]
        examples.append(torch.zeros([_example(graph, s, least) if isinstance(s, torch.SymInt) else s for s in value.shape], dtype=value.dtype))
    return module, tuple(examples)


def _example(graph: Graph, symbol: Any, least: int) -> int:
    """A size to trace with: one that holds fewer than two blocks of tokens would make their number a constant."""
    high = next((dim.high for name, dim in graph.dims.items() if graph.symbols[name].node.expr == symbol.node.expr), None)
    return max(graph.size(symbol), least if high is None else min(least, high))


def _drop_assertions(program: fx.Graph) -> None:
    """ONNX has no assertion; what only an assertion read goes with it."""
    for node in list(program.nodes):
        if node.target in ASSERTIONS:
            program.erase_node(node)
    for node in reversed(program.nodes):
        if node.op == "call_function" and not node.users:
            program.erase_node(node)


def load_forms(profile: Profile, opset: int) -> dict[Any, Callable[..., Any]]:
    """Op overload -> its ONNX form: a torch function that builds ONNX nodes with torch.onnx.ops.symbolic."""
    usable = [op for op, since in FORMS.items() if profile in since and opset >= since[profile]]
    return {getattr(torch.ops.rewright, op).default: getattr(import_module(f".{op}", __package__), profile) for op in usable}


def translations(graph: Graph) -> dict[Any, Callable[..., Any]]:
    """Op overload -> the function that builds its ONNX nodes, for those of `TRANSLATED` that the graph calls, and for stable sorts."""
    called = [op for op in TRANSLATED if graph.find(getattr(torch.ops.rewright, op).default)]
    ours = {getattr(torch.ops.rewright, op).default: import_module(f".{op}", __package__).translate for op in called}
    return {**ours, torch.ops.aten.sort.stable: stable_sort.translate}


def _output_names(graph: Graph) -> list[str]:
    """The output structure's own keys (`last_hidden_state`), or output_0, output_1, ..."""
    from torch.utils import _pytree as pytree

    count = graph.call.out_spec.num_leaves
    names = [f"output_{i}" for i in range(count)]
    with contextlib.suppress(ValueError):  # a class registered without key names
        paths, _ = pytree.tree_flatten_with_path(graph.call.unflatten(tuple(range(count))))
        keys = ["_".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path) for path, _ in paths]
        if all(k and not k[0].isdigit() for k in keys) and len(set(keys)) == count and not set(keys) & set(graph.call.names):
            names = keys
    return [n for n, value in zip(names, graph.output.args[0]) if isinstance(value, fx.Node)]  # type: ignore[arg-type]


def _free_output_names(model: Any) -> None:
    """Inner values that are called like an output (an imported file's `linear_3`) get names of their own: onnxruntime refuses two of one name."""
    outputs = {v.name for v in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in outputs and not value.is_graph_output():
                value.name = f"{value.name}_inner"


def _own_names(model: Any, graph: Graph) -> None:
    """An imported file's own names of its inputs, outputs and weights, where they are still there and nothing else is called so."""
    if graph.source is None:
        return
    of_source, values = (
        graph.source,
        {v.name: v for v in (*model.graph.inputs, *model.graph.initializers.values(), *(o for n in model.graph for o in n.outputs))},
    )
    wanted = {new: old for new, old in {**of_source.weights, **of_source.inputs}.items() if new in values and new != old}
    outputs = of_source.outputs if len(of_source.outputs) == len(model.graph.outputs) else ()
    wanted |= {v.name: name for v, name in zip(model.graph.outputs, outputs) if v.name != name}
    for value in values.values():  # what stands in the way steps aside
        if value.name in wanted.values() and value.name not in wanted:
            value.name = f"{value.name}_inner"
    for new in wanted:
        values[new].name = f"{new}_renamed"  # two may change places
    for new, old in wanted.items():
        values[new].name = old


def _name_dims(model: Any, graph: Graph) -> None:
    """torch.export's s72 becomes the capture's `batch`, everywhere."""
    import onnx_ir

    by_expression = {symbol.node.expr: name for name, symbol in graph.symbols.items()}
    names: dict[str, str] = {}
    for value, node in zip(model.graph.inputs, graph.inputs, strict=True):
        for dim, size in zip(value.shape, node.meta["val"].shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and isinstance(size, torch.SymInt):
                names[str(dim.value)] = by_expression[size.node.expr]
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(d.value), d.value) if isinstance(d, onnx_ir.SymbolicDim) else d for d in value.shape])


def _save(model: Any, path: Path, external: str | None) -> None:
    import onnx_ir

    onnx_ir.save(model, path, external_data=external)
