"""Which axis of every value counts tokens: the numbers of the tokens pushed through the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..evaluate import Evaluator, is_size, op_name
from ..graph import Graph
from ..nodes import argument, arguments, is_looked_through
from .vocabulary import CHANNEL_NORMS, CONVOLUTIONS, FUSED_NORMS, LAST_AXIS_NORMS, LINEARS, MOVES, is_grouped_product, is_pointwise, path_of

aten = torch.ops.aten
ours = torch.ops.rewright

_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample", "interpolate")
_KEEP = ("softmax", "_softmax", "log_softmax", "cumsum", "flip", "normalize")
_CHOOSE = ("topk", "sort", "gather")
_REDUCE = ("mean", "sum", "amax", "amin", "any", "all", "prod", "var", "std", "argmax", "argmin")


@dataclass(frozen=True)
class TokenAxis:
    """The axis along which a value holds one entry a token; None where there is none, and then `why` says what became of the tokens."""

    axis: int | None
    why: str = ""

    def __str__(self) -> str:
        return f"axis {self.axis}" if self.axis is not None else self.why or "no tokens"


def token_axis(graph: Graph) -> dict[fx.Node, TokenAxis]:
    """The token axis of every value, followed from the inputs (token ids [B, S], embeddings [B, S, d], images, spectrograms) by layout ops.

    Every node that has tokens gets an axis, or None with the reason: merged with the batch, spread over two axes (an image's grid,
    windows), mixed by a linear over them, reduced, reordered by values. Nodes that never had tokens (weights, positions, sizes) are
    there with None and no reason. After a slice, a concatenation or a strided convolution the axis counts the new tokens.
    """
    tracer = _Tracer(graph)
    found = {}
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        tracer.visit(node)
        found[node] = tracer.axis(node)
    return found


class _Tracer:
    """codes: the number of the token at each place of a value (-1: none), of full shape but without copies; lost: why there are none."""

    def __init__(self, graph: Graph) -> None:
        self.at = Evaluator(graph, {name: dim.example for name, dim in graph.dims.items()}, {})
        self.codes: dict[fx.Node, Any] = {}
        self.lost: dict[fx.Node, str] = {}

    def axis(self, node: fx.Node) -> TokenAxis:
        codes = self.codes.get(node)
        if not isinstance(codes, Tensor):
            return TokenAxis(None, self.lost.get(node, ""))
        axes = _varying(codes)
        if len(axes) > 1:
            what = "an image's rows and columns" if len(axes) == 2 and axes[1] == axes[0] + 1 and _is_grid(codes, axes) else "windows"
            return TokenAxis(None, f"the tokens are spread over axes {' and '.join(map(str, axes))} ({what})")
        if not axes:
            return TokenAxis(None, "one token is left")
        line = codes.movedim(axes[0], 0).reshape(codes.shape[axes[0]], -1)[:, 0]
        line = line[line >= 0]
        if line.unique().numel() < line.numel():
            return TokenAxis(None, f"axis {axes[0]} counts the tokens of the whole batch")
        return TokenAxis(axes[0])

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            return self._seed(node)
        if node.op != "call_function" or is_size(node) or op_name(node).startswith("new_") or op_name(node).endswith("_like"):
            return None
        coded = [n for n in node.all_input_nodes if n in self.codes]
        if not coded:
            why = next((self.lost[n] for n in node.all_input_nodes if n in self.lost), None)
            if why is not None:
                self.lost[node] = why
            return None
        try:
            found = self._rule(node, coded)
        except (RuntimeError, IndexError) as error:
            found = f"{path_of(node)}: {op_name(node)} can't be followed ({str(error).splitlines()[0]})"
        if isinstance(found, str):
            self.lost[node] = found
        elif found is not None:
            self.codes[node] = found
        return None

    def _seed(self, node: fx.Node) -> None:
        value, shape = node.meta["val"], self.at.shape(node)
        if value.dim() == 2 and not value.is_floating_point():
            self.codes[node] = torch.arange(shape[1]).expand(shape)
        elif value.dim() == 2:
            if any(u.target in CONVOLUTIONS for n in node.users for u in n.users):  # a waveform; else a vector without tokens
                self.codes[node] = _count(shape, [1])
        elif value.dim() == 3:
            axis = 2 if any(u.target in CONVOLUTIONS for u in node.users) else 1
            self.codes[node] = _count(shape, [axis])
        elif value.dim() > 3:
            self.codes[node] = _count(shape, list(range(2, value.dim())))

    def _rule(self, node: fx.Node, coded: list[fx.Node]) -> Any:
        """The codes of a result, or why it has none."""
        target: Any = node.target
        codes = self.codes[coded[0]]
        if target is operator.getitem:
            index: Any = node.args[1]
            return codes[index] if isinstance(codes, list) else codes
        if target in FUSED_NORMS:
            found = self._pointwise(node, coded, [self.at.size(s) for s in node.meta["val"][0].shape])
            return found if isinstance(found, str) else [found, found]
        value = node.meta["val"]
        if is_looked_through(node) and isinstance(value, Tensor):
            return codes.expand(self.at.shape(node))
        if target in MOVES:
            return self._moved(node)
        if op_name(node) in _CHOOSE:
            return self._chosen(node, codes)
        if not isinstance(value, Tensor):
            return None
        shape = self.at.shape(node)
        if target in LAST_AXIS_NORMS or target in CHANNEL_NORMS or target is ours.rope.default:
            return self.codes[node.args[0]].expand(shape) if node.args[0] in self.codes else None
        if target in (ours.attention.default, ours.multi_head_attention.default, aten.scaled_dot_product_attention.default):
            q: Any = node.args[0]
            return self.codes[q][..., :1].expand(shape) if q in self.codes else self.lost.get(q)
        if target in LINEARS or is_grouped_product(node) or target is aten.embedding.default:
            return self._projected(node, shape)
        if target in CONVOLUTIONS:
            return self._convolved(node, codes, shape)
        if target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
            return self._product(node, shape)
        if op_name(node) in _REDUCE:
            return self._reduced(node, codes, shape)
        if any(op_name(node).startswith(p) for p in _POOLS):
            return _count(shape, [a for a in _varying(codes) if a < len(shape)])
        if is_pointwise(node):
            return self._pointwise(node, coded, shape)
        if op_name(node) in _KEEP and list(codes.shape) == shape:
            return codes
        if list(codes.shape) == shape:
            return codes
        return f"{op_name(node)} of {path_of(node)} is not followed"

    def _chosen(self, node: fx.Node, codes: Tensor) -> Any:
        """topk, sort and gather along another axis than the tokens' keep it (an expert's scores); along it they reorder by values."""
        axis = argument(node, "dim") % codes.dim()
        if axis in _varying(codes):
            return f"{op_name(node)} of {path_of(node)} orders the tokens by values"
        values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else (node.meta["val"],)
        made = [codes.narrow(axis, 0, 1).expand([self.at.size(s) for s in v.shape]) for v in values]
        return made if isinstance(node.meta["val"], tuple | list) else made[0]

    def _moved(self, node: fx.Node) -> Any:
        def operand(n: fx.Node) -> Any:
            if n in self.codes:
                return self.codes[n]
            if is_size(n):
                return self.at.size(n.meta["val"])
            value = n.meta["val"]
            if n.op == "get_attr" and not value.is_floating_point():
                return self.at.run(n)
            return torch.full([1] * value.dim(), -1).expand(self.at.shape(n))

        picks = node.target in (aten.index.Tensor, aten.index_select.default)
        if picks and (node.args[0] not in self.codes or any(n.op != "get_attr" for n in node.all_input_nodes if n is not node.args[0])):
            return f"{op_name(node)} of {path_of(node)} picks tokens by values"
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)  # type: ignore[misc]
        if node.target in (aten.pad.default, aten.constant_pad_nd.default):
            args, kwargs = (*args[:2], *(("constant",) if node.target is aten.pad.default else ()), -1), {}  # type: ignore[index]
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(made, tuple | list):
            return [_renumbered(m) for m in made]
        if node.target in (aten.cat.default, aten.stack.default, aten.slice_scatter.default) and bool((made < 0).any()):
            made = _filled(made)
        if node.target is aten.cat.default and (axis := argument(node, "dim") % made.dim()) in _varying(made):
            return _count(list(made.shape), _varying(made)) if _varying(made) == [axis] else _renumbered(made)  # two equal sequences are one twice as long
        return _renumbered(made)

    def _projected(self, node: fx.Node, shape: list[int]) -> Any:
        source: Any = node.args[1] if node.target is aten.embedding.default else node.args[0]
        if source not in self.codes:
            return self.lost.get(source)
        codes = self.codes[source]
        if node.target is aten.embedding.default:
            return codes.unsqueeze(-1).expand(shape)
        if codes.dim() - 1 in _varying(codes):
            return f"{path_of(node)} mixes the tokens by a linear over them"
        return codes[..., :1].expand(shape)

    def _convolved(self, node: fx.Node, codes: Tensor, shape: list[int]) -> Any:
        axes = [a for a in _varying(codes) if a >= 2]
        if node.args[0] not in self.codes:
            return None
        if not axes:
            return f"{path_of(node)} runs over channels that are tokens" if _varying(codes) else codes.new_full([1] * len(shape), -1).expand(shape)
        return _count(shape, axes)

    def _product(self, node: fx.Node, shape: list[int]) -> Any:
        a, b = (self.codes.get(n) for n in node.args[-2:])  # type: ignore[misc]
        if b is not None and b.dim() - 1 in _varying(b):
            return f"{path_of(node)} pairs tokens with tokens"
        if a is not None:
            rows = a[..., :1]
            return f"{path_of(node)} mixes the tokens by a product over them" if not _varying(rows) and _varying(a) else rows.expand(shape)
        return f"{path_of(node)} mixes the tokens by a product over them" if b is not None else None

    def _reduced(self, node: fx.Node, codes: Tensor, shape: list[int]) -> Any:
        dims = arguments(node).get("dim")
        axes = [d % codes.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])] if dims is not None else list(range(codes.dim()))
        if any(a in _varying(codes) for a in axes):
            return f"{path_of(node)}: {op_name(node)} over the tokens"
        for a in sorted(axes, reverse=True):
            codes = codes.narrow(a, 0, 1) if len(shape) == codes.dim() else codes.select(a, 0)
        return codes.expand(shape)

    def _pointwise(self, node: fx.Node, coded: list[fx.Node], shape: list[int]) -> Any:
        values = [self.codes[n].expand(shape) for n in coded if isinstance(self.codes[n], Tensor)]
        first = max(values, key=lambda v: len(_varying(v)), default=None)
        if first is None:
            return None
        for other in values:
            if _varying(other) and not _agree(first, other):
                return f"{path_of(node)} pairs tokens with tokens"
        return first


def _count(shape: list[int], axes: list[int]) -> Tensor:
    """0, 1, 2, ... over some axes of a shape, row by row; no copies along the others."""
    sizes = [shape[a] if a in axes else 1 for a in range(len(shape))]
    total = 1
    for s in sizes:
        total *= s
    return torch.arange(total).view(sizes).expand(shape)


def _renumbered(codes: Tensor) -> Tensor:
    """Fresh numbers where some tokens went or came; the same ones where they only moved."""
    axes = _varying(codes)
    if not axes:
        return codes
    compact = codes
    for a in range(codes.dim()):
        if a not in axes:
            compact = compact.narrow(a, 0, 1)
    flat = compact.flatten()
    numbers = flat.unique()
    whole = int(numbers[0]) == 0 and int(numbers[-1]) == numbers.numel() - 1 and flat.numel() % numbers.numel() == 0
    return codes if whole else _count(list(codes.shape), axes)


def _filled(codes: Tensor) -> Tensor:
    """Places without a token between such with one: the tokens of a row count for all of it (a concatenation of channels)."""
    for a in range(codes.dim()):
        best = codes.amax(a, keepdim=True)
        if bool(((codes == best) | (codes < 0)).all()) and bool((best >= 0).all()):
            return best.expand(codes.shape)
    return codes


def _varying(codes: Tensor) -> list[int]:
    """The axes along which the token changes."""
    compact = codes
    for a in range(codes.dim()):
        if compact.stride(a) == 0:
            compact = compact.narrow(a, 0, 1)
    return [a for a in range(codes.dim()) if compact.shape[a] > 1 and not bool((compact == compact.narrow(a, 0, 1)).all())]


def _agree(a: Tensor, b: Tensor) -> bool:
    for d in range(a.dim()):
        if a.stride(d) == 0 and b.stride(d) == 0:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return bool(((a == b) | (a < 0) | (b < 0)).all())


def _is_grid(codes: Tensor, axes: list[int]) -> bool:
    return _agree(codes, _count(list(codes.shape), axes))
