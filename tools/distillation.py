"""What a student should give as its teacher does, and how far it is from it: terms over values of both graphs.

Logits: the Kullback-Leibler divergence of softened distributions (Hinton et al. 2015, "Distilling the knowledge in a neural
network"); hidden values: relative squared error, as in FitNets (Romero et al. 2015) with equal widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..ir.blocks.residual import residual_streams
from ..ir.blocks.vocabulary import is_logits
from ..ir.errors import UsageError
from ..ir.evaluate import values_of
from ..ir.graph import Flat, Graph
from ..ir.verify import padding_mask, real_rows

Distance = Callable[[Tensor, Tensor], Tensor]
"""(teacher's rows, student's rows) [rows, channels] in float32 -> scalar, a mean over rows."""
OutputLoss = Literal["auto", "kl", "mse", "cosine"]


@dataclass(frozen=True)
class Term:
    """One value of the teacher that a value of the student should equal."""

    teacher: str
    """The node's name in the teacher's graph."""
    student: str
    """The node's name in the student's."""
    distance: Distance
    weight: float = 1.0
    name: str = ""
    """What it is, for a person: "kl of logits"."""


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) a row in nats, both softened, times the temperature squared: so its gradient keeps its size."""
    t, s = ((x / temperature if temperature != 1 else x).log_softmax(-1) for x in (teacher, student))
    return nn.functional.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def relative_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """|teacher - student|^2 / |teacher|^2 over all rows."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(torch.finfo(teacher.dtype).tiny)


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - the cosine of a row."""
    return 1 - nn.functional.cosine_similarity(teacher, student, dim=-1).mean()


def output_terms(teacher: Graph, student: Graph, loss: OutputLoss = "auto", temperature: float = 1.0) -> list[Term]:
    """A term for each float output. "auto": KL where a linear makes it (logits of several classes), relative squared error elsewhere.

    Raises UsageError when no output is of floats.
    """
    terms, theirs = [], outputs(teacher)
    for i, (t, s) in enumerate(zip(theirs, outputs(student), strict=True)):
        value = t.meta.get("val") if isinstance(t, fx.Node) else None
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
            continue
        logits = is_logits(t)
        kind = ("kl" if logits else "mse") if loss == "auto" else loss
        distance: Distance = {"kl": lambda a, b: kl(a, b, temperature), "mse": relative_mse, "cosine": cosine}[kind]
        terms.append(Term(t.name, s.name, distance, name=f"{kind} of {'logits' if logits else 'values'}{f' {i}' if len(theirs) > 1 else ''}"))
    if not terms:
        raise UsageError("the model has no float output to learn from and to be judged by")
    return terms


def hidden_terms(teacher: Graph, student: Graph, weight: float) -> list[Term]:
    """The sums of the residual stream that both graphs have by name, together of `weight`, each by its relative squared error.

    Raises UsageError when they share none.
    """
    theirs = {v.name: v for stream in residual_streams(teacher) for v in stream.values if v.op == "call_function" and isinstance(v.meta["val"], Tensor)}
    shared = [n.name for n in student.nodes if n.name in theirs and alike(theirs[n.name].meta["val"], n.meta["val"])]
    if not shared:
        raise UsageError("hidden values can't be matched: the two graphs share no value of a residual stream by name")
    return [Term(name, name, relative_mse, weight / len(shared), f"hidden {name}") for name in shared]


class Distillation:
    """Terms over two graphs as functions of a batch. The student's weights are those of `student`, by reference."""

    def __init__(self, teacher: Graph, student: Graph, terms: Sequence[Term], compiled: bool = False) -> None:
        self.terms = list(terms)
        self.valid = padding_mask(teacher)
        self.teacher = values_of(teacher, [t.teacher for t in terms])
        self.student = values_of(student, [t.student for t in terms])
        if compiled:
            self.teacher.compile()
            self.student.compile()

    def loss(self, flat: Flat) -> tuple[Tensor, int]:
        """The weighted sum over terms, and the rows of the first."""
        found = self._distances(flat)
        return torch.stack([t.weight * d for t, (d, _) in zip(self.terms, found)]).sum(), found[0][1]

    def mean(self, batches: Sequence[Flat]) -> float:
        """The weighted sum over terms, over all batches: each counts by its rows."""
        return sum(t.weight * d for t, d in zip(self.terms, self.each(batches)))

    def about(self) -> str:
        """What `mean` is, for a person."""
        return " + ".join(t.name for t in self.terms)

    def each(self, batches: Sequence[Flat]) -> list[float]:
        """The distance of each term over all batches."""
        sums, counts = [0.0] * len(self.terms), [0] * len(self.terms)
        for flat in batches:
            for i, (distance, rows) in enumerate(self._distances(flat)):
                sums[i] += distance.double().item() * rows
                counts[i] += rows
        return [s / max(n, 1) for s, n in zip(sums, counts)]

    def _distances(self, flat: Flat) -> list[tuple[Tensor, int]]:
        with torch.no_grad():
            theirs, mask = self.teacher(*flat), self.valid(flat)
        rows = [(_rows(a, mask), _rows(b, mask)) for a, b in zip(theirs, self.student(*flat), strict=True)]
        return [(t.distance(a, b), len(a)) for t, (a, b) in zip(self.terms, rows)]


