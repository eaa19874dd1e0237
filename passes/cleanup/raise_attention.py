"""SDPA with a mask tensor, or matmul-softmax-matmul -> attention(q, k, v, key_mask, causal, window, scale, softcap, bias)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.evaluate import Evaluator
from ...ir.graph import Graph
from ...ir.masks import Mask, Unproven, name_mask
from ...ir.nodes import argument, is_looked_through, number, same_shape
from ..rewrite import Builder, Context, GraphPass

aten = torch.ops.aten

_GROUPED = (
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.slice.Tensor,
)


class RaiseAttention(GraphPass):
    """One attention node whose mask is facts: causal, window, and one key mask shared by all layers.

    1. scaled_dot_product_attention with no mask, is_causal, a bool mask or a float mask
    2. eager: matmul(q, k^T), scaled, soft-capped (Gemma 2), masked by add, where or masked_fill, softmax, cast, matmul
    3. the same over merged heads, [B * H, Q, D], with bmm or baddbmm (BLOOM, nn.MultiheadAttention): unmerged
    A mask gets its name by running the nodes that make it (ir/masks). A float term without a name becomes `bias` (T5, ALiBi).
    repeat_kv before either form is absorbed where it is consecutive repetition; a scale on q or k is absorbed too.
    Rows of a query that sees no key may differ from the original's: nothing valid depends on them.
    Declines weights that are read elsewhere, dropout, ranks other than 4, and bool masks without a name.
    """

    name = "raise-attention"

    def run(self, graph: Graph, context: Context) -> Graph:
        masks = _Masks(graph)
        for node in graph.find(aten.scaled_dot_product_attention.default):
            _finish(graph, _from_sdpa(graph, node), masks, context)
        for node in graph.find(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
            if (site := _from_softmax(graph, node)) is not None:
                _finish(graph, site, masks, context)
        return graph


@dataclass
class _Site:
    """One attention before it is raised; `why` is set when it must stay."""

    node: fx.Node
    """What the attention node replaces."""
    q: Any = None
    k: Any = None
    v: Any = None
    transposed: bool = False
    """k comes as [B, H, D, K]."""
    scale: float | None = None
    softcap: float | None = None
    causal: bool = False
    terms: list[tuple[fx.Node, bool]] = field(default_factory=list)
    """Masks: (node, whether True hides)."""
    merged: tuple[Any, Any] | None = None
    """Batch and heads, where q, k and v have them as one axis."""
    why: str | None = None


class _Masks:
    """Each mask is named once, however many layers read it; each key mask is one node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._named: dict[Any, Mask | Unproven] = {}
        self._keys: dict[fx.Node, fx.Node] = {}

    def name(self, mask: fx.Node, hides: bool, scores: tuple[Any, Any, Any]) -> Mask | Unproven:
        key = mask, hides, tuple(str(s) for s in scores)
        if key not in self._named:
            self._named[key] = name_mask(self.graph, mask, scores, hides)
        return self._named[key]

    def key(self, source: fx.Node) -> fx.Node:
        """The bool node for a key mask: the source itself, or input != 0, made before everything that computes."""
        if source.meta["val"].dtype == torch.bool:
            return source
        if source not in self._keys:
            self._keys[source] = self.graph.insert(aten.ne.Scalar, source, 0, before=self.graph.nodes[0])
            self._keys[source].meta["path"] = ""
        return self._keys[source]


# -- finding it -----------------------------------------------------------------------------------------------------


def _from_sdpa(graph: Graph, node: fx.Node) -> _Site:  # 1
    q, k, v = node.args[:3]
    site = _Site(node, q, k, v, scale=argument(node, "scale"), causal=argument(node, "is_causal"))
    mask = argument(node, "attn_mask")
    if mask is not None:
        site.terms.append((mask, False))
    if argument(node, "dropout_p") != 0:
        site.why = f"it drops out {argument(node, 'dropout_p')} of its weights"
    elif site.causal and (mask is not None or not same_shape(q.meta["val"].shape[-2:-1], k.meta["val"].shape[-2:-1])):  # type: ignore[union-attr]
        site.why = "is_causal counts from the first key and the numbers of queries and keys may differ"
    return site


