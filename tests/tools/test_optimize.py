"""The Python API of DESIGN 7, and the examples as they are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rewright as rw
from rewright.passes.rewrite import Context, GraphPass

from ..passes.encoder import encoder, example

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def texts(seed: int) -> dict[str, torch.Tensor]:
    """Other texts of the example's lengths."""
    return {**example(), "input_ids": torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def result() -> rw.Result:
    return rw.optimize(encoder(), example(), recipe="encoder-int8", calibration=[texts(seed) for seed in (1, 2, 3, 4)])


def test_the_shipped_recipe_runs_and_the_module_keeps_the_calls_signature(result) -> None:
    assert [r.name for r in result.records if not r.canonical] == [
        "gelu-to-silu",
        "outlier-migration",
        "sort-channels",
        "fuse-add-layer-norm",
        "pack-heads",
        "group-heads",
        "group-ffn",
        "quantize-embedding",
        "quantize-linear",
    ]
    assert not result.outcome.undone
    inputs = example()
    assert torch.equal(result.module(**inputs), result.module(inputs["input_ids"], inputs["attention_mask"]))
    assert torch.nn.functional.cosine_similarity(result.module(**inputs), encoder()(**inputs), dim=-1)[inputs["attention_mask"] != 0].mean() > 0.999


def test_a_recipe_that_needs_calibration_data_says_where_to_give_it() -> None:
    with pytest.raises(rw.UsageError, match="needs statistics .* there is no calibration data; give some: .*calibration=batches in rewright.optimize"):
        rw.optimize(encoder(), example(), recipe="encoder-int8")
    with pytest.raises(rw.UsageError, match="outlier-migration needs statistics .* there is no calibration data"):
        rw.explain(rw.capture(encoder(), (), example()), "outlier-migration")
    assert rw.explain(rw.capture(encoder(), (), example()), "outlier-migration", calibration=[texts(1)]).applied


def test_a_saved_result_loads_equal_and_an_altered_one_is_refused(result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    loaded = rw.load(folder)
    assert torch.equal(loaded.module(**example()), result.module(**example()))
    assert [r.name for r in loaded.records] == [r.name for r in result.records]
    result.save(folder)  # over an older result
    with open(folder / "weights.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(rw.InputFileError, match="was changed"):
        rw.load(folder)


def test_api_functions_take_graphs(result) -> None:
    graph = rw.capture(encoder(), (), example())
    assert graph.canonical
    assert rw.verify(graph, result.graph, example()).cosine > 0.99
    assert not rw.diff(graph, result.graph).equal
    assert rw.diff(graph, graph.clone()).equal
    assert sum(seconds for _, seconds, _ in rw.cost(graph, "h200")) > 0
    assert rw.explain(graph, "pack-heads").applied
    culprit = rw.bisect(result)
    assert culprit is not None
    assert culprit.name == "gelu-to-silu", "the first pass that moves the outputs"
    assert culprit.layer.startswith("layers.0")


def test_pipeline_takes_passes_in_python() -> None:
    graph = rw.capture(encoder(), (), example())
    pipe = rw.Pipeline([rw.passes.PackHeads(), rw.passes.QuantizeLinear(min_weights=10_000)])
    outcome = pipe.run(graph, [graph.flat_inputs((), example())])
    assert outcome.records[-1].applied == 0
    assert outcome.records[0].applied == 2


def test_metric_and_its_budget() -> None:
    from rewright.passes.pipeline import Budget
    from rewright.passes.recipe import Recipe

    inputs, want = example(), encoder()(**example())
    metric = lambda module: -float((module(**inputs) - want).abs().max())  # noqa: E731
    strict = Recipe((rw.passes.QuantizeLinear(min_weights=1),), budget=Budget(max_metric_drop=1e-6))
    result = rw.optimize(encoder(), example(), recipe=strict, metric=metric)
    record = result.records[-1]
    assert record.undone is not None
    assert "metric drop" in record.undone
    assert record.measured["metric"] < record.measured["metric_before"]


def test_latency_is_recorded_when_asked() -> None:
    result = rw.optimize(encoder(), example(), recipe=[rw.passes.PackHeads()], latency=lambda graph: float(len(graph.nodes)))
    assert result.records[-1].measured["latency_ms"] == len(result.graph.nodes)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("write_a_pass.py", (), "square-relu: matched 1, applied 1, bit-equal: True"),
        pytest.param("optimize_minilm.py", (".",), "weights 90.9 ->", marks=pytest.mark.slow),
        pytest.param("plant_outliers.py", ("zoo:digits-vit",), "zoo:digits-vit: outliers behind 13 norms", marks=pytest.mark.slow),
        pytest.param("optimize_onnx_file.py", (), "encoder-half-tokens: ", marks=pytest.mark.slow),
        pytest.param("find_outliers.py", ("zoo:stdlib-lm",), "zoo:stdlib-lm: 25 edges, 16384 tokens, 1 run", marks=pytest.mark.slow),
    ],
)
def test_examples_run_as_they_are(name: str, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_a_pass_of_ones_own_fits_on_a_screen() -> None:
    assert len((EXAMPLES / "write_a_pass.py").read_text().splitlines()) < 40


def test_bisect_gives_a_pass_the_statistics_it_requires() -> None:
    @dataclass(frozen=True)
    class Outlying(GraphPass):
        """Scales every linear's weight by a number read off the statistics of its input."""

        name = "outlying"
        exact = False
        requires = frozenset({"absmax"})

        def run(self, graph: rw.Graph, context: Context) -> rw.Graph:
            assert context.statistics is not None
            for node in graph.find(torch.ops.aten.linear.default):
                largest = float(context.statistics[node.args[0]].absmax.max())
                node.args = (node.args[0], graph.add_weight(f"{node.name}_scaled", lambda w, s=1 + largest: w * s, str(node.args[1].target)), *node.args[2:])
                context.apply(node)
            return graph

    result = rw.optimize(encoder(), example(), recipe=[Outlying()], calibration=[example(), example()])
    culprit = rw.bisect(result)
    assert culprit is not None and culprit.name == "outlying"


def test_a_file_judged_on_made_up_inputs_says_so_and_one_with_data_does_not(tmp_path: Path) -> None:
    folder = rw.optimize(encoder(), example(), recipe=[]).save(tmp_path / "out")

    def notes(**given: Any) -> str:
        return " ".join(rw.optimize(folder, recipe=[rw.passes.QuantizeLinear(min_weights=1)], **given).graph.notes)

    assert "judged on random inputs" in notes()
    assert "judged on random inputs" not in notes(calibration=[example()])
    assert "judged on random inputs" not in notes(example_inputs=example())
    assert torch.equal(rw.optimize(folder, recipe=[], calibration=[example()]).inputs[0][0], example()["input_ids"]), "nothing is judged on made-up ones then"
    fixed = rw.optimize(folder, recipe=[], sizes={"sequence": 12})
    assert [tuple(t.shape)[1] for t in fixed.inputs[0]] == [12, 12] and fixed.inputs[0][1].all(), "no padding in what is made up"
