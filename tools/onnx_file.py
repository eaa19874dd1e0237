"""An ONNX file whose own nodes are tidied, without a detour through torch: what `clean-onnx` gives for an .onnx model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ..backends.onnx.agreement import Agreement, agreement
from ..backends.onnx.export import EXTERNAL_BYTES, Exported
from ..backends.onnx.tidy import Tidied, tidy, weight_bytes
from ..ir.errors import PromiseBroken, UsageError
from ..ir.files import check_writable, replacing
from ..ir.onnx.model import OnnxFile, read_onnx
from ..passes.pipeline import Outcome, Record
from ..passes.recipe import Recipe
from ..passes.rewrite import Declined
from .optimize import Result, capture


class TidiedFile(Result):
    """A file, what was done to its nodes, and ways out. Its graph is imported only when asked for, which not every file allows."""

    def __init__(self, name: str, file: OnnxFile, tidied: Tidied, recipe: Recipe) -> None:
        self.name, self.file, self.tidied, self.recipe = name, file, tidied, recipe
        self.inputs, self.calibration = [], None
        self.notes = [*file.remarks, *_notes(file, tidied)]

    @functools.cached_property
    def outcome(self) -> Outcome:  # type: ignore[override]
        """The file's graph, in canonical form. Raises CaptureError where it can't be imported."""
        graph = capture(self.file.path)
        return Outcome(graph, graph, self.records, (), [])

    @property
    def records(self) -> list[Record]:
        """One a step: changes as `matched` and `applied`, the change of the number of nodes under `predicted`; a step left out is declined."""
        measured = self.tidied.agreement.as_dict()
        return [
            Record(
                s.name,
                {},
                True,
                s.changes + bool(s.undone),
                s.changes,
                [Declined("", self.file.path.name, s.undone)] if s.undone else [],
                {"nodes": s.nodes},
                measured,
                s.seconds,
            )
            for s in self.tidied.steps
        ]

    @property
    def verification(self) -> dict[str, Any]:
        """The tidied model against the file, both in onnxruntime."""
        return self.tidied.agreement.as_dict()

    def export(self, path: str | Path, profile: str = "ort", opset: int | None = None) -> Exported:
        """Write the tidied model. Weights that lay beside the file lie beside the new one; the opset, names and metadata are the file's.

        Raises UsageError for another opset, InputFileError if the file was changed since it was read.
        """
        import onnx_ir

        path, model = Path(path), self.tidied.model
        version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        if opset not in (None, version):
            raise UsageError(f"a tidied file keeps its opset, {version}; a recipe with passes writes another (its graph goes through torch)")
        check_writable(path)
        self.file.unchanged()
        values = self.file.model.graph.initializers.values()
        outside = any(isinstance(v.const_value, onnx_ir.ExternalTensor) for v in values) or weight_bytes(model) > EXTERNAL_BYTES
        data = f"{path.name}.data"
        with replacing(path, data) as temporary:
            onnx_ir.save(model, temporary, external_data=data if outside else None)
            self._check(temporary)
            size = sum(f.stat().st_size for f in (temporary, temporary.parent / data) if f.exists())
        return Exported(path, size, self.tidied.after, version, "ort", None)

    def _check(self, written: Path) -> None:
        """What stands in the new file, as it will be read again."""
        found: Agreement = agreement(None, None, self.file.path, written)
        if found.why_not is not None:
            raise PromiseBroken(f"the file written does not give what {self.file.path} gives: {found.why_not}; nothing was changed")


def tidied_file(path: str | Path, recipe: Recipe) -> TidiedFile:
    """Read, tidy and compare an ONNX file. Raises InputFileError."""
    file = read_onnx(Path(path))
    return TidiedFile(str(path), file, tidy(file.model, file.path), recipe)


def _notes(file: OnnxFile, done: Tidied) -> list[str]:
    notes = []
    if done.why_not is not None:
        notes.append(f"the file is as it was: {done.why_not}")
    elif not any(s.changes for s in done.steps if s.name != "fix-names"):
        notes.append("nothing applied: the nodes are as they were")
    weights, inputs = file.model.graph.initializers, {v.name for v in file.model.graph.inputs}
    if free := [name for name in weights if name in inputs]:
        notes.append(f"{len(free)} weights are inputs too: a caller may give others, so nothing was computed with them")
    return notes
