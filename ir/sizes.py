"""Dynamic dims made numbers: a program for inputs of given sizes only, and inputs brought to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .errors import UsageError, near
from .graph import Flat, Graph
from .verify import is_mask


def fixed(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The program in which the dims of these names have these sizes. The graph itself stays as it is.

    Raises UsageError for a dim the graph has not, or a size that it does not take.
    """
    for name, size in sizes.items():
        if name not in graph.dims:
            has = ", ".join(graph.dims) or "none"
            raise UsageError(f"there is no dynamic dim {name!r} to fix at {size};{near(name, list(graph.dims))} the model has {has}")
        dim = graph.dims[name]
        if not dim.low <= size <= (dim.high or size):
            raise UsageError(f"{name} can't be fixed at {size}: the model takes {dim.low} to {dim.high or 'any'}")
    twin = graph.clone()
    twin.fake_mode, twin.known = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), {}
    twin.dims, twin.symbols, twin.canonical = {}, {}, False
    new = {symbol.node.expr: sizes[name] if name in sizes else twin.add_dim(graph.dims[name]) for name, symbol in graph.symbols.items()}
    for node in twin.inputs:
        old = node.meta["val"]
        shape = [new[s.node.expr] if isinstance(s, torch.SymInt) else s for s in old.shape]
        with twin.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=old.dtype)
    try:
        twin.propagate()
    except Exception as error:  # whatever an op says of sizes it does not take
        raise UsageError(f"the model does not take {_listed(sizes)}: {str(error).splitlines()[0][:200]}") from error
    _fold_numbers(twin)
    twin.clean()
    if may_pad(twin):
        twin.notes.append(f"fixed: {_listed(sizes)}; the mask hides what shorter inputs are filled up with")
    else:
        twin.notes.append(f"fixed: {_listed(sizes)}")
    return twin


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())


def _fold_numbers(graph: Graph) -> None:
    """Sizes that are numbers now are literals in the calls that read them."""
    for node in graph.nodes:
        value = node.meta["val"]
        if isinstance(value, int) and not isinstance(value, bool):
            literal = {node: value}
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n, literal=literal: literal.get(n, n))  # type: ignore[misc]


def may_pad(graph: Graph) -> bool:
    """Whether inputs may be filled up with tokens that nobody looks at: it has a mask, and token ids or floats of a fixed length."""
    return token_count(graph) is not None and any(map(is_mask, graph.inputs))


def token_count(graph: Graph, sizes: Mapping[str, int] | None = None) -> int | None:
    """The fixed length of the program's texts, axis 1 of its matrices of integers, once these dims are; None where it is dynamic, or there are none."""
    to_be = {symbol.node.expr: (sizes or {}).get(name) for name, symbol in graph.symbols.items()}
    lengths = [n.meta["val"].shape[1] for n in graph.inputs if n.meta["val"].dim() == 2 and not n.meta["val"].is_floating_point()]
    found = {to_be.get(s.node.expr) if isinstance(s, torch.SymInt) else s for s in lengths}
    return found.pop() if len(found) == 1 else None


def filled(graph: Graph, flat: Flat) -> Flat:
    """Inputs as the program takes them: texts shorter than its fixed length are filled up with zeros, of the mask too.

    Raises UsageError for inputs of another size that can't be.
    """
    count = token_count(graph) if may_pad(graph) else None
    made = []
    for node, tensor in zip(graph.inputs, flat, strict=True):
        value = node.meta["val"]
        if count is not None and _counts_tokens(value, count) and tensor.dim() == value.dim() and tensor.shape[1] < count:
            tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, count - tensor.shape[1]])
        if tensor.dim() != value.dim() or any(isinstance(want, int) and have != want for have, want in zip(tensor.shape, value.shape)):
            want = [s if isinstance(s, int) else "any" for s in value.shape]
            raise UsageError(f"the input {node.target} is of shape {list(tensor.shape)}, and the model takes {want}")
        made.append(tensor)
    return tuple(made)


def _counts_tokens(value: Tensor, count: int) -> bool:
    return value.dim() >= 2 and value.shape[1] == count


def in_batches(graph: Graph, batches: Iterable[Flat]) -> Iterator[Flat]:
    """Inputs with as many rows as a fixed batch has, and filled up; a rest of fewer rows is left out."""
    rows = [n.meta["val"].shape[0] for n in graph.inputs if n.meta["val"].dim()]
    batch = rows[0] if all(isinstance(n, int) for n in rows) and len(set(rows)) == 1 else None
    for flat in batches:
        if batch is None or flat[0].shape[0] == batch:
            yield filled(graph, flat)
        else:
            for first in range(0, flat[0].shape[0] - batch + 1, batch):
                yield filled(graph, tuple(t[first : first + batch] for t in flat))
