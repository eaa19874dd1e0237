"""Graph <-> folder: weights.safetensors and graph.json. Reading one runs no code of the file's choosing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from .call import CallCodeGen
from .encoding import decode, decode_call, encode, encode_call, find_target, identifier, target_name, torch_constant, weight_name
from .errors import InputFileError
from .graph import Dim, Graph, Source, graph_module, owner_of
from .onnx.checks import OPSETS

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
FORMAT, VERSION = "rewright graph", 1
_ALIGNMENT = 64  # bytes; on weights that lie askew, as in the mapped file, CPU kernels round otherwise and are slower


def save_graph(graph: Graph, folder: Path) -> None:
    """Write the graph into an existing folder; `load_graph` gives it back, bit-equal.

    Weights keep their names; one that is tied to another, or has no data (meta), is in graph.json alone. What an imported file is written
    back with (`Graph.source`) and the other names of tied weights are there too.
    Raises UsageError for a graph with foreign ops.
    """
    weights, held = _encode_weights(graph)
    lost = [name for name, t in graph.weights().items() if t.is_meta and name in graph.recipes]
    notes = (
        [f"{len(lost)} weights made of others (first: {lost[0]}) were saved without data and can't be filled later: materialize before saving"] if lost else []
    )
    data = {
        "format": FORMAT,
        "version": VERSION,
        "canonical": graph.canonical,
        "notes": [*graph.notes, *notes],
        "dims": [{"name": d.name, "example": d.example, "low": d.low, "high": d.high} for d in graph.dims.values()],
        **({"source": dataclasses.asdict(graph.source)} if graph.source is not None else {}),
        **({"ties": graph.ties} if graph.ties else {}),
        "weights": weights,
        "inputs": _encode_inputs(graph),
        "nodes": [_encode_node(n) for n in graph.fx.nodes if n.op in ("get_attr", "call_function")],
        "outputs": encode(graph.output.args[0]),
        "call": encode_call(graph.call),
    }
    (folder / GRAPH).write_text(_text(data), encoding="utf8")
    if held:
        save_file(held, folder / WEIGHTS)


def load_graph(folder: Path) -> Graph:
    """The graph in a folder. Raises InputFileError, in one sentence, if it is missing, damaged, unsafe or too new."""
    folder = Path(folder)
    try:
        data = json.loads((folder / GRAPH).read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise InputFileError(f"{folder} holds no saved graph: there is no {GRAPH}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputFileError(f"{folder / GRAPH} can't be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputFileError(f"{folder / GRAPH} is not a graph that rewright saved")
    if data.get("version") != VERSION:
        raise InputFileError(f"{folder / GRAPH} has format version {data.get('version')!r}, this rewright reads {VERSION}; save it again with this one")
    try:
        return _build(data, folder)
    except InputFileError as error:
        raise InputFileError(f"{folder}: {error}") from error
    except Exception as error:  # whatever a damaged file makes fail, the file is at fault
        raise InputFileError(f"{folder / GRAPH} is damaged: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from error


def _text(data: Mapping[str, Any]) -> str:
    """JSON with a node, a weight, an input a line."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def lines(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        if isinstance(value, dict) and value:
            return "{\n  " + ",\n  ".join(f"{dump(k)}: {dump(v)}" for k, v in value.items()) + "\n }"
        return dump(value)

    return "{\n " + ",\n ".join(f"{dump(k)}: {lines(v)}" for k, v in data.items()) + "\n}\n"


def _build(data: Mapping[str, Any], folder: Path) -> Graph:
    notes = list(map(str, data["notes"]))
    root = _load_weights(data["weights"], folder)
    call = decode_call(data["call"], notes)
    program = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in [*data["inputs"], *data["nodes"]]:
        name = entry["name"]
        if name in nodes:
            raise InputFileError(f"two nodes are named {name!r}")
        nodes[name] = _add_node(program, entry, nodes, data["weights"])
    program.output(decode(data["outputs"], nodes))
    program._codegen = CallCodeGen(call)
    graph = Graph(graph_module(root, program), call, {}, notes=notes, canonical=bool(data["canonical"]))
    graph.ties = {str(name): _names(others, "its list of ties") for name, others in data.get("ties", {}).items()}
    graph.source = _source(data["source"]) if "source" in data else None
    for d in data["dims"]:
        graph.add_dim(Dim(str(d["name"]), int(d["example"]), int(d["low"]), None if d["high"] is None else int(d["high"])))
    for node, entry in zip(graph.inputs, data["inputs"], strict=True):
        shape = [graph.symbols[s] if isinstance(s, str) else s for s in entry["shape"]]
        with graph.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=torch_constant(entry["dtype"], torch.dtype), device=entry["device"])
    if tuple(n.target for n in graph.inputs) != call.names:
        raise InputFileError("the inputs differ from those of the call")
    graph.propagate()
    graph.output.meta["val"] = None
    graph.recompile()
    return graph


def _source(data: Mapping[str, Any]) -> Source:
    """What an imported file is written back with, as `save_graph` wrote it."""
    opset, external = data["opset"], data["external"]
    if type(opset) is not int or opset not in OPSETS or type(external) is not bool:
        raise InputFileError(f"its source is damaged: opset {opset!r}, external {external!r}; expected {OPSETS.start} to {OPSETS.stop - 1}, true or false")
    inputs, weights, metadata = (dict(zip(data[part], _names(list(data[part].values()), "its source"))) for part in ("inputs", "weights", "metadata"))
    return Source(inputs, _names(data["outputs"], "its source"), weights, opset, metadata, external)


