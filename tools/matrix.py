"""The capture matrix: every architecture through capture, canonical form, save, ONNX, re-export and gradients, against eager."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backends.onnx.session import Session
from ..ir.capture import capture
from ..ir.errors import CaptureError, PromiseBroken, RewrightError
from ..ir.files import check_writable
from ..ir.graph import Graph, quiet
from ..ir.save import load_graph, save_graph
from ..ir.verify import Drift, drift, padding_mask, tolerance
from ..passes.recipe import Recipe
from .architectures import Architecture
from .declared import differences
from .example_inputs import Inputs
from .optimize import Result, optimize

MAX_ONNX_ERROR = 1e-4
"""Relative error allowed to onnxruntime, which sums in another order; found are 1e-7 to 2e-5."""


@dataclass(frozen=True)
class Cell:
    """The answer to one question about one architecture."""

    ok: bool | None
    """None: not asked, because an earlier answer was no, or nothing is declared."""
    said: str
    """"exact", an error such as "2e-07", a count, "no" or "-"."""
    why: str = ""
    """One sentence when the answer is no."""


@dataclass
class Row:
    """All answers for one architecture."""

    name: str
    family: str
    package: str
    parameters: int = 0
    cells: dict[str, Cell] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """No answer is no."""
        return all(c.ok is not False for c in self.cells.values())

    @property
    def sentences(self) -> list[str]:
        """What went wrong, a sentence a question."""
        return [f"{column}: {c.why}" for column, c in self.cells.items() if c.ok is False]


def run_matrix(architectures: Iterable[Architecture], progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> list[Row]:
    """A row an architecture. A failure is an answer: it never stops the row's other independent questions, nor other rows."""
    asked = list(architectures)
    rows = []
    for i, architecture in enumerate(asked):
        progress(architecture.name, i, len(asked))
        rows.append(judge(architecture))
    return rows


def judge(architecture: Architecture) -> Row:
    """Ask all questions about one architecture."""
    row = Row(architecture.name, architecture.family, architecture.package)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(architecture, Path(folder))
        for column, ask, needs in _QUESTIONS:
            if any(row.cells[n].ok is not True for n in needs):
                row.cells[column] = Cell(None, "-")
                continue
            try:
                row.cells[column] = ask(trial)
            except RewrightError as error:
                row.cells[column] = Cell(False, "no", str(error))
            except Exception as error:  # whatever torch, onnxruntime or our own code raises is this row's answer
                row.cells[column] = Cell(False, "no", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}")
        if "model" in vars(trial):
            row.parameters = sum(p.numel() for p in trial.model.parameters())
    row.seconds = time.perf_counter() - begin
    return row


class _Trial:
    """One architecture on its way through the questions; what is made for one is there for the next."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture, self.folder = architecture, folder

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.architecture.build()

    @cached_property
    def inputs(self) -> list[Inputs]:
        return [self.architecture.inputs(self.model, b, size) for b, size in self.architecture.shapes]

    @cached_property
    def references(self) -> list[Any]:
        with torch.no_grad():
            return [self.model(**kwargs) for kwargs in self.inputs]

    @cached_property
    def graph(self) -> Graph:
        return capture(self.model, (), self.inputs[0], self.architecture.dynamic)

    @cached_property
    def result(self) -> Result:
        return optimize(self.graph, self.inputs[0], Recipe(()))

    def drift(self, run: Callable[[Inputs], Any]) -> Drift:
        """How far `run(kwargs)` is from eager over all shapes, padding left out; the output's classes must be those of eager."""
        valid, total = padding_mask(self.graph), Drift()
        for kwargs, reference in zip(self.inputs, self.references):
            with torch.no_grad():
                ours = run(kwargs)
            a, b = pytree.tree_structure(reference), pytree.tree_structure(ours)
            if a != b:
                raise PromiseBroken(f"the output is structured as {b} where the original gives {a}")
            mask = valid(self.graph.flat_inputs((), kwargs))
            total = total & drift(_tensors(reference, mask), _tensors(ours, mask))
        return total


def _tensors(output: Any, mask: Tensor | None) -> list[Any]:
    leaves = pytree.tree_leaves(output)
    return [x[mask] if mask is not None and isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == mask.shape else x for x in leaves]


def _captured(trial: _Trial) -> Cell:
    """torch.export took it; the graph gives eager's numbers at every shape, and the axes asked to be dynamic are."""
    graph = trial.graph
    if fixed := [n for n in graph.notes if "is static" in n]:
        raise CaptureError(fixed[0])
    return _equal(trial.drift(lambda kwargs: graph(**kwargs)), tolerance(graph))


def _canonical(trial: _Trial) -> Cell:
    """The canonical form stands, no pass had to be undone, and the numbers are still eager's."""
    result = trial.result
    if undone := result.outcome.undone:
        raise PromiseBroken(f"{undone[0].name} was undone: {undone[0].undone}")
    return _equal(trial.drift(lambda kwargs: result.module(**kwargs)), tolerance(trial.graph))


def _saved(trial: _Trial) -> Cell:
    """Saved and loaded, the graph still gives eager's numbers."""
    folder = trial.folder / "saved"
    folder.mkdir()
    save_graph(trial.result.graph, folder)
    loaded = load_graph(folder)
    return _equal(trial.drift(lambda kwargs: loaded(**kwargs)), tolerance(trial.graph))


