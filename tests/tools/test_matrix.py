"""The capture matrix: CI's subset passes every question, and wrong models, graphs and packages are answered in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from rewright.ir.errors import UsageError
from rewright.ir.graph import Graph
from rewright.tools import cli, matrix
from rewright.tools.architectures import ARCHITECTURES, Architecture, find_architectures
from rewright.tools.matrix import COLUMNS, Row, judge, payload
from rewright.tools.present_matrix import text

torch.set_num_threads(1)


def check(row: Row) -> None:
    assert row.sentences == []
    assert [c for c in COLUMNS if row.cells[c].ok is not True and c != "blocks"] == []


@pytest.mark.parametrize("name", [a.name for a in find_architectures(fast=True)])
def test_the_fast_subset_passes_every_question(name: str) -> None:
    [architecture] = find_architectures([name])
    row = judge(architecture)
    check(row)
    if architecture.declares is not None:
        assert row.cells["blocks"].ok is True


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES])
def test_every_architecture_passes_every_question(name: str) -> None:
    [architecture] = find_architectures([name])
    row = judge(architecture)
    if row.cells["captured"].why.endswith("`make matrix` installs it"):
        pytest.skip(row.cells["captured"].why)
    check(row)


def test_there_are_many_architectures_each_tried_at_three_shapes_with_batch_1_among_them() -> None:
    assert len(ARCHITECTURES) >= 50
    assert len({a.name for a in ARCHITECTURES}) == len(ARCHITECTURES)
    assert all(len(a.shapes) == 3 and 1 in {b for b, _ in a.shapes} and a.shapes[0][0] > 1 for a in ARCHITECTURES)
    assert len({a.family for a in ARCHITECTURES}) == 9


def test_the_same_name_builds_the_same_weights() -> None:
    [bert] = find_architectures(["bert"])
    a, b = bert.build(), bert.build()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not any(p.abs().max() < 1e-3 for p in a.parameters()), "a weight at zero hides its layer"


# -- wrong answers ----------------------------------------------------------------------------------------------------


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Branches(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else self.layer(x)


class _FixedBatch(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


def _architecture(make: Callable[[], nn.Module]) -> Architecture:
    return Architecture("small", "encoder", "torch", make, lambda model, b, size: {"x": torch.randn(b, 8)})


def _answers(row: Row) -> list[bool | None]:
    return [row.cells[c].ok for c in COLUMNS]


def test_a_plain_model_passes() -> None:
    assert _answers(judge(_architecture(_Linear))) == [True] * 6 + [None]


def test_a_model_that_branches_on_values_is_answered_in_a_sentence_and_nothing_more_is_asked() -> None:
    row = judge(_architecture(_Branches))
    assert _answers(row) == [False] + [None] * 6
    assert "control flow depends on tensor values" in row.sentences[0]


def test_a_batch_that_the_trace_fixed_is_no_capture() -> None:
    assert judge(_architecture(_FixedBatch)).sentences == ["captured: x axis 0 (batch) is static: the model fixes it to 2"]


def test_a_missing_package_is_answered_with_the_way_to_get_it() -> None:
    def make() -> nn.Module:
        raise ImportError("No module named 'timm'")

    assert judge(_architecture(make)).sentences == ["captured: small needs torch: `make matrix` installs it"]


def test_a_graph_of_other_weights_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = matrix.capture
    monkeypatch.setattr(matrix, "capture", lambda model, *rest: capture(_Linear(), *rest))
    row = judge(_architecture(_Linear))
    assert "captured: relative error" in row.sentences[0]


def _shifted(graph: Graph) -> Graph:
    with torch.no_grad():
        for weight in graph.weights().values():
            weight.mul_(1.001)
    return graph


@pytest.mark.parametrize(("column", "place"), [("saved", "load_graph"), ("exported", "Session")])
def test_a_wrong_file_is_found(monkeypatch: pytest.MonkeyPatch, column: str, place: str) -> None:
    honest = getattr(matrix, place)

    def wrong(path: Path) -> object:
        made = honest(path)
        if isinstance(made, Graph):
            return _shifted(made)
        return lambda flat: tuple(x * 1.001 for x in made(flat))

    monkeypatch.setattr(matrix, place, wrong)
    row = judge(_architecture(_Linear))
    assert [s.split(":")[0] for s in row.sentences] == [column]
    assert "relative error" in row.sentences[0]


def test_a_weight_that_gets_no_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weights_of = matrix._weights_of
    monkeypatch.setattr(matrix, "_weights_of", lambda graph, original: {n: w.detach() if "bias" in n else w for n, w in weights_of(graph, original).items()})
    assert judge(_architecture(_Linear)).sentences == ["gradients: layer.bias gets no gradient in the result"]


# -- the surfaces -----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no architecture or family 'lama'. Did you mean 'llama'"):
        find_architectures(["lama"])


def test_the_matrix_as_json_and_as_text_holds_rows_sentences_and_versions(tmp_path: Path) -> None:
    rows = [judge(_architecture(_Linear)), judge(_architecture(_Branches))]
    matrix.write(rows, tmp_path / "matrix.json")
    held = json.loads((tmp_path / "matrix.json").read_text())
    assert held == json.loads(json.dumps(payload(rows)))
    assert held["passed"]["captured"] == "1 of 2"
    assert held["versions"]["torch"] == torch.__version__.split("+")[0] or held["versions"]["torch"] == torch.__version__
    written = (tmp_path / "matrix.txt").read_text()
    assert written == text(rows)
    assert "control flow depends on tensor values" in written and "1 of 2" in written


def test_the_command_prints_json_and_exits_with_4_when_an_answer_is_no(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.tools.architectures.ARCHITECTURES", (_architecture(_Branches),))
    with pytest.raises(SystemExit) as exit:
        cli.main(["matrix", "--json"])
    assert exit.value.code == 4
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["cells"]["captured"]["ok"] is False and printed["error"]["code"] == "promise-broken"
