"""An ONNX model -> the same with fewer nodes: constants folded, norms and scales folded into weights, no-ops and copies gone; checked in onnxruntime."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import node_rules
from .agreement import Agreement, agreement
from .silence import silent

ROUNDS = 4
"""Most repetitions of the steps that make work for each other."""

GROWTH = 1_000_000
"""Bytes by which folding may make a file larger than it was, beside what it was: a light file of one node may stand for gigabytes."""

MADE = ("ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "Pad", "Resize", "OneHot", "CenterCropPad", "Upsample")
"""Operators whose output has more numbers than their inputs."""

TRACES = ("pkg.torch", "pkg.onnxscript", "namespace")
"""Beginnings of the keys under which exporters leave stack traces and notes on nodes and values."""


@dataclass
class Step:
    """What one kind of change did."""

    name: str
    nodes: int = 0
    """Change of their number."""
    changes: int = 0
    seconds: float = 0.0
    undone: str | None = None


@dataclass
class Tidied:
    """The model now, what was done, and how near it is to the original."""

    model: Any
    before: int
    after: int
    steps: list[Step]
    agreement: Agreement
    why_not: str | None = None
    """Why the model is the original after all, or None."""


Change = Callable[[Any], int | None]


@dataclass(frozen=True)
class _Kind:
    name: str
    change: Change
    again: bool = True
    """Whether it takes part in every round."""


def tidy(model: Any, source: Any = None) -> Tidied:
    """Tidy an onnx_ir.Model; `model` itself stays as it is. The result never has more nodes.

    source: what onnxruntime runs for comparison (a path or bytes); by default the model.
    All steps are taken and the end result is compared with the original on made inputs. If it differs, the steps are taken again,
    each compared, and the ones at fault are left out and named. A step that raises is left out too.
    """
    original, before = model.clone(), count(model)
    with silent():  # folding logs what it can't compute, and leaves it
        done, steps = _take(original.clone(), KINDS)
        found = agreement(original, done, source)
        if found.why_not is not None:
            done, steps = _take(original.clone(), KINDS, lambda changed: agreement(original, changed, source).why_not)
            found = agreement(original, done, source)
    if found.why_not is None and count(done) <= before:
        return Tidied(done, before, count(done), steps, found)
    why_not = found.why_not or f"it would have had {count(done)} nodes in place of {before}"
    steps = [Step(s.name, seconds=s.seconds, undone=s.undone) for s in steps]
    return Tidied(original, before, before, steps, Agreement(found.ran, found.inputs), why_not)


def count(model: Any) -> int:
    """Nodes of the main graph."""
    return sum(1 for _ in model.graph)


def _take(
    model: Any, kinds: tuple[_Kind, ...], trouble: Callable[[Any], str | None] | None = None, faulty: dict[str, str] | None = None
) -> tuple[Any, list[Step]]:
    """All kinds of changes, the repeated ones until none changes anything. trouble: says what is wrong with a changed model, or None."""
    steps = {kind.name: Step(kind.name) for kind in kinds}
    for turn in range(ROUNDS):
        changed = False
        for kind in kinds:
            step = steps[kind.name]
            if step.undone or turn and not kind.again:
                continue
            begin, nodes, attempt = time.perf_counter(), count(model), model.clone()
            try:
                made = kind.change(attempt)
                step.undone = trouble(attempt) if trouble is not None and made else None
            except Exception as error:  # a step of another library's that fails must not cost the user the model
                step.undone = f"{kind.name} raised {type(error).__name__}: {next(iter(str(error.__cause__ or error).splitlines()), '')[:200]}"
                made = 0
            if not step.undone and made:
                model, changed = attempt, True
                step.nodes += count(model) - nodes
                step.changes += made
            step.seconds += time.perf_counter() - begin
        if not changed:
            break
    return model, list(steps.values())


def _passes(*names: str) -> Change:
    """Passes of onnx_ir by name."""

    def change(model: Any) -> int:
        import onnx_ir.passes.common as common

        before = count(model)
        return sum(bool(getattr(common, name)()(model).modified) for name in names) + max(0, before - count(model))

    return change


def _fold(model: Any) -> int:
    """onnxscript's constant folding and shape inference, within a budget of bytes; what would grow beyond is not computed at all."""
    from onnxscript.optimizer import _constant_folding as folding

    before = count(model)
    budget = [GROWTH + weight_bytes(model)]

    def affordable(node: Any) -> bool | None:
        if node.op_type not in MADE:
            return None  # its own limits hold
        needed = 0
        for out in node.outputs:
            if out.shape is None or not out.shape.is_static() or out.dtype is None:
                return False
            needed += math.prod(out.shape.numpy()) * max(1, out.dtype.itemsize)
        if needed > budget[0]:
            return False
        budget[0] -= needed
        return None

    folder = folding.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
        should_fold=affordable,
    )
    return int(bool(folder(model).modified)) + max(0, before - count(model))


def weight_bytes(model: Any) -> int:
    """Bytes of the initialisers as the file declares them."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _onnxscript_rules(model: Any) -> int:
    from onnxscript import rewriter

    before = count(model)
    return int(bool(rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES)(model).modified)) + max(0, before - count(model))


def _own_rules(model: Any) -> int:
    if model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)) < 7:  # before, arithmetic broadcast by attributes
        return 0
    return sum(rule(model) for rule in node_rules.RULES)


def _lift(model: Any) -> int:
    """Constant nodes become weights."""
    import onnx_ir.passes.common as common

    before = count(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    return before - count(model)


def _drop_traces(model: Any) -> int:
    """Stack traces and notes that exporters leave on nodes and values: they hold paths of the exporting machine, and outweigh small graphs."""
    import onnx_ir

    dropped = 0
    for item in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        for owner in (item, *item.outputs):
            for key in [k for k in owner.metadata_props if k.startswith(TRACES)]:
                del owner.metadata_props[key]
                dropped += 1
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        for key in [k for k in value.metadata_props if k.startswith(TRACES)]:
            del value.metadata_props[key]
            dropped += 1
    return dropped


KINDS = (
    _Kind("lift-constants", _lift),
    _Kind("fold-constants", _fold),
    _Kind("merge-and-drop", _onnxscript_rules),
    _Kind("fold-scales", _own_rules),
    _Kind("drop-unused", _passes("RemoveUnusedNodesPass", "RemoveUnusedFunctionsPass", "RemoveUnusedOpsetsPass")),
    _Kind("merge-duplicates", _passes("DeduplicateInitializersPass", "CommonSubexpressionEliminationPass")),
    _Kind("drop-traces", _drop_traces),
    _Kind("fix-names", _passes("OutputFixPass", "NameFixPass"), again=False),
)
"""The steps, in order. onnx_ir's shape inference and identity removal are not among them: folding does both."""
