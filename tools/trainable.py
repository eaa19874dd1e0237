"""Which weights of a graph are trained, on a copy of them: graphs share their weights, and training writes into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.blocks import attention_blocks
from ..ir.errors import UsageError, near
from ..ir.graph import Graph, owner_of


def with_own_weights(graph: Graph) -> Graph:
    """A clone whose parameters are copies; tied ones stay one. Buffers stay shared: nothing writes into them."""
    twin = graph.clone()
    copies: dict[Any, nn.Parameter] = {}
    for name, old in twin.weights().items():
        if isinstance(old, nn.Parameter):
            owner, leaf = owner_of(twin.module, name)
            owner._parameters[leaf] = copies.setdefault(_memory(old), nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
            twin.recipes.pop(name, None)  # once trained it is no longer what its recipe makes
    return twin


def choose(graph: Graph, original: Graph, trainable: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters to train, by name, a tied one once; gradients of all others are switched off.

    trainable: one or several of "all", "rewritten" (those the original lacks or holds otherwise), "attention" (of the linears that
    make q, k and v and read the output of the original's attentions), and paths of weights or modules.
    Raises UsageError when one of them chooses nothing, a path names nothing, or a weight is of less than 32 bits.
    """
    candidates = {name: p for name, p in graph.weights().items() if isinstance(p, nn.Parameter) and p.is_floating_point() and p.dtype.itemsize > 1}
    if graph.on_meta:
        raise UsageError("the graph has no weights to train: it was captured without data; Graph.materialize fills it")
    if not candidates:
        raise UsageError("nothing to train: the graph has no float weights (codes of a quantized one are not trained; finetune before quantizing)")
    names: list[str] = []
    for one in [trainable] if isinstance(trainable, str) else trainable:
        names += _CHOICES[one](candidates, original) if one in _CHOICES else _below(graph, candidates, one)
    for p in candidates.values():
        p.requires_grad_(False)
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for name in dict.fromkeys(names):
        p = candidates[name]
        if p.dtype.itemsize < 4:
            raise UsageError(f"{name} is {p.dtype}, in which small steps are lost; finetune the model in float32 and cast it afterwards")
        p.requires_grad_(True)
        chosen.setdefault(id(p), (name, p))
    return dict(chosen.values())


def _all(candidates: dict[str, nn.Parameter], original: Graph) -> list[str]:
    return list(candidates)


def _rewritten(candidates: dict[str, nn.Parameter], original: Graph) -> list[str]:
    theirs = original.weights()
    found = [n for n, p in candidates.items() if n not in theirs or theirs[n].shape != p.shape or not torch.equal(theirs[n].to(p.dtype), p)]
    if not found:
        raise UsageError("nothing to train: every float weight is the original's, no rewrite made one; trainable='all' trains them")
    return found


def _attention(candidates: dict[str, nn.Parameter], original: Graph) -> list[str]:
    linears = {x for b in attention_blocks(original) for x in (*b.to_q.linears, *b.to_k.linears, *b.to_v.linears, b.out)}
    names = {str(w.target) for x in linears if x is not None for w in x.all_input_nodes if original.is_weight(w)}
    found = [n for n in candidates if n in names]
    if not found:
        raise UsageError("nothing to train: the graph has none of the weights of its original's attentions")
    return found


_CHOICES = {"all": _all, "rewritten": _rewritten, "attention": _attention}


def _below(graph: Graph, candidates: dict[str, nn.Parameter], path: str) -> list[str]:
    """Weights whose name, or the module of a call that reads them, is a path or lies below it."""
    places = {n: [n, *(_path(user) for w in graph.fx.find_nodes(op="get_attr", target=n) for user in w.users)] for n in candidates}
    hits = [n for n, where in places.items() if any(x == path or x.startswith(f"{path}.") for x in where)]
    if not hits:
        known = {".".join(parts[:i]) for where in places.values() for x in where for parts in [x.split(".")] for i in range(1, len(parts) + 1)}
        raise UsageError(f"nothing to train at {path!r}: no float weight and no module with one has that path.{near(path, sorted(known))}")
    return hits


def _path(node: fx.Node) -> str:
    return node.meta.get("path", "")


def _memory(tensor: Tensor) -> Any:
    """What tied weights have in common, also where they are two objects over one memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
