"""finetune as a step of a recipe: judged behind the training, resumed where it was, not run in a dry run, undone in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewright as rw
from rewright.ir.capture import capture
from rewright.ir.errors import Interrupted
from rewright.ir.graph import Graph
from rewright.passes.pipeline import Budget, Outcome, Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.recipe import Recipe
from rewright.passes.rewrite import Context, GraphPass, Recovered
from rewright.passes.shiftadd.shift_add_attention import ShiftAddAttention
from rewright.passes.statistics import Calibration
from rewright.passes.training.finetune import Finetune
from rewright.tools import training
from rewright.tools.finetune import finetune
from rewright.tools.models import Loaded
from rewright.tools.optimize import Result, optimize, plan
from rewright.tools.stages import checkpoints, remove_checkpoints

from ..encoder import encoder, example

torch.set_num_threads(1)


def batch(seed: int) -> dict[str, Tensor]:
    return {**example(), "input_ids": torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(seed))}


BATCHES = [batch(seed) for seed in range(1, 9)]


@dataclass(frozen=True)
class Disturb(GraphPass):
    """Multiplies the output's channels by other numbers: lossy."""

    by: float = 1.0
    name = "disturb"
    exact = False

    def run(self, graph: Graph, context: Context) -> Graph:
        out: Any = graph.output.args[0]
        new = graph.insert(torch.ops.aten.mul.Tensor, out[0], graph.add_constant("shift", disturbance(self.by)), before=graph.output)
        graph.output.update_arg(0, (new, *out[1:]))
        context.apply(new)
        return graph


@dataclass(frozen=True)
class Harmless(Disturb):
    """Multiplies the output by ones: exact."""

    by: float = 0.0
    name = "harmless"
    exact = True


def disturbance(by: float) -> Tensor:
    return 1 + by * torch.linspace(-1, 1, 64)


FIRST = Finetune(steps=12, rate=0.05, warm_up=2, judgings=3, trainable="rewritten", precision="fp32")
STAGES = (Disturb(0.5), FIRST, Disturb(-0.4), Finetune(steps=8, rate=0.05, warm_up=2, judgings=2, trainable="rewritten", precision="fp32"))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return rw.capture(encoder(), (), example())


def run(graph: Graph, *passes: Any, **options: Any) -> Result:
    return optimize(graph, example(), Recipe(passes, budget=options.pop("budget", Budget())), calibration=BATCHES, **options)


def equal(a: Graph, b: Graph) -> bool:
    ours, theirs = a.weights(), b.weights()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# -- what it does -------------------------------------------------------------------------------------------------------


def test_the_record_holds_the_curve_and_the_notes_what_came_back(graph: Graph, tmp_path: Path) -> None:
    before = {n: t.detach().clone() for n, t in graph.weights().items()}
    found = run(graph, *STAGES[:2])
    untrained, record = found.records[-2:]
    curve = record.details["curve"]
    assert [row["step"] for row in curve] == [0, 4, 8, 12] and curve[-1]["drift"] < 0.7 * curve[0]["drift"]
    assert record.details["data"] == "6 batches, 2 more held out" and record.details["terms"] == ("mse of values",)
    assert record.measured["cosine"] > untrained.measured["cosine"] and untrained.details == {}
    assert record.matched == record.applied == 1 and record.layers == ["shift"]
    assert [n for n in found.graph.notes if n.startswith("finetune: ")] == [f"finetune: {record.details['sentence']}"]
    assert "% of the loss came back" in record.details["sentence"]
    assert all(torch.equal(graph.weight(n), t) for n, t in before.items()), "the original is not written into"
    saved = json.loads((found.save(tmp_path / "out") / "manifest.json").read_text())
    assert saved["passes"][-1]["details"]["curve"] == curve


def test_it_learns_from_the_original_what_the_tool_learns(graph: Graph) -> None:
    found = run(graph, *STAGES[:2])
    untrained = optimize(graph, example(), [Disturb(0.5)], calibration=BATCHES)
    by_hand = finetune(untrained, graph, BATCHES, steps=12, rate=0.05, warm_up=2, judgings=3, trainable="rewritten", precision="fp32")
    assert equal(found.graph, by_hand.graph)


