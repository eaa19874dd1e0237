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
from ..ir.graph import Flat, Graph
from ..ir.verify import padding_mask, real_rows

Distance = Callable[[Tensor, Tensor], Tensor]
"""(teacher's rows, student's rows) [rows, channels] in float32 -> scalar, a mean over rows."""
LossName = Literal["auto", "kl", "mse", "cosine"]


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


def output_terms(teacher: Graph, student: Graph, loss: LossName = "auto", temperature: float = 1.0) -> list[Term]:
    """A term for each float output. "auto": KL where a linear makes it (logits of several classes), relative squared error elsewhere.

    Raises UsageError when no output is of floats.
    """
    if loss not in ("auto", "kl", "mse", "cosine"):
        raise UsageError(f"no loss {loss!r}; there are auto, kl, mse, cosine, and a list of Terms in Python")
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
        sums, counts = [0.0] * len(self.terms), [0] * len(self.terms)
        for flat in batches:
            for i, (distance, rows) in enumerate(self._distances(flat)):
                sums[i] += distance.double().item() * rows
                counts[i] += rows
        return sum(t.weight * s / max(n, 1) for t, s, n in zip(self.terms, sums, counts))

    def _distances(self, flat: Flat) -> list[tuple[Tensor, int]]:
        with torch.no_grad():
            theirs, mask = self.teacher(*flat), self.valid(flat)
        rows = [(_rows(a, mask), _rows(b, mask)) for a, b in zip(theirs, self.student(*flat), strict=True)]
        return [(t.distance(a, b), len(a)) for t, (a, b) in zip(self.terms, rows)]


def values_of(graph: Graph, names: Sequence[str]) -> fx.GraphModule:
    """Flat inputs -> the values of these nodes: the graph's program over the graph's own weights. UsageError for a name it lacks."""
    program = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    program.graph_copy(graph.fx, copied)
    by_name = {old.name: new for old, new in copied.items()}
    if missing := [n for n in names if n not in by_name]:
        raise UsageError(f"the graph has no value {missing[0]!r}")
    program.output(tuple(by_name[n] for n in names))
    program.eliminate_dead_code()
    return fx.GraphModule(graph.module, program)


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