def _names(held: Any, where: str) -> tuple[str, ...]:
    if not isinstance(held, list) or not all(isinstance(name, str) for name in held):
        raise InputFileError(f"{where} has {held!r} where names are expected; the file is damaged")
    return tuple(held)


def _encode_node(node: fx.Node) -> dict[str, Any]:
    path = node.meta.get("path", "")
    if node.op == "get_attr":
        return {"name": node.name, "weight": node.target, "path": path}
    kwargs = {"kwargs": {k: encode(v) for k, v in node.kwargs.items()}} if node.kwargs else {}
    return {"name": node.name, "call": target_name(node.target), "args": [encode(a) for a in node.args], **kwargs, "path": path}


def _add_node(program: fx.Graph, entry: Mapping[str, Any], nodes: Mapping[str, fx.Node], weights: Mapping[str, Any]) -> fx.Node:
    name = identifier(entry["name"])
    if "input" in entry:
        node = program.create_node("placeholder", identifier(entry["input"]), name=name)
    elif "weight" in entry:
        if entry["weight"] not in weights:
            raise InputFileError(f"{name} reads the weight {entry['weight']!r}, which is not listed")
        node = program.create_node("get_attr", entry["weight"], name=name)
    else:
        args = tuple(decode(a, nodes) for a in entry["args"])
        kwargs = {identifier(k): decode(v, nodes) for k, v in entry.get("kwargs", {}).items()}
        node = program.create_node("call_function", find_target(entry["call"]), args, kwargs, name=name)
    node.meta["path"] = str(entry.get("path", ""))
    return node


def _encode_inputs(graph: Graph) -> list[dict[str, Any]]:
    names = {symbol.node.expr: name for name, symbol in graph.symbols.items()}
    encoded = []
    for node in graph.inputs:
        value = node.meta["val"]
        shape = [names[s.node.expr] if isinstance(s, torch.SymInt) else s for s in value.shape]
        encoded.append({"name": node.name, "input": node.target, "shape": shape, "dtype": str(value.dtype).removeprefix("torch."), "device": str(value.device)})
    return encoded


def _encode_weights(graph: Graph) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of every weight, and the tensors to store: each memory once, under the first name that reads it."""
    described: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    transient = set(dict(graph.module.named_buffers(remove_duplicate=False))) - set(graph.module.state_dict(keep_vars=True))
    for name, tensor in graph.weights().items():
        same = (
            id(tensor) if tensor.is_meta else (tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape, tensor.stride(), tensor.dtype, type(tensor))
        )
        owner = first.setdefault(same, name)
        if owner != name:
            described[name] = {"tied_to": owner}
            continue
        described[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            **({} if tensor.is_contiguous() else {"stride": list(tensor.stride())}),
            "kind": "parameter" if isinstance(tensor, nn.Parameter) else "transient buffer" if name in transient else "buffer",
            "trainable": tensor.requires_grad,
            **({"meta": True} if tensor.is_meta else {}),
        }
        if not tensor.is_meta:
            held[name] = tensor.detach().contiguous()
    stored = {t.untyped_storage().data_ptr() for t in held.values()}
    if len(stored) < len(held):  # views of one memory: the format wants each alone
        held = {name: t.clone() for name, t in held.items()}
    return described, held


def _load_weights(described: Mapping[str, Any], folder: Path) -> nn.Module:
    root = nn.Module()
    tensors: dict[str, Tensor] = {}
    held = _Held(folder / WEIGHTS) if any("tied_to" not in w and not w.get("meta") for w in described.values()) else None
    for name, w in described.items():
        owner, leaf = owner_of(root, weight_name(name), create=True)
        if "tied_to" in w:
            tensor = tensors[w["tied_to"]]
        elif w.get("meta"):
            tensor = torch.empty_strided(w["shape"], w.get("stride") or _strides(w["shape"]), dtype=torch_constant(w["dtype"], torch.dtype), device="meta")
        else:
            assert held is not None
            tensor = _laid_out(held.tensor(name, w["shape"], torch_constant(w["dtype"], torch.dtype)), w.get("stride"))
        if w.get("kind", "") == "parameter" and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=bool(w["trainable"]))
        tensors[name] = tensor
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=described[w.get("tied_to", name)]["kind"] == "buffer")
    return root


class _Held:
    """The weights file, read tensor by tensor as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safetensors.safe_open(path, "pt")
        except FileNotFoundError as error:
            raise InputFileError(f"the weights are missing: there is no {path.name}") from error
        except (OSError, safetensors.SafetensorError) as error:
            raise InputFileError(f"{path.name} is damaged or cut short: {error}") from error
        self.names = set(self.file.keys())

    def tensor(self, name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        if name not in self.names:
            raise InputFileError(f"{self.path.name} lacks the weight {name}")
        tensor = self.file.get_tensor(name)
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise InputFileError(f"{self.path.name} has {name} as {tensor.dtype}{list(tensor.shape)}, the graph wants {dtype}{shape}")
        return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _laid_out(tensor: Tensor, stride: list[int] | None) -> Tensor:
    """The tensor in the memory layout it had, so that the same kernels run and give the same bits."""
    dense = stride is not None and sorted(stride)[0] > 0 and sum((n - 1) * s for n, s in zip(tensor.shape, stride)) + 1 == tensor.numel()
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor) if dense and stride else tensor


def _strides(shape: list[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