class Viewed(Disturb):
    """Ends in a call that a canonical graph does not have."""

    name = "viewed"

    def run(self, graph: Graph, context: Context) -> Graph:
        graph = super().run(graph, context)
        out: Any = graph.output.args[0]
        turned = graph.insert(torch.ops.aten.transpose.int, out[0], 1, 2, before=graph.output)
        graph.output.update_arg(0, (graph.insert(torch.ops.aten.transpose.int, turned, 1, 2, before=graph.output), *out[1:]))
        return graph


def test_the_calls_stay_as_the_passes_before_left_them() -> None:
    found = run(capture(encoder(), (), example()), Viewed(0.5), Finetune(steps=2, rate=0.05, warm_up=0, judgings=1, trainable="rewritten", precision="fp32"))
    assert found.records[-1].applied == 1 and len(found.graph.find(torch.ops.aten.transpose.int)) == 2


def test_options_go_from_a_recipe_to_the_training() -> None:
    text = '[[pass]]\nname = "finetune"\nsteps = 3\nrate = 0.5\nhidden = 2.0\ntrainable = ["a", "b.c"]\nloss = "mse"\n'
    step = Recipe.parse(text).passes[0]
    assert Recipe.parse(Recipe.parse(text).to_toml()).passes == (step,)
    given: dict[str, Any] = {}

    def learn(graph: Graph, options: Mapping[str, Any]) -> Recovered:
        given.update(options)
        return Recovered(graph, "nothing came back")

    step.run(rw.capture(encoder(), (), example()), Context(finetune=learn))
    assert {k: given[k] for k in ("steps", "minutes", "rate", "hidden", "trainable", "loss")} == {
        "steps": 3,
        "minutes": None,
        "rate": 0.5,
        "hidden": 2.0,
        "trainable": ("a", "b.c"),
        "loss": "mse",
    }
    for wrong, why in (
        ("steps = 0", "ends after steps or minutes above 0"),
        ("rate = 0", "a rate above 0"),
        ('loss = "huber"', "loss"),
        ("epochs = 1", "epochs"),
    ):
        with pytest.raises(rw.RecipeError, match=why):
            Recipe.parse(f'[[pass]]\nname = "finetune"\n{wrong}\n')


def test_statistics_of_passes_behind_a_training_are_gathered_behind_it(graph: Graph, monkeypatch: Any) -> None:
    asked: list[set[str]] = []
    real = Calibration.gather

    def gather(self: Calibration, graph: Graph, requests: Any) -> Any:
        asked.append({r.value for r in requests})
        return real(self, graph, requests)

    monkeypatch.setattr(Calibration, "gather", gather)
    passes = [ShiftAddAttention(only=("layers.0",)), ShiftAddAttention(only=("layers.1",)), Finetune(steps=1, rate=1e-5), QuantizeLinear(algorithm="gptq")]
    run(graph, *passes)
    assert [len(a) for a in asked] == [2, 1, 8]


def test_batches_may_come_one_by_one(graph: Graph) -> None:
    found = optimize(graph, example(), STAGES[:2], calibration=iter(BATCHES))
    assert found.records[-1].details["data"] == "6 batches, 2 more held out"


def test_a_metric_of_the_users_is_in_the_curve(graph: Graph) -> None:
    found = run(graph, Disturb(0.5), Finetune(steps=1, judgings=1, precision="fp32"), metric=lambda module: 7.0)
    assert [row["metric"] for row in found.records[-1].details["curve"]] == [7.0, 7.0]


def test_new_weights_of_a_rewrite_are_trained_alone_if_asked(graph: Graph) -> None:
    found = run(graph, ShiftAddAttention(only=("layers.0",)), Finetune(steps=2, rate=1e-5, trainable="rewritten", warm_up=0, precision="fp32"))
    assert found.records[-1].matched == 2 and found.records[-1].details["weights"][0] == 4 * 16 * 9 + 4
    assert torch.equal(found.graph.weight("layers.0.q.weight"), graph.weight("layers.0.q.weight"))


