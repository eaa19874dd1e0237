"""nn.Module, ExportedProgram or .pt2 -> Graph: one torch.export, functional, guards dropped, weights by name."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .call import SIMPLE, Call, CallCodeGen, Captured, Parameter, named_in_signature
from .errors import CaptureError, InputFileError, RewrightError, UsageError
from .graph import Dim, Graph, graph_module, quiet
from .hooks import adopt_foreign_ops, hooks_in_place

aten = torch.ops.aten

LAYER = "rewright.layer"
"""Annotation (torch.fx.traceback) with the path of a call that no module of the traced model makes: that of an ONNX file's node."""

DimNames = dict[str, dict[int, str]]
"""Flat input name -> axis -> name of the dynamic dimension."""


def capture(
    model: nn.Module | ExportedProgram | str | Path,
    args: tuple | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Graph:
    """Capture a model as a Graph that gives the original's outputs bit for bit.

    args, kwargs: example inputs of the original forward; any tensor size works, axes of size 1 that are to stay dynamic
      are repeated to 2 for the trace (torch.export specialises 0 and 1).
    dynamic_shapes: parameter name -> {axis: name or torch.export.Dim}; equal names are one size. Default: axis 0 of every
      tensor is "batch", axis 1 of integer and bool matrices "sequence". `{}` makes everything static.

    Raises CaptureError with the user's own line when torch.export refuses; UsageError for wrong example inputs.
    """
    if isinstance(model, str | Path):
        if Path(model).suffix == ".onnx":
            from .onnx_import import import_onnx

            return import_onnx(model, args, kwargs, dynamic_shapes)
        model = load_pt2(Path(model))
    if isinstance(model, ExportedProgram):
        return _from_exported(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"capture takes an nn.Module, an ExportedProgram, a .pt2 or a .onnx path; got {type(model).__name__}")
    args = args if isinstance(args, tuple) else (args,)
    if not args and not kwargs:
        raise UsageError("capture needs example inputs: args=(tensor, ...) or kwargs={name: tensor}")
    parameters = Call.parameters_of(model.forward)
    given = _bind(model, parameters, args, dict(kwargs or {}))
    names = _dim_names(given, dynamic_shapes)
    training = model.training
    try:
        model.eval()
        exported = _export(model, _at_least_two(given, names), names, parameters)
    finally:
        model.train(training)
    graph = _to_graph(exported, parameters, given, names)
    graph.ties = _ties(model)
    if training:
        graph.notes.append("the model was in training mode; it was captured in eval mode (dropout off, batch norm by running statistics)")
    return graph


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name -> the other names of every weight that has several: the graph reads it by one of them, a checkpoint may hold another."""
    names: dict[int, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(n for n in same if n != name) for same in names.values() if len(same) > 1 for name in same}


def load_pt2(path: Path) -> ExportedProgram:
    """Read a torch.export archive. Raises InputFileError if it is missing or not one."""
    if not path.exists():
        raise InputFileError(f"no file {path}")
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:
        raise InputFileError(f"{path} is not a torch.export archive (.pt2) this torch {torch.__version__} can read: {_first_line(error)}") from error


def _bind(model: nn.Module, parameters: tuple[Parameter, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Example inputs by parameter name; None stays out (it is the default everywhere in practice)."""
    given = Call(parameters, (), pytree.tree_structure(None)).bind(args, kwargs)
    missing = [p.name for p in parameters if p.required and p.name not in given]
    if missing:
        raise UsageError(f"the example inputs lack {', '.join(missing)}; {type(model).__name__}.forward takes {', '.join(p.name for p in parameters)}")
    known = {p.name for p in parameters}
    if not any(p.kind == "VAR_KEYWORD" for p in parameters) and (unknown := [k for k in given if k not in known]):
        raise UsageError(f"{type(model).__name__}.forward takes no {', '.join(unknown)}; it takes {', '.join(p.name for p in parameters)}")
    order = [c.name for c in codegen.call.captured] if isinstance(codegen := _codegen(model), CallCodeGen) else []  # see CallCodeGen.process_inputs
    given = {k: given[k] for k in (*(k for k in order if k in given), *(k for k in given if k not in order))}
    return {k: v for k, v in given.items() if v is not None}


def _codegen(model: nn.Module) -> Any:
    return model.graph._codegen if isinstance(model, fx.GraphModule) else None


def _leaves(given: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """(parameter, flat name, leaf) of every leaf; flat names are the parameter's own, numbered when it is nested."""
    found = []
    for name, value in given.items():
        leaves = pytree.tree_leaves(value)
        found += [(name, name if len(leaves) == 1 else f"{name}_{i}", leaf) for i, leaf in enumerate(leaves)]
    return found


def _dim_names(given: Mapping[str, Any], dynamic_shapes: Mapping[str, Any] | None) -> DimNames:
    if dynamic_shapes is not None and (unknown := [k for k in dynamic_shapes if k not in given]):
        raise UsageError(f"dynamic_shapes names {', '.join(unknown)}, which the example inputs don't have ({', '.join(given)})")
    names: DimNames = {}
    sizes: dict[str, int] = {}
    for parameter, flat, leaf in _leaves(given):
        if not isinstance(leaf, Tensor):
            continue
        if dynamic_shapes is None:
            axes = {0: "batch" if leaf.shape[0] == sizes.get("batch", leaf.shape[0]) else f"{flat}_batch"} if leaf.dim() else {}
            if leaf.dim() == 2 and not leaf.is_floating_point():  # a decoder's sequence has another length than the encoder's
                axes[1] = "sequence" if leaf.shape[1] == sizes.get("sequence", leaf.shape[1]) else f"{flat}_sequence"
        else:
            spec = dynamic_shapes.get(parameter) or {}
            axes = dict(enumerate(spec)) if isinstance(spec, list | tuple) else dict(spec)
            axes = {axis: _dim_name(d, flat, axis) for axis, d in axes.items() if d is not None}
        for axis, name in axes.items():
            if sizes.setdefault(name, leaf.shape[axis]) != leaf.shape[axis]:
                raise UsageError(
                    f"axis {axis} of {flat} is called {name!r} and has size {leaf.shape[axis]}, another axis of that name {sizes[name]}: "
                    "give them two names in dynamic_shapes, or examples of one size"
                )
        names[flat] = axes
    return names


def _dim_name(dim: Any, flat: str, axis: int) -> str:
    if isinstance(dim, str):
        return dim
    name = getattr(dim, "__name__", None)
    return name if isinstance(name, str) else f"{flat}_{axis}"  # Dim.AUTO and Dim.DYNAMIC have no name


def _at_least_two(given: dict[str, Any], names: DimNames) -> dict[str, Any]:
    flat_names = iter([flat for _, flat, _ in _leaves(given)])

    def widen(leaf: Any) -> Any:
        flat = next(flat_names)
        if isinstance(leaf, Tensor):
            leaf = leaf.clone() if leaf._is_view() else leaf  # torch.export's guards ask after a view's base, which they can't reach
            for axis in names[flat]:
                if leaf.shape[axis] == 1:
                    leaf = leaf.repeat_interleave(2, axis)
        return leaf

    return {name: pytree.tree_map(widen, value) for name, value in given.items()}


def _export(model: nn.Module, given: dict[str, Any], names: DimNames, parameters: tuple[Parameter, ...]) -> ExportedProgram:
    flat_names = iter([flat for _, flat, _ in _leaves(given)])

    def spec(leaf: Any) -> Any:
        flat = next(flat_names)
        return dict.fromkeys(names[flat], ExportDim.AUTO) if isinstance(leaf, Tensor) else None

    shapes = {name: pytree.tree_map(spec, value) for name, value in given.items()}
    positional_only = tuple(given[p.name] for p in parameters if p.kind == "POSITIONAL_ONLY" and p.name in given)
    keyword = {k: v for k, v in given.items() if not any(p.name == k and p.kind == "POSITIONAL_ONLY" for p in parameters)}
    unnamed = [name for name in given if all(p.name != name for p in parameters)]
    try:
        with quiet(), torch.no_grad(), hooks_in_place(), named_in_signature(model, unnamed):
            exported = torch.export.export(model, positional_only, keyword, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({})
    except RewrightError:
        raise  # an ONNX file's module says in a sentence what it can't do
    except Exception as error:
        raise CaptureError(_why_not(model, error)) from error


def _why_not(model: nn.Module, error: Exception) -> str:
    """One sentence: what torch.export refused, the user's own line, and the usual cure."""
    own = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "/ir/capture.py" not in f.filename and not f.filename.startswith("<")
    ]
    text, kind = str(error), type(error).__name__
    where = f" at {own[-1].filename}:{own[-1].lineno} `{own[-1].line}`" if own else ""
    if "data-dependent" in text or "GuardOnDataDependent" in kind:
        hint = "its control flow depends on tensor values; use torch.where or torch.cond, or bind the value before capture"
    elif "pytree" in text or "Unsupported input type" in text or "output" in text and "type" in text:
        hint = "an input or output is of a class torch.export does not know; for a cache use use_cache=False, else register it with torch.utils._pytree"
    elif "is_causal" in text or "scaled_dot_product" in text:
        hint = "load the model with attn_implementation='eager'"
    else:
        hint = "`torch.export.export(model, ..., strict=False)` shows torch's own account"
    return f"{type(model).__name__} can't be captured{where}: {kind}: {_first_line(error)}. Hint: {hint}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _from_exported(exported: ExportedProgram) -> Graph:
    """An ExportedProgram made elsewhere: parameters are the names it was exported with."""
    with quiet():
        exported = exported.run_decompositions({})
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    positional, keyword = in_spec.children()[0].num_children, list(in_spec.children()[1].context or [])
    user = list(exported.graph_signature.user_inputs)
    if len(user) != positional + len(keyword):
        raise CaptureError(f"the exported program nests its inputs ({in_spec}); capture the nn.Module instead, or export it with flat tensors")
    names = [str(n) for n in user[:positional]] + keyword
    parameters = tuple(Parameter(n, "POSITIONAL_OR_KEYWORD", None, True) for n in names)
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in set(map(str, user))]
    given: dict[str, Any] = {}
    dims: DimNames = {}
    env: dict[str, str] = {}
    for name, node in zip(names, placeholders):
        value = node.meta.get("val")
        given[name] = value
        if isinstance(value, Tensor):
            dims[name] = {}
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    usual = ("batch", "sequence")[axis] if axis < 2 else ""
                    dims[name][axis] = env.setdefault(str(size), usual if usual and usual not in env.values() else f"dim_{len(env)}")
    return _to_graph(exported, parameters, given, dims)


def _to_graph(exported: ExportedProgram, parameters: tuple[Parameter, ...], given: dict[str, Any], names: DimNames) -> Graph:
    with quiet():
        root = exported.module(check_guards=False)
        module = graph_module(root, root.graph)  # type: ignore[arg-type]
    for node in module.graph.nodes:
        path = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())[-1][0]
        path = "" if path.startswith("_empty_nn_module_stack") else path
        path = (node.meta.get("custom") or {}).get(LAYER, path)
        node.meta = {"val": node.meta.get("val"), "path": path if node.op == "call_function" else str(node.target).rpartition(".")[0]}
    _forget_trace(module.graph)
    adopt_foreign_ops(module.graph)
    leaves = _leaves(given)
    for placeholder, (_, _, leaf) in zip(list(module.graph.find_nodes(op="placeholder")), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            module.graph.erase_node(placeholder)  # a bound constant, read by nobody
    flat = tuple(name for _, name, leaf in leaves if isinstance(leaf, Tensor))
    captured = tuple(
        Captured(name, spec, tuple(None if isinstance(x, Tensor) else x for x in xs), tuple(isinstance(x, Tensor) for x in xs))
        for name, value in given.items()
        for xs, spec in [pytree.tree_flatten(value)]
    )
    for c in captured:
        if bad := [x for x, t in zip(c.constants, c.is_tensor) if not t and not isinstance(x, SIMPLE)]:
            raise CaptureError(f"argument {c.name!r} holds a {type(bad[0]).__name__}; only tensors and plain Python values can be captured")
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    call = Call(parameters, captured, out_spec, flat)
    module.graph._codegen = CallCodeGen(call)
    graph = Graph(module, call, {})
    _name_inputs(graph)
    _propagate_with_our_dims(graph, names)
    _without_copies(graph)
    graph.clean()
    return graph


def _forget_trace(graph: fx.Graph) -> None:
    """Drop the metadata asserts, and let what was traced on meta be made on the CPU: weights come to it later."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function":
            node.args = tuple(cpu if a == meta else a for a in node.args)
            node.kwargs = {k: cpu if v == meta else v for k, v in node.kwargs.items()}


def _without_copies(graph: Graph) -> None:
    """copy(x, y), what is left of an in-place `x.copy_(y)`, is y in x's shape and dtype; torch has no gradient for it."""
    for node in graph.find(aten.copy.default):
        x, y = node.args[:2]
        have, want = y.meta["val"], x.meta["val"]  # type: ignore[union-attr]
        value: Any = y if have.dtype == want.dtype else graph.insert(aten._to_copy.default, y, before=node, dtype=want.dtype)
        if have.dim() != want.dim() or any(a != b for a, b in zip(have.shape, want.shape)):
            sizes = [s if isinstance(s, int) else graph.insert(aten.sym_size.int, x, axis, before=node) for axis, s in enumerate(want.shape)]
            value = graph.insert(aten.expand.default, value, sizes, before=node)
        node.replace_all_uses_with(value)


def _name_inputs(graph: Graph) -> None:
    for node, name in zip(graph.inputs, graph.call.names, strict=True):
        node._rename(name)
        node.target = name


def _propagate_with_our_dims(graph: Graph, names: DimNames) -> None:
    """Fresh fake values in which dims of one name are one symbol; dims torch.export made static stay static, with a note."""
    first: dict[Any, str] = {}  # size -> its first name: the trace may have found that two names are one size
    for node in graph.inputs:
        old = node.meta["val"]
        shape = list(old.shape)
        for axis, name in names.get(str(node.target), {}).items():
            size = shape[axis]
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:  # a symbol that the trace found to have one value only
                shape[axis] = int(size)
                graph.notes.append(f"{node.target} axis {axis} ({name}) is static: the model fixes it to {size}")
                continue
            env, expression = size.node.shape_env, size.node.expr
            if (same := first.setdefault(expression, name)) != name:
                graph.notes.append(f"{node.target} axis {axis} ({name}) is as long as {same}: the model needs them equal")
                name = same
            bounds = env.var_to_range.get(expression) if env is not None else None
            high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer and int(bounds.upper) < 2**31 else None
            if name not in graph.dims:
                graph.add_dim(Dim(name, size.node.hint, 1, high))
            elif high is not None:
                known = graph.dims[name]
                graph.dims[name] = replace(known, high=high if known.high is None else min(known.high, high))
            shape[axis] = graph.symbols[name]
        with graph.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=old.dtype, device="cpu" if old.device.type == "meta" else old.device)
    graph.propagate()
    graph.output.meta["val"] = None