class AttentionTransfer(Distillation):
    """Attention transfer (LoLCATs, Zhang et al. 2024, stage 1): each replaced attention alone, for the queries, keys and values its teacher has.

    Layers don't disturb each other, for nothing a student's layer gives reaches the next: many problems in one run.
    Raises UsageError when the student has every attention of its teacher, or one whose replacement can't be told.
    """

    def __init__(self, teacher: Graph, student: Graph, compiled: bool = False) -> None:
        replaced = [(n, _replacement(n, student)) for n in teacher.find(torch.ops.rewright.attention.default)]
        pairs = [(a, b) for a, b in replaced if b is not None]
        if not pairs:
            raise UsageError("no attention of the original was replaced, so that there is none to be learned from; linear-attention replaces some")
        self.terms = [Term(a.name, b.name, relative_mse, 1 / len(pairs), f"attention {a.meta.get('path') or a.name}") for a, b in pairs]
        self.valid = padding_mask(teacher)
        self.both = _beside_teacher(teacher, student, pairs)
        if compiled:
            self.both.compile()

    def about(self) -> str:
        return f"mean relative squared error of {len(self.terms)} attention{'s' if len(self.terms) > 1 else ''} alone"

    def _distances(self, flat: Flat) -> list[tuple[Tensor, int]]:
        mask, found = self.valid(flat), self.both(*flat)
        rows = [_rows(x.transpose(1, 2).flatten(2), mask) for x in found]
        return [(t.distance(rows[2 * i], rows[2 * i + 1]), len(rows[2 * i])) for i, t in enumerate(self.terms)]


def _replacement(attention: fx.Node, student: Graph) -> fx.Node | None:
    """What the reader of an attention reads in the student; None where that is still the attention."""
    by_name = {n.name: n for n in student.nodes}
    if (same := by_name.get(attention.name)) is not None and same.target is attention.target:
        return None
    for user in attention.users:
        twin = by_name.get(user.name)
        if twin is not None and twin.target is user.target:
            found = [b for a, b in zip(user.args, twin.args) if a is attention]
            if found and isinstance(found[0], fx.Node):
                return found[0]
    where = attention.meta.get("path") or attention.name
    raise UsageError(f"attention transfer can't tell what stands for {where} in the student: put it right behind the pass that replaces attention")


def _beside_teacher(teacher: Graph, student: Graph, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> fx.GraphModule:
    """Flat inputs -> attention, its replacement, attention, ...: the teacher's program, and what the student computes from the teacher's values."""
    program = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    program.graph_copy(teacher.fx, copied)
    theirs = {n.name: n for n in teacher.fx.nodes if n.op in ("call_function", "placeholder")}
    weights: dict[str, Any] = {name: w.detach() for name, w in teacher.weights().items()}

    def take(node: fx.Node) -> fx.Node:
        if node in copied:
            return copied[node]
        same = theirs.get(node.name)
        if same is not None and same.target == node.target:
            return copied[same]
        if node.op == "get_attr":
            weights[f"student.{node.target}"] = student.weight(node)
            copied[node] = program.get_attr(f"student.{node.target}")
        else:
            for operand in node.all_input_nodes:
                take(operand)
            copied[node] = program.node_copy(node, take)
        return copied[node]

    program.output(tuple(n for a, b in pairs for n in (copied[a], take(b))))
    program.eliminate_dead_code()
    return fx.GraphModule(weights, program)


def _rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, channels] in float32, without padded tokens."""
    value = real_rows(value, mask)
    return value.float().reshape(-1, value.shape[-1])


def outputs(graph: Graph) -> tuple[Any, ...]:
    """The flat outputs: nodes and literals."""
    return tuple(graph.output.args[0])  # type: ignore[arg-type]


def alike(a: Any, b: Any) -> bool:
    """One dtype and shape; symbols of two captures stand for the same size where both have one."""
    same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.dim() == b.dim()
    return same and all(x == y if isinstance(x, int) and isinstance(y, int) else type(x) is type(y) for x, y in zip(a.shape, b.shape))