# -- interrupted --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


def stopped(patch: pytest.MonkeyPatch, step: int, by: type[BaseException], go: Callable[[], Any], match: str | None = None) -> None:
    """A run that ends at that step."""
    with patch.context() as inner:
        killed_at(inner, step, Killed if by is Killed else KeyboardInterrupt)
        with pytest.raises(by, match=match):
            go()


def killed_at(patch: pytest.MonkeyPatch, step: int, by: type[BaseException] = Killed) -> list[int]:
    """Training stops at that step, counted over all stages; the steps that were taken so far."""
    taken: list[int] = []
    real = training._Run.take_step

    def take(self: Any, share: float) -> None:
        if len(taken) >= step:
            raise by
        taken.append(self.step)
        real(self, share)

    patch.setattr(training._Run, "take_step", take)
    return taken


@pytest.mark.parametrize("step", [6, 17])
def test_a_killed_run_goes_on_to_the_same_weights_from_whatever_stage_it_was_in(graph: Graph, step: int, tmp_path: Path, monkeypatch: Any) -> None:
    whole = run(graph, *STAGES)
    assert [r.applied > 0 for r in whole.records[-4:]] == [True] * 4
    stopped(monkeypatch, step, Killed, lambda: run(graph, *STAGES, checkpoint=tmp_path / "out.checkpoint"))
    assert [f.name for f in checkpoints(tmp_path / "out.checkpoint")] == ["out.checkpoint-1", "out.checkpoint-2"][: 1 + (step > 12)]
    with monkeypatch.context() as patch:
        taken = killed_at(patch, 99)
        rest = run(graph, *STAGES, checkpoint=tmp_path / "out.checkpoint")
    assert taken == ([*range(4, 12), *range(8)] if step == 6 else [*range(4, 8)]), "from the last judging on; a finished stage takes no step"
    assert equal(rest.graph, whole.graph)
    assert [r.details.get("resumed_at") for r in rest.records[-3::2]] == ([4, None] if step == 6 else [12, 4])
    remove_checkpoints(tmp_path / "out.checkpoint")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_says_what_goes_on_from_where(graph: Graph, tmp_path: Path, monkeypatch: Any) -> None:
    def go() -> Result:
        return run(graph, *STAGES, checkpoint=tmp_path / "out.checkpoint")

    stopped(monkeypatch, 2, Interrupted, go, "out.checkpoint-1 holds the fine-tuning up to its last judging, and the same command goes on")
    stopped(monkeypatch, 13, Interrupted, go, "out.checkpoint-1 to out.checkpoint-2 hold the stages so far")
    stopped(monkeypatch, 2, KeyboardInterrupt, lambda: run(graph, *STAGES))


def test_a_checkpoint_of_another_recipe_is_refused_and_nothing_is_undone_in_silence(graph: Graph, tmp_path: Path) -> None:
    run(graph, STAGES[0], Finetune(steps=2, precision="fp32"), checkpoint=tmp_path / "c")
    with pytest.raises(rw.UsageError, match="is of a run with steps 2, this one has 12"):
        run(graph, *STAGES[:2], checkpoint=tmp_path / "c")


def test_other_files_beside_the_checkpoints_stay(tmp_path: Path) -> None:
    for name in ("c-1", "c-10", "c-2", "c-x", "cc-1", "c"):
        (tmp_path / name).touch()
    assert [f.name for f in checkpoints(tmp_path / "c")] == ["c-1", "c-2", "c-10"]
    remove_checkpoints(tmp_path / "c")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c", "c-x", "cc-1"]
    assert checkpoints(tmp_path / "nowhere" / "c") == []


# -- not trained --------------------------------------------------------------------------------------------------------