def _exported(trial: _Trial) -> Cell:
    """Written as ONNX, onnxruntime gives eager's numbers at every shape."""
    path = trial.folder / "model.onnx"
    written = trial.result.export(path)
    session = Session(path)
    graph = trial.result.graph
    is_tensor = [isinstance(x, torch.fx.Node) for x in graph.output.args[0]]  # type: ignore[union-attr]

    def run(kwargs: Inputs) -> Any:
        outputs = iter(session(graph.flat_inputs((), kwargs)))
        constants: Any = graph.output.args[0]
        return graph.call.unflatten(tuple(next(outputs) if dynamic else constant for dynamic, constant in zip(is_tensor, constants)))

    return _equal(trial.drift(run), MAX_ONNX_ERROR, f" ({written.opset})" if written.opset != 20 else "")


def _reexported(trial: _Trial) -> Cell:
    """torch.export takes the resulting module again; its .pt2 file, read back, gives the same numbers at every shape."""
    path = trial.result.export_pt2(trial.folder / "model.pt2")
    with quiet():
        again = torch.export.load(path).module(check_guards=False)
    return _equal(trial.drift(lambda kwargs: again(**kwargs)), tolerance(trial.graph))


def _gradients(trial: _Trial) -> Cell:
    """Every parameter of the original gets the gradient it gets in eager; through its recipe where a weight was made of others."""
    module, graph = trial.result.module, trial.result.graph
    kwargs = trial.inputs[0]
    parameters = dict(trial.model.named_parameters())
    weights = _weights_of(graph, {**trial.graph.weights(), **dict(trial.model.named_parameters(remove_duplicate=False))})
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad and parameters.get(n, p).requires_grad]
    if frozen:
        raise PromiseBroken(f"{frozen[0]} of the result does not ask for a gradient")
    trainable = {n: p for n, p in parameters.items() if p.requires_grad}
    expected = _gradient(trial.model(**kwargs), trainable)
    found = _gradient(torch.func.functional_call(module, weights, (), kwargs), trainable)
    total = Drift()
    for name, gradient in expected.items():
        if gradient.abs().max() > 0 and not found[name].abs().max() > 0:
            raise PromiseBroken(f"{name} gets no gradient in the result")
        scale = max(g.abs().max().item() for g in (gradient, found[name]))
        if scale > 1e-6 * max(1.0, *(g.abs().max().item() for g in expected.values())):  # a bias under a softmax has a zero gradient, in rounding noise
            total = total & drift([gradient], [found[name]])
    return _equal(total, 30 * tolerance(graph), f" ({len(expected)})" if not total.bit_equal else "")


def _weights_of(graph: Graph, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The result's weights as functions of the original's parameters."""
    own = graph.weights()
    made: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name not in made:
            recipe = graph.recipes.get(name)
            made[name] = recipe.function(*(value(s) for s in recipe.sources)) if recipe else original[name]
        return made[name]

    return {name: value(name) if name in original or name in graph.recipes else tensor for name, tensor in own.items()}


def _gradient(output: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed random projection of all float outputs, so that no two of their errors cancel."""
    generator = torch.Generator().manual_seed(0)
    floats = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
    loss = sum(((x * torch.randn(x.shape, generator=generator)).sum() for x in floats), torch.zeros(()))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found)}


def _blocks(trial: _Trial) -> Cell:
    """`ir.blocks` finds what the config declares."""
    declares = trial.architecture.declares
    if declares is None:
        return Cell(None, "-")
    declared = declares(trial.model)
    wrong = differences(declared, trial.result.graph)
    if wrong:
        raise PromiseBroken("; ".join(wrong))
    return Cell(True, f"{declared.attention}+{declared.ffn}")


def _equal(found: Drift, allowed: float, more: str = "") -> Cell:
    if found.bit_equal:
        return Cell(True, f"exact{more}")
    if found.relative_error > allowed:
        raise PromiseBroken(f"relative error {found.relative_error:.1e}, allowed are {allowed:.1e}")
    return Cell(True, f"{found.relative_error:.0e}{more}")


_QUESTIONS: tuple[tuple[str, Callable[[_Trial], Cell], tuple[str, ...]], ...] = (
    ("captured", _captured, ()),
    ("canonical", _canonical, ("captured",)),
    ("saved", _saved, ("canonical",)),
    ("exported", _exported, ("canonical",)),
    ("re-exported", _reexported, ("canonical",)),
    ("gradients", _gradients, ("canonical",)),
    ("blocks", _blocks, ("canonical",)),
)
"""Column, its question, and the columns that must have been answered with yes."""

COLUMNS = tuple(name for name, _, _ in _QUESTIONS)


def payload(rows: Sequence[Row]) -> dict[str, Any]:
    """The matrix as plain data, with the versions and the machine it holds for."""
    packages = ("torch", "transformers", "timm", "diffusers", "onnx", "onnxscript", "onnxruntime")
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "passed": counts(rows),
        "rows": [{**asdict(r), "ok": r.ok} for r in rows],
        "seconds": sum(r.seconds for r in rows),
    }


def counts(rows: Sequence[Row]) -> dict[str, str]:
    """Column -> "yes of asked". What was not asked because the capture failed counts as no; blocks nobody declared don't count."""
    found = {}
    for column in COLUMNS:
        cells = [r.cells[column] for r in rows]
        asked = [c for c in cells if c.ok is not None or column != "blocks"]
        found[column] = f"{sum(c.ok is True for c in cells)} of {len(asked)}"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(rows: Sequence[Row], path: Path) -> None:
    """The JSON to `path`, the table beside it as .txt. Raises ResourceError when they can't be written."""
    from .present_matrix import text

    check_writable(path)
    path.write_text(json.dumps(payload(rows), indent=1) + "\n", encoding="utf8")
    path.with_suffix(".txt").write_text(text(rows), encoding="utf8")