def _from_softmax(graph: Graph, softmax: fx.Node) -> _Site | None:  # 2
    """None when the softmax is no attention: nothing that looks like two products around it."""
    last = softmax
    while len(last.users) == 1 and (user := next(iter(last.users))) and (is_looked_through(user) or _merges_heads(user)):
        last = user
    product = next((u for u in last.users if u.target in _PRODUCTS and u.args[0] is last), None)
    if product is None:
        return None
    site = _Site(product, v=product.args[1])
    scores = _peel(graph, softmax.args[0], site)
    if scores is None or scores.target not in _PRODUCTS:
        site.why = f"its scores come from {scores.name if scores else 'a constant'}, not from matmul(q, k^T) scaled, capped and masked"
        return site
    site.q, site.k = scores.args[-2:]
    if scores.target is aten.baddbmm.default:  # 3
        if argument(scores, "beta") != 1 or site.scale is not None or site.softcap is not None:
            site.why = f"{scores.name} scales the term it adds"
            return site
        site.terms.append((scores.args[0], False))  # type: ignore[arg-type]
        site.scale = argument(scores, "alpha")
    site.transposed, site.scale = True, 1.0 if site.scale is None else site.scale
    rank = softmax.meta["val"].dim()
    between = [n for n in _between(scores, softmax) if len(n.users) > 1]
    if argument(softmax, "dim") % rank != rank - 1:
        site.why = f"its softmax runs over axis {argument(softmax, 'dim')}"
    elif len(last.users) > 1:
        site.why = f"its weights {last.name} are also read by {next(u.name for u in last.users if u is not product)}"
    elif between:
        site.why = f"its scores {between[0].name} are read more than once"
    return site


_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_WHERE_SEEN = (aten.where.self, aten.where.ScalarOther)


def _between(scores: fx.Node, softmax: fx.Node) -> list[fx.Node]:
    """The nodes on the way from the scores to the softmax."""
    found, node = [], scores
    while node is not softmax and node.users:
        found.append(node)
        node = next(iter(node.users))
    return found