def test_a_dry_run_does_not_train(graph: Graph, monkeypatch: Any) -> None:
    taken = killed_at(monkeypatch, 0)
    recipe = Recipe(STAGES, require_match=frozenset({"disturb", "finetune"}))
    found = plan(Loaded("encoder", graph, [graph.flat_inputs((), b) for b in (example(), *BATCHES)]), None, recipe)
    assert [(r.name, r.applied) for r in found.records[-4:]] == [("disturb", 1), ("finetune", 0)] * 2
    assert [[d.why for d in r.declined] for r in found.records[-3::2]] == [["a dry run does not train"]] * 2
    assert taken == []


def test_without_data_it_says_what_to_give(graph: Graph) -> None:
    with pytest.raises(rw.UsageError, match="the recipe fine-tunes and there is no data to learn from; give some: --calibration FILE"):
        optimize(graph, example(), [FIRST])
    with pytest.raises(rw.UsageError, match="there is one batch to learn from"):
        optimize(graph, example(), STAGES, calibration=BATCHES[:1])
    with pytest.raises(rw.UsageError, match="finetune needs the original and data to learn from"):
        Pipeline([FIRST]).run(graph, [graph.flat_inputs((), example())])


def test_what_the_user_wants_left_alone_is_not_trained(graph: Graph) -> None:
    with pytest.raises(rw.UsageError, match='layers.1 is to be left alone, and trainable = "all" trains it too; give trainable = "rewritten"'):
        run(graph, Disturb(0.5), Finetune(steps=1), ignore=["layers.1"])
    found = run(graph, Disturb(0.5), Finetune(steps=1, trainable="rewritten"), ignore=["layers.1"])
    assert torch.equal(found.graph.weight("layers.1.up.weight"), graph.weight("layers.1.up.weight"))


def test_bisect_does_not_train_again(graph: Graph) -> None:
    with pytest.raises(rw.UsageError, match="finetune would train again at every step"):
        rw.bisect(run(graph, STAGES[0], Finetune(steps=1, precision="fp32")))


# -- the budget ---------------------------------------------------------------------------------------------------------


def learns(by: float, better: bool = True) -> Callable[[Graph, Mapping[str, Any]], Recovered]:
    """A training that leaves the last disturbance so large."""

    def learn(graph: Graph, options: Mapping[str, Any]) -> Recovered:
        twin = graph.clone()
        name = [n for n in twin.weights() if n.startswith("shift")][-1]
        if better:
            twin.module._parameters[name] = torch.nn.Parameter(disturbance(by))
        return Recovered(twin, f"left {by:g}", 1, (name,) if better else (), {"curve": [by]})

    return learn


def judged(graph: Graph, *passes: Any, learn: Any, least: float = 0.99) -> Outcome:
    return Pipeline(passes, budget=Budget(min_cosine=least), finetune=learn).run(graph, [graph.flat_inputs((), example())])


def fates(outcome: Outcome) -> list[tuple[str, int, str | None]]:
    return [(r.name, r.applied, r.undone) for r in outcome.records if not r.canonical]


def test_the_budget_is_judged_behind_the_training(graph: Graph) -> None:
    alone = judged(graph, Disturb(3.0), learn=None)
    assert alone.records[-1].undone is not None and alone.records[-1].undone.startswith("cosine ")
    found = judged(graph, Disturb(3.0), Finetune(), learn=learns(0.01))
    assert fates(found) == [("disturb", 1, None), ("finetune", 1, None)]
    assert found.records[-2].measured["cosine"] < 0.9 < 0.999 < found.records[-1].measured["cosine"]
    assert "finetune: left 0.01" in found.graph.notes


def test_a_stage_that_breaks_the_budget_is_undone_as_a_whole_and_says_so(graph: Graph) -> None:
    passes = (Harmless(), Disturb(3.0), Harmless(), Finetune(), Disturb(0.001))
    found = judged(graph, *passes, learn=learns(2.0))
    (_, _, kept), (_, _, lossy), (_, _, exact), (_, _, trained), (_, _, after) = fates(found)
    assert kept is None and after is None
    assert trained is not None and trained.startswith("cosine ") and trained.endswith("against a budget of 0.99")
    assert lossy == exact == f"undone with its stage, behind finetune: {trained}"
    assert [n for _, n, _ in fates(found)] == [1, 0, 0, 0, 1] and found.records[-2].details == {"curve": [2.0]}
    assert len(found.graph.find(torch.ops.aten.mul.Tensor)) == 2 and found.total is not None and found.total.cosine > 0.99999
    assert not any(note.startswith("finetune") for note in found.graph.notes)


