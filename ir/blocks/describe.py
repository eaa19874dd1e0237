"""A model in sentences: its blocks, how many, its residual stream, and what was not understood."""

from __future__ import annotations

from collections import Counter

from torch import fx

from ..evaluate import op_name
from ..graph import Graph
from .attention import AttentionBlock, attention_blocks
from .feed_forward import FFNBlock, ffn_blocks
from .residual import Stream, Streams
from .tokens import token_axis
from .vocabulary import aten, path_of

_NOT_RAISED = (
    ("scaled_dot_product_attention", (aten.scaled_dot_product_attention.default,)),
    ("softmax", (aten.softmax.int, aten._softmax.default)),
)


def describe(graph: Graph) -> list[str]:
    """The model in a few sentences: what its blocks are, how many, its residual stream, and what was not understood."""
    streams = Streams(graph)
    attentions, ffns = attention_blocks(graph, streams), ffn_blocks(graph, streams)
    said = _counted([(_attention_name(a), f", {a}") for a in attentions])
    said += _counted([(_ffn_name(f), f" {f}") for f in ffns])
    said += _streams(streams.all, any(b.norm == "post-norm" for b in (*attentions, *ffns)))
    return said + not_understood(graph, streams, attentions, ffns)


def describe_tokens(graph: Graph) -> list[str]:
    """Along which axes the values of a model count tokens, and what becomes of the tokens elsewhere, commonest first."""
    found = Counter(str(a) for node, a in token_axis(graph).items() if node.op == "call_function" and (a.axis is not None or a.why))
    return [f"{text}: {n} value{'s' * (n > 1)}" for text, n in found.most_common()]


def not_understood(graph: Graph, streams: Streams, attentions: list[AttentionBlock], ffns: list[FFNBlock]) -> list[str]:
    """What stands in the graph and is no block, in words, grouped with counts."""
    said = []
    routers = {f.router for f in ffns if f.router is not None}
    for what, targets in _NOT_RAISED:
        left = [n for n in graph.find(*targets) if not _is_router(n, routers)]
        if left:
            said.append(f"{len(left)} {what} node{'s' * (len(left) > 1)} not raised to attention, first in {path_of(left[0])}")
    reasons = Counter(why for block in (*attentions, *ffns) for why in block.why)
    said += [f"{why} ({n} times)" if n > 1 else why for why, n in reasons.items()]
    known = {out for a in attentions for out in (a.out, *a.other_outs)} | {f.down for f in ffns}
    running = [s for s in streams.all if not s.is_post_norm]
    others = [w.node for s in running for w in s.writers if w.node not in known]
    bypasses = [r for s in running if s.norms for r in s.bypasses]
    said += [f"{_said(len(others), 'writer')} neither attention nor FFN: {_examples(others)}"] if others else []
    said += [f"{_said(len(bypasses), 'reader')} behind no norm: {_examples(bypasses)}"] if bypasses else []
    return said


def _attention_name(block: AttentionBlock) -> str:
    kind = "" if block.kind == "self" else f"{block.kind} "
    return f"{block.norm} {kind}attention block".strip()


def _ffn_name(block: FFNBlock) -> str:
    if block.residual is None:
        return f"{block.kind} MLP beside the residual stream,"
    return ("shared " if block.shared else "") + f"{block.kind} FFN"


def _streams(streams: tuple[Stream, ...], post_norm: bool) -> list[str]:
    post = [s for s in streams if s.is_post_norm] if post_norm else []
    long = [s for s in streams if not s.is_post_norm and len(s.writers) > 1]
    said = [str(s) for s in long[:4]]
    if len(long) > 4:
        said.append(f"{len(long) - 4} more residual streams of {', '.join(str(w) for w in sorted({s.width for s in long[4:]}))} channels")
    if post:
        said.append(f"{len(post)} sum{'s are' if len(post) > 1 else ' is'} normed at once (post-norm): no residual stream runs through")
    return said


def _is_router(softmax: fx.Node, routers: set[fx.Node]) -> bool:
    return softmax.args[0] in routers or any(n in routers for n in getattr(softmax.args[0], "all_input_nodes", ()))


def _examples(nodes: list[fx.Node]) -> str:
    names = list(dict.fromkeys(f"{path_of(n)} ({op_name(n) or n.op})" for n in nodes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _said(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''} of the residual stream {'are' if n > 1 else 'is'}"


def _counted(kinds: list[tuple[str, str]]) -> list[str]:
    found = []
    for (what, details), n in Counter(kinds).items():
        plural = what.replace("block", "blocks", 1) if "block" in what else what.replace("FFN", "FFNs", 1).replace("MLP", "MLPs", 1)
        found.append(f"{n} {plural if n > 1 else what}{details}")
    return found