def _peel(graph: Graph, value: Any, site: _Site) -> fx.Node | None:
    """Walk from the softmax up to matmul(q, k^T), or to what is in the way; fills the site's masks, softcap and scale."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target not in _PRODUCTS:
        open_to_masks = site.scale is None and site.softcap is None  # a mask that is scaled or capped itself is none
        if is_looked_through(value):
            value = value.args[0]
        elif open_to_masks and (scores := _before_windows(graph, value, site)) is not None:
            value = scores
        elif _splits_heads(value) and site.merged is None:
            site.merged, value = (value.args[1][0], value.args[1][1]), value.args[0]  # type: ignore[index]
        elif _merges_heads(value) and site.merged is not None:
            value = value.args[0]
        elif value.target is aten.add.Tensor and argument(value, "alpha") == 1 and open_to_masks:
            a, b = value.args[:2]
            scores, term = (a, b) if _leads_to_product(a) else (b, a)
            if not isinstance(term, fx.Node):
                return value
            site.terms.append((term, False))
            value = scores
        elif value.target in _WHERE_SEEN and open_to_masks and _hides(graph, value.args[2]):
            site.terms.append((value.args[0], False))  # type: ignore[arg-type]
            value = value.args[1]
        elif value.target in (aten.where.self, aten.where.ScalarSelf) and open_to_masks and _hides(graph, value.args[1]):
            site.terms.append((value.args[0], True))  # type: ignore[arg-type]
            value = value.args[2]
        elif value.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and open_to_masks and _hides(graph, value.args[2]):
            site.terms.append((value.args[1], True))  # type: ignore[arg-type]
            value = value.args[0]
        elif (factor := _factor(graph, value)) is not None:
            source, c = factor
            if isinstance(source, fx.Node) and source.target is aten.tanh.default and open_to_masks:
                inner = _factor(graph, source.args[0])
                if inner is None or abs(inner[1] * c - 1) > 1e-6:
                    return value
                site.softcap, value = c, inner[0]
            else:
                site.scale, value = c * (1.0 if site.scale is None else site.scale), source
        else:
            return value
    return value if isinstance(value, fx.Node) else None


def _before_windows(graph: Graph, value: fx.Node, site: _Site) -> fx.Node | None:
    """The scores [B * W, H, Q, K] that were split into [B, W, ...] for a mask of each window [1, W, 1, Q, K] and joined again (timm's Swin)."""
    masked: Any = value.args[0]
    if value.target is not aten.reshape.default or _ranks(value) != (5, 4) or masked.target is not aten.add.Tensor or argument(masked, "alpha") != 1:
        return None
    a, b = masked.args[:2]
    split, term = (a, b) if isinstance(a, fx.Node) and a.target is aten.reshape.default else (b, a)
    if not isinstance(split, fx.Node) or not isinstance(term, fx.Node) or split.target is not aten.reshape.default or _ranks(split) != (4, 5):
        return None
    scores: Any = split.args[0]
    shape = term.meta["val"].shape
    if not same_shape(scores.meta["val"].shape, value.meta["val"].shape) or len(shape) != 5 or shape[0] != 1 or not isinstance(shape[1], int):
        return None
    rows = graph.insert(aten.sym_size.int, site.v, 0, before=site.node)  # not of the scores: a second reader would keep them
    batch = graph.insert(operator.floordiv, rows, shape[1], before=site.node)
    windows = graph.insert(aten.reshape.default, term, [int(s) for s in shape[1:]], before=site.node, like=term)
    site.terms.append((graph.insert(aten.repeat.default, windows, [batch, 1, 1, 1], before=site.node, like=term), False))
    return scores


def _splits_heads(node: fx.Node) -> bool:
    """[B * H, Q, K] -> [B, H, Q, K], written with sizes for B and H."""
    return node.target is aten.reshape.default and _ranks(node) == (3, 4) and _same_ends(node) and -1 not in node.args[1][:2]  # type: ignore[index, operator]


def _merges_heads(node: fx.Node) -> bool:
    """[B, H, Q, K] -> [B * H, Q, K]."""
    return node.target is aten.reshape.default and _ranks(node) == (4, 3) and _same_ends(node)


def _ranks(node: fx.Node) -> tuple[int, int]:
    return node.args[0].meta["val"].dim(), node.meta["val"].dim()  # type: ignore[union-attr]


def _same_ends(node: fx.Node) -> bool:
    return same_shape(node.args[0].meta["val"].shape[-2:], node.meta["val"].shape[-2:])  # type: ignore[union-attr]


def _leads_to_product(value: Any) -> bool:
    """Whether scores (a product, perhaps scaled, capped or masked) make this value."""
    for _ in range(16):
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return False
        if value.target in _PRODUCTS:
            return True
        if value.target in (aten.add.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return any(_leads_to_product(a) for a in value.args if isinstance(a, fx.Node) and a.meta["val"].dtype != torch.bool)
        if value.target not in (aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.reshape.default) and not is_looked_through(value):
            return False
        value = value.args[0] if isinstance(value.args[0], fx.Node) else value.args[1]
    return False


def _factor(graph: Graph, value: Any) -> tuple[Any, float] | None:
    """(x, c) of x * c or x / c with a number c."""
    if not isinstance(value, fx.Node) or value.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    a, b = value.args[:2]
    if (c := number(graph, b)) is not None and isinstance(a, fx.Node):
        return (a, float(c)) if value.target is aten.mul.Tensor else (a, 1.0 / float(c))
    if value.target is aten.mul.Tensor and (c := number(graph, a)) is not None:
        return b, float(c)
    return None


def _hides(graph: Graph, fill: Any) -> bool:
    """Whether a fill value hides what it replaces."""
    if isinstance(fill, fx.Node) and fill.target in (aten.full.default, aten.scalar_tensor.default):
        fill = fill.args[1] if fill.target is aten.full.default else fill.args[0]
    value = number(graph, fill)
    return value is not None and value <= -1e4


# -- raising it -----------------------------------------------------------------------------------------------------


def _finish(graph: Graph, site: _Site, masks: _Masks, context: Context) -> None:
    if site.why is None and site.q.meta["val"].dim() == 3:
        _unmerge(graph, site)
    found = site.why or _shapes_wrong(site) or _combine(site, masks)
    if isinstance(found, str):
        return context.decline(site.node, found)
    key_masks, causal, window, biases = found
    op = Builder(graph, site.node, site.node)
    if site.transposed:
        factor = _factor(graph, site.k) if len(site.k.users) == 1 else None
        if factor is not None and site.scale is not None and factor[0].meta["val"].dtype == site.k.meta["val"].dtype:
            site.k, site.scale = factor[0], site.scale * factor[1]  # torch's ONNX exporter scales k after its transpose
        site.k = _swapped(graph, site.k, site.node)
    site.k, site.v = _ungrouped(graph, site)
    if site.scale is not None and len({site.q, site.k, site.v}) == 3:  # a factor may not be taken from a value with two roles
        for name in ("q", "k"):
            source, c = _unscaled(graph, getattr(site, name))
            setattr(site, name, source)
            site.scale *= c
    if site.scale is not None:
        site.scale = _as_meant(site.scale, int(site.q.meta["val"].shape[-1]))
    key_mask = None
    for source in key_masks:
        key_mask = masks.key(source) if key_mask is None else op.logical_and(key_mask, masks.key(source))
    bias = biases[0] if biases else None
    for term in biases[1:]:  # Swin: relative positions, and which windows wrap around the image
        bias = op.add(bias, term)
    new = op.attention(site.q, site.k, site.v, key_mask, causal, window, site.scale, site.softcap, bias)
    context.apply(site.node)
    for user in list(site.node.users) if site.merged is not None else []:
        if _splits_heads(user) and same_shape(user.meta["val"].shape, new.meta["val"].shape):
            user.replace_all_uses_with(new, propagate_meta=False)
            graph.fx.erase_node(user)
    if site.node.users and site.merged is not None:  # read with batch and heads on one axis
        rows, width = new.meta["val"].shape[2:]
        new = op.reshape(new, [-1, op.sym_size(site.q, 2) if isinstance(rows, torch.SymInt) else int(rows), int(width)])
    site.node.replace_all_uses_with(new, propagate_meta=False)
    graph.fx.erase_node(site.node)


def _as_meant(scale: float, width: int) -> float:
    """1/sqrt(width) where the scale is it but for float32 rounding: exporters put the root of it, rounded, on q and on k."""
    usual = width**-0.5
    return usual if abs(scale - usual) <= 2 * torch.finfo(torch.float32).eps * usual else scale


def _unmerge(graph: Graph, site: _Site) -> None:
    """q, k, v and a baddbmm's term with batch and heads apart."""
    site.merged = site.merged or _batch_and_heads(graph, site)
    if site.merged is None:
        return  # nothing says how many heads there are: its rank is what it is refused for
    batch, heads = site.merged

    def apart(x: fx.Node) -> fx.Node:
        if x.meta["val"].dim() != 3:
            return x
        if x.target is aten.permute.default and x.args[1] == [0, 2, 1]:
            return graph.insert(aten.permute.default, apart(x.args[0]), [0, 1, 3, 2], before=site.node, like=x)  # type: ignore[arg-type]
        source: Any = x.args[0] if x.target is aten.reshape.default else None
        if source is not None and _ranks(x) == (4, 3) and _same_ends(x) and same_shape(source.meta["val"].shape[1:2], (heads,)):
            return source
        sizes = [int(s) if not isinstance(s, torch.SymInt) else -1 for s in x.meta["val"].shape[1:]]
        if sizes.count(-1) > 1:
            site.why = f"{x.name} has batch and heads on one axis and two dynamic ones beside it"
            return x
        return graph.insert(aten.reshape.default, x, [batch, heads, *sizes], before=site.node, like=x)

    site.q, site.k, site.v = (apart(t) for t in (site.q, site.k, site.v))
    site.terms = [(apart(t), hides) for t, hides in site.terms]


def _batch_and_heads(graph: Graph, site: _Site) -> tuple[Any, int] | None:
    """From [Q, B, E] -> [Q, B * H, D] -> [B * H, Q, D], as nn.MultiheadAttention makes its queries."""
    node: Any = site.q
    while isinstance(node, fx.Node) and (_factor(graph, node) is not None or node.target is aten.permute.default and node.args[1] == [1, 0, 2]):
        factor = _factor(graph, node)
        node = factor[0] if factor is not None else node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.reshape.default or _ranks(node) != (3, 3):
        return None
    source: Any = node.args[0]
    rows, _, width = source.meta["val"].shape
    if not same_shape((rows,), node.meta["val"].shape[:1]) or int(width) % int(node.meta["val"].shape[2]):
        return None
    size = graph.insert(aten.sym_size.int, source, 1, before=site.node)
    return size, int(width) // int(node.meta["val"].shape[2])


def _shapes_wrong(site: _Site) -> str | None:
    shapes = [t.meta["val"].shape for t in (site.q, site.k, site.v)]
    if any(len(s) != 4 for s in shapes):
        return f"q, k, v are of rank {', '.join(str(len(s)) for s in shapes)}, not 4"
    q, k, v = shapes
    keys = k[3] if site.transposed else k[2]
    if not same_shape((q[0], keys), (k[0], v[2])) or not same_shape(k[:2], v[:2]) or int(q[1]) % int(k[1]):
        return f"q {list(q)}, k {list(k)}, v {list(v)} share no batch and heads"
    return None


def _combine(site: _Site, masks: _Masks) -> tuple[list[fx.Node], bool, int | None, list[fx.Node]] | str:
    """(key masks, causal, window, terms of the bias) of all mask terms, or why one has no name."""
    q, k = site.q.meta["val"].shape, site.k.meta["val"].shape
    scores = (q[0], q[2], k[3] if site.transposed else k[2])
    keys: list[fx.Node] = []
    causal, windows = site.causal, []
    biases: list[fx.Node] = []
    work: list[tuple[Any, bool]] = list(site.terms)
    while work:
        term, hides = work.pop(0)
        found = masks.name(term, hides, scores)
        if isinstance(found, Mask):
            causal = causal or found.causal
            windows += [found.window] if found.window is not None else []
            keys += [found.key] if found.key is not None and found.key not in keys else []
        elif not found.additive:
            return found.why
        elif term.target is aten.add.Tensor and any(isinstance(masks.name(a, False, scores), Mask) for a in _addends(term)):
            work += [(a, False) for a in _addends(term)]  # T5: positions and padding in one sum
        elif term.target in _WHERE_SEEN and _hides(masks.graph, term.args[2]):
            work += [(term.args[0], False), (term.args[1], False)]  # T5: positions where seen, else the minimum
        else:
            biases.append(term)
    return keys, causal, min(windows) if windows else None, biases


def _addends(term: fx.Node) -> list[fx.Node]:
    both = all(isinstance(a, fx.Node) and a.meta["val"].is_floating_point() for a in term.args[:2]) and argument(term, "alpha") == 1
    return list(term.args[:2]) if both else []  # type: ignore[arg-type]


def _swapped(graph: Graph, k: fx.Node, before: fx.Node) -> fx.Node:
    """k with its last two axes swapped, without a permute where that undoes one."""
    source, dims = (k.args[0], list(k.args[1])) if k.target is aten.permute.default else (k, [0, 1, 2, 3])  # type: ignore[arg-type]
    dims = [*dims[:2], dims[3], dims[2]]
    return source if dims == [0, 1, 2, 3] else graph.insert(aten.permute.default, source, dims, before=before)  # type: ignore[return-value]


def _ungrouped(graph: Graph, site: _Site) -> tuple[fx.Node, fx.Node]:
    """k and v before each of their heads was repeated for consecutive query heads."""
    k, v = (_before_repeat(graph, t) for t in (site.k, site.v))
    return (k, v) if k.meta["val"].shape[1] == v.meta["val"].shape[1] else (site.k, site.v)


def _before_repeat(graph: Graph, x: fx.Node) -> fx.Node:
    best, heads = x, int(x.meta["val"].shape[1])
    node: Any = x
    while isinstance(node, fx.Node) and node.target in _GROUPED:
        node = node.args[0]
        before, after = node.meta["val"].shape, x.meta["val"].shape
        alike = len(before) == 4 and same_shape((before[0], *before[2:]), (after[0], *after[2:]))
        if alike and int(before[1]) < heads and heads % int(before[1]) == 0 and _repeats_in_order(graph, node, x):
            best = node
    return best


def _repeats_in_order(graph: Graph, source: fx.Node, result: fx.Node) -> bool:
    """Push the numbers of the heads through: result head i must be source head i // repeats."""
    trial = Evaluator(graph, {name: max(2 + i, d.low) for i, (name, d) in enumerate(graph.dims.items())}, {})
    heads = torch.arange(int(source.meta["val"].shape[1])).view(1, -1, 1, 1).expand(trial.shape(source))
    trial.given[source] = heads
    repeats = int(result.meta["val"].shape[1]) // heads.shape[1]
    return torch.equal(trial.run(result), heads.repeat_interleave(repeats, 1))


def _unscaled(graph: Graph, x: fx.Node) -> tuple[fx.Node, float]:
    """(x without a factor, the factor) when layout ops that nobody else reads lead from the factor to x."""
    chain: list[fx.Node] = []
    node: Any = x
    while isinstance(node, fx.Node) and node.target in (aten.reshape.default, aten.permute.default, aten.clone.default) and len(node.users) <= 1:
        chain.append(node)
        node = node.args[0]
    factor = _factor(graph, node)
    if factor is None or len(node.users) > 1 or not isinstance(factor[0], fx.Node) or factor[0].meta["val"].dtype != node.meta["val"].dtype:
        return x, 1.0
    if not chain:
        return factor
    chain[-1].replace_input_with(node, factor[0])
    return x, factor[1]