class Nothing(GraphPass):
    """Finds nothing to do."""

    name = "nothing"

    def run(self, graph: Graph, context: Context) -> Graph:
        return graph


def test_behind_an_undone_stage_passes_are_measured_against_the_program_before_it(graph: Graph) -> None:
    found = judged(graph, Disturb(3.0), Finetune(), Nothing(), Harmless(), learn=learns(2.0))
    nothing, harmless = found.records[-2:]
    assert nothing.measured["bit_equal"] and nothing.predicted == {}
    assert harmless.undone is None and harmless.measured["step_error"] == 0


def test_no_layer_is_left_out_by_training_again(graph: Graph) -> None:
    trainings = []

    def learn(graph: Graph, options: Mapping[str, Any]) -> Recovered:
        trainings.append(options)
        return dataclasses.replace(learns(2.0)(graph, options), trained=2, better=("layers.0.up.weight", "layers.1.up.weight"))

    found = judged(graph, Disturb(3.0), Finetune(), learn=learn)
    assert len(trainings) == 1 and len(found.undone) == 2


def test_a_training_without_gain_is_judged_too(graph: Graph) -> None:
    found = judged(graph, Disturb(3.0), Finetune(), learn=learns(0, better=False))
    assert [undone is not None for _, _, undone in fates(found)] == [True, True]
    good = judged(graph, Disturb(0.01), Finetune(), learn=learns(0, better=False))
    assert fates(good) == [("disturb", 1, None), ("finetune", 0, None)]


def test_of_trainings_in_a_row_the_last_is_judged_and_a_later_stage_leaves_an_earlier_one_alone(graph: Graph) -> None:
    results = iter([2.0, 0.01])
    found = judged(graph, Disturb(3.0), Finetune(), Finetune(), learn=lambda g, o: learns(next(results))(g, o))
    assert fates(found) == [("disturb", 1, None), ("finetune", 1, None), ("finetune", 1, None)]
    results = iter([0.01, 2.0])
    found = judged(graph, Disturb(3.0), Finetune(), Disturb(3.0), Finetune(), learn=lambda g, o: learns(next(results))(g, o))
    assert [undone is None for _, _, undone in fates(found)] == [True, True, False, False]
    assert found.total is not None and found.total.cosine > 0.99


def test_a_lossy_pass_behind_the_training_is_judged_at_once(graph: Graph) -> None:
    found = judged(graph, Disturb(3.0), Finetune(), Disturb(3.0), learn=learns(0.01))
    assert [undone is None for _, _, undone in fates(found)] == [True, True, False]


def test_a_training_that_fails_takes_its_stage_along(graph: Graph) -> None:
    def fails(graph: Graph, options: Mapping[str, Any]) -> Recovered:
        raise ZeroDivisionError("in the loss")

    found = judged(graph, Disturb(0.001), Finetune(), learn=fails)
    why = "finetune raised ZeroDivisionError: in the loss"
    assert fates(found) == [("disturb", 0, f"undone with its stage, behind finetune: {why}"), ("finetune", 0, why)]


def test_a_real_stage_holds_its_budget_only_with_training(graph: Graph) -> None:
    free = run(graph, *STAGES[:2])
    between = (free.records[-2].measured["cosine"] + free.records[-1].measured["cosine"]) / 2
    held = run(graph, *STAGES[:2], budget=Budget(min_cosine=between))
    assert not held.outcome.undone and equal(held.graph, free.graph)
    above = run(graph, *STAGES[:2], budget=Budget(min_cosine=free.records[-1].measured["cosine"] + 1e-4))
    assert [r.name for r in above.outcome.undone] == ["disturb", "finetune"] and above.verification["bit_equal"]
