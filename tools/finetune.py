"""Short recovery of a rewritten graph: distillation from the original, on the graph, resumable, never worse than it began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..ir.errors import Interrupted, UsageError
from ..ir.files import check_writable
from ..ir.graph import Flat, Graph
from ..ir.sizes import filled, token_count
from ..ir.verify import compare, padding_mask
from ..passes.pipeline import Outcome, Pipeline, Record
from ..passes.recipe import Recipe
from ..passes.statistics.keys import data_key, hashed, weight_key
from .ablation import ablation
from .calibration import calibration
from .distillation import AttentionTransfer, Distillation, OutputLoss, Term, alike, hidden_terms, output_terms, outputs
from .finetuned import DRIFT, Finetuned, Metric
from .lora import LowRankUpdates
from .models import Loaded, as_flat, at_length, at_sizes, runner_of
from .optimize import Progress, Result, batches_of, load, loaded_from, silent
from .trainable import choose, with_own_weights
from .training import Trained, Training, train
from .zoo import drawn

Precision = Literal["auto", "fp32", "bf16"]
LossName = OutputLoss | Literal["attention"]


def finetune(
    student: Result | Graph | str | Path,
    teacher: Graph | Loaded | str | Path,
    batches: Iterable[Any] | str | Path = (),
    *,
    steps: int | None = None,
    minutes: float | None = None,
    rate: float = 3e-4,
    warm_up: int = 20,
    decay: float = 0.25,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    loss: LossName | Sequence[Term] = "auto",
    temperature: float = 1.0,
    hidden: float = 0.0,
    lora: int = 0,
    trainable: str | Sequence[str] = "all",
    precision: Precision = "auto",
    compiled: bool = False,
    seed: int = 0,
    judgings: int = 10,
    metric: Callable[[nn.Module], float] | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = silent,
) -> Finetuned:
    """Train a rewritten graph to give what the original gives. Neither of the two, nor a clone of theirs, is changed.

    student: a Result, the folder of a saved one, or a graph. teacher: the original, as `optimize` takes it.
    batches: as `optimize(calibration=...)` takes them; the last quarter is held out. Without any: the training data of a zoo
      model, or what a Loaded model brings.
    steps, minutes: the end, whichever comes first; 10 minutes without either. With steps alone the same seed gives the same
      weights, also to a run that was stopped and went on from its `checkpoint` (a file; the caller removes it).
    rate: peak of the learning rate, reached in `warm_up` steps; over the last `decay` of the run it falls to nothing.
    loss: "auto" (KL of logits, relative squared error of other outputs), "kl", "mse", "cosine", "attention" (each replaced attention
      alone, for the values its teacher has: AttentionTransfer), or Terms over values of the two graphs.
    temperature: softens logits. hidden: weight of the residual stream's relative squared error beside it.
    lora: rank of the updates that chosen matrices of the original get, merged into them in the end; 0: they are trained themselves.
    trainable: one or several of "all", "rewritten" (weights the original lacks or holds otherwise), "attention" (the linears around the
      original's attentions), and paths of modules or weights.
    precision: of the steps' products: "bf16" autocast, "fp32", or what the machine is faster with. Judgings are in full precision.
    compiled: torch.compile both programs: faster steps after about a minute.
    judgings: looks at held-out data along the way. The weights with the least drift (the "auto" loss on held-out data; for "attention" that
      loss) are given back: those of the start if none is better. metric: module -> number, for the curve; a zoo model has its own.
    Raises UsageError for nothing to train, no data, an end or a loss that does not exist, graphs that take or give other values.
    """
    given = _as_result(student)
    original = loaded_from(teacher, None)
    original = at_sizes(original, {name: size for name, size in given.recipe.sizes.items() if name in original.graph.dims})
    reference = _canonical(original.graph)
    if why := _why_not(given.graph, reference):
        raise UsageError(why)
    if checkpoint is not None:
        check_writable(Path(checkpoint))
    recovered = with_own_weights(given.graph)
    chosen = choose(recovered, reference, trainable)
    updates = LowRankUpdates(recovered, reference, chosen, lora, seed) if lora else None
    chosen = chosen if updates is None else updates.trained
    lesson = _lesson(reference, recovered, loss, temperature, hidden, compiled)
    exam_of = partial(AttentionTransfer if loss == "attention" else _by_outputs, reference)
    exam = exam_of(recovered)
    data = _data(original, reference, batches, seed)
    own, measure = _metric(original, reference, metric)
    autocast = _autocast(precision, next(iter(chosen.values())).device.type)

    def measured(graph: Graph, by: Distillation) -> dict[str, float]:
        found = {DRIFT: by.mean(data.held_out)}
        return found | {own.name: measure(graph.module)} if own is not None else found

    how: dict[str, Any] = {"steps": steps, "minutes": 10.0 if steps is None and minutes is None else minutes, "rate": rate, "warm_up": warm_up}
    how |= {"decay": decay, "weight_decay": weight_decay, "clip": clip, "judgings": judgings}
    settings = {**how, "terms": [t.name or f"{t.student} like {t.teacher}" for t in lesson.terms], "temperature": temperature, "hidden": hidden, "lora": lora}
    settings |= {"trainable": trainable, "precision": "fp32" if autocast is None else "bf16", "compiled": compiled, "seed": seed, "data": data.about}
    made_of = hashed(*(weight_key(g, name, {}) for g in (given.graph, reference) for name in g.weights()), data.key)

    def seen(trained: Trained) -> None:
        row = trained.curve[-1]
        progress(f"step {row['step']:.0f}, {DRIFT} {row[DRIFT]:.4g}", round(1000 * min(1.0, task.share(int(row["step"] or 0), trained.seconds))), 1000)

    same = {**settings, "student, original and data": made_of}
    task = Training(chosen, lambda step: lesson.loss(data.batch(step)), lambda: measured(recovered, exam), **how, autocast=autocast, best=DRIFT, settings=same)
    first = exam.each(data.held_out) if len(exam.terms) > 1 else []
    trained = train(task, None if checkpoint is None else Path(checkpoint), seen)
    layers = {t.name: (a, b) for t, a, b in zip(exam.terms, first, exam.each(data.held_out) if first else [])}
    if updates is not None:
        updates.merge()
    for name, weight in given.graph.weights().items():
        recovered.weight(name).requires_grad_(weight.requires_grad)
    best, columns = trained.curve[trained.best], [DRIFT] if own is None else [DRIFT, own.name]
    record = Record("finetune", settings, exact=False, matched=len(chosen), applied=len(chosen) if trained.best else 0)
    record.seconds, record.layers = trained.seconds, list(chosen) if trained.best else []
    return Finetuned(
        _result(given, reference, recovered, record, data.held_out[:4], original.name),
        trained,
        terms=tuple(settings["terms"]),
        drift=exam.about(),
        data=data.about,
        weights=(sum(p.numel() for p in chosen.values()), sum(p.numel() for p in recovered.module.parameters())),
        metric=own,
        conditions=f"{settings['precision']}{', compiled' if compiled else ''}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        layers=layers,
        parts=ablation(recovered, lambda g: measured(g, exam_of(g)), {key: best[key] or 0.0 for key in columns}),
    )


def _result(given: Result, reference: Graph, recovered: Graph, record: Record, held_out: list[Flat], name: str) -> Result:
    """What was given, with other weights, one record more and the drift measured again."""
    before, drift = given.outcome, compare(reference.run, recovered.run, held_out, padding_mask(reference))
    record.measured = drift.as_dict()
    outcome = Outcome(reference, recovered, [*before.records, record], before.passes, held_out, drift)
    return Result(outcome, given.recipe, [*given.inputs[:1], *held_out], given.name or name, given.calibration)


def _lesson(teacher: Graph, student: Graph, loss: LossName | Sequence[Term], temperature: float, hidden: float, compiled: bool) -> Distillation:
    if loss == "attention":
        if hidden:
            raise UsageError("attention transfer looks at each layer alone and has no place for hidden values; give hidden = 0")
        return AttentionTransfer(teacher, student, compiled)
    if isinstance(loss, str) and loss not in (known := get_args(OutputLoss)):
        raise UsageError(f"no loss {loss!r}; there are {', '.join(known)}, attention, and a list of Terms in Python")
    terms = output_terms(teacher, student, loss, temperature) if isinstance(loss, str) else list(loss)
    return Distillation(teacher, student, terms + (hidden_terms(teacher, student, hidden) if hidden else []), compiled)


def _by_outputs(teacher: Graph, student: Graph) -> Distillation:
    return Distillation(teacher, student, output_terms(teacher, student))


def finetune_folder(student: str | Path, teacher: str | Path | Loaded, out: str | Path, batches: Iterable[Any] | str | Path = (), **options: Any) -> Finetuned:
    """`finetune` from a saved result to a saved result; its checkpoint lies beside `out` until that is written.

    Raises Interrupted for a Ctrl-C behind the first judging.
    """
    check_writable(Path(out))
    checkpoint = checkpoint_of(out)
    try:
        found = finetune(student, teacher, batches, checkpoint=checkpoint, **options)
    except KeyboardInterrupt as stopped:
        if not checkpoint.exists():
            raise
        raise Interrupted(f"interrupted; {checkpoint} holds the run up to its last judging, and the same command goes on from there") from stopped
    found.result.save(out)
    checkpoint.unlink(missing_ok=True)
    return found


def checkpoint_of(out: str | Path) -> Path:
    """Where a run that writes `out` keeps its checkpoint."""
    out = Path(out)
    return out.with_name(f"{out.name}.checkpoint")


@dataclass(frozen=True)
class _Data:
    batch: Callable[[int], Flat]
    """Step -> what it trains on."""
    held_out: list[Flat]
    about: str
    key: str
    """The hash of given data, nothing for a zoo model's own."""


def _data(original: Loaded, graph: Graph, given: Iterable[Any] | str | Path, seed: int) -> _Data:
    zoo = original.zoo

    def flat(batch: Any) -> Flat:
        return filled(graph, as_flat(graph, batch))

    flats = batches_of(original, given) if zoo is None else [flat(b) for b in calibration(given)]
    if not flats and zoo is not None:
        held_out = [flat(b) for b in zoo.validation()]
        zoo.training_batch(0, seed)  # reads its texts now, which is no part of the run's time
        return _Data(lambda step: flat(zoo.training_batch(step, seed)), held_out, f"{original.name}'s training data", "")
    if len(flats) < 2:
        got = "one batch" if flats else "no data"
        raise UsageError(f"there is {got} to learn from: give --data FILE or batches=, two batches at least, for the last quarter is held out")
    held = max(1, len(flats) // 4)
    fit, held_out = flats[:-held], flats[-held:]

    def batch(step: int) -> Flat:
        epoch, i = divmod(step, len(fit))
        return fit[int(torch.randperm(len(fit), generator=drawn(epoch, seed))[i])]

    return _Data(batch, held_out, f"{len(fit)} batches, {held} more held out", data_key(graph, flats))


def _metric(original: Loaded, reference: Graph, given: Callable[[nn.Module], float] | None) -> tuple[Metric | None, Callable[[nn.Module], float]]:
    """The metric of the curve and how to measure it: held-out data of the judge's own, by which nothing is chosen."""
    zoo = original.zoo
    if given is not None:
        return Metric("metric", given(reference.module)), given
    if zoo is None:
        return None, lambda module: float("nan")
    count = token_count(reference)
    score = zoo.judge(at_length(runner_of(reference.module), count), zoo.glance)[0]
    return Metric(score.name, score.value, score.on), lambda module: zoo.judge(at_length(runner_of(module), count), zoo.glance)[0].value


def _as_result(student: Result | Graph | str | Path) -> Result:
    if isinstance(student, str | Path):
        student = load(student)
    if isinstance(student, Result):
        return student
    graph = _canonical(student)
    return Result(Outcome(graph, graph, [], (), []), Recipe(()), name="")


def _canonical(graph: Graph) -> Graph:
    return graph if graph.canonical else Pipeline([], verify=False).run(graph).graph


def _why_not(student: Graph, teacher: Graph) -> str | None:
    """Why one can't learn from the other."""
    theirs, ours = teacher.call.names, student.call.names
    if theirs != ours:
        return f"the student takes {', '.join(ours)} and the original {', '.join(theirs)}: it was not made of that model"
    if len(outputs(teacher)) != len(outputs(student)):
        return f"the student gives {len(outputs(student))} outputs and the original {len(outputs(teacher))}: it was not made of that model"
    for i, (a, b) in enumerate(zip(outputs(teacher), outputs(student))):
        a, b = (getattr(x, "meta", {}).get("val") for x in (a, b))
        if isinstance(a, Tensor) and not alike(a, b):
            got = f"{b.dtype}{list(b.shape)}" if isinstance(b, Tensor) else b
            return f"output {i} of the student is {got} and the original's {a.dtype}{list(a.shape)}: it was not made of that model"
    return None


def _autocast(precision: str, device: str) -> torch.dtype | None:
    """bfloat16 where the machine multiplies in it, or as asked."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"no precision {precision!r}; there are auto, fp32 and bf16")
    native = torch.cuda.is_bf16_supported() if device == "cuda" else device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or precision == "auto" and native else None
