"""Recovery by distillation: the original stays as it is, the student gets better or stays as it was, a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewright as rw
from rewright.passes.cleanup import CANONICAL
from rewright.tools.distillation import Distillation, Term, kl, output_terms, relative_mse
from rewright.tools.finetune import finetune, finetune_folder
from rewright.tools.finetuned import Finetuned
from rewright.tools.training import Training

from ..passes.encoder import encoder, example


class Classifier(nn.Module):
    """Token embedding, a two-layer FFN with a residual, and a head; tied to the embedding if asked."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        else:
            nn.init.normal_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


def ids(seed: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(seed))}


BATCHES = [ids(seed) for seed in range(1, 9)]


def classifier(**options: Any) -> rw.Graph:
    return rw.capture(Classifier(**options).eval(), (), ids(0))


def narrowed(graph: rw.Graph, up: str = "up", down: str = "down", keep: int = 16) -> rw.Graph:
    """The FFN with its first `keep` hidden channels only."""
    twin = graph.clone()
    for name, cut in (
        (f"{up}.weight", lambda w: w[:keep].clone()),
        (f"{up}.bias", lambda b: b[:keep].clone()),
        (f"{down}.weight", lambda w: w[:, :keep].clone()),
    ):
        old = next(n for n in twin.fx.nodes if n.op == "get_attr" and n.target == name)
        old.replace_all_uses_with(twin.add_weight(f"{name}_kept", cut, name, like=old))
    twin.propagate()
    twin.clean()
    return twin


def values(graph: rw.Graph) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in graph.weights().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(student: Any, teacher: Any, batches: Any = BATCHES, **options: Any) -> Finetuned:
    return finetune(student, teacher, batches, **{"steps": 20, "rate": 1e-2, "warm_up": 2, "judgings": 4, "precision": "fp32", **options})


def test_drift_falls_and_neither_the_original_nor_the_students_clones_are_written_into() -> None:
    teacher = classifier()
    student = narrowed(teacher)
    before, cut = values(teacher), values(student)
    found = run(student, teacher)
    assert found.improved and found.drift_back() > 0.3
    assert equal(values(teacher), before) and equal(values(student), cut)
    assert not equal(values(found.graph), cut)
    assert found.curve[found.trained.best]["drift"] == min(row["drift"] or 0 for row in found.curve)
    assert found.graph.weights().keys() == student.weights().keys()
    assert "came back" in found.sentence() and "% of the loss" in found.sentence()


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    teacher = classifier()
    student, checkpoint = narrowed(teacher), tmp_path / "run.checkpoint"
    whole = run(student, teacher)

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done >= total / 2:
            raise Stop

    with pytest.raises(Stop):
        run(student, teacher, checkpoint=checkpoint, progress=stop)
    rest = run(student, teacher, checkpoint=checkpoint)
    assert rest.trained.resumed_at == 10
    assert equal(values(rest.graph), values(whole.graph))
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in f.curve] for f in (rest, whole)]
    assert timeless[0] == timeless[1]
    assert not equal(values(run(student, teacher, seed=1).graph), values(whole.graph)), "another seed gives other batches"


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    teacher, checkpoint = classifier(), tmp_path / "run.checkpoint"
    student = narrowed(teacher)
    run(student, teacher, checkpoint=checkpoint, steps=4)
    with pytest.raises(rw.UsageError, match="is of a run with rate 0.01, this one has 0.02"):
        run(student, teacher, checkpoint=checkpoint, steps=4, rate=0.02)
    with pytest.raises(rw.UsageError, match="student, original and data"):
        run(narrowed(teacher, keep=8), teacher, checkpoint=checkpoint, steps=4)
    with pytest.raises(rw.UsageError, match="student, original and data"):
        run(student, teacher, BATCHES[1:] + BATCHES[:1], checkpoint=checkpoint, steps=4)
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(rw.InputFileError, match="damaged"):
        run(student, teacher, checkpoint=checkpoint, steps=4)


def test_what_does_not_improve_is_given_back_as_it_was() -> None:
    teacher = classifier()
    student = narrowed(teacher)
    found = run(student, teacher, steps=4, rate=50.0, clip=1e9, warm_up=0)
    assert (found.curve[-1]["drift"] or 0) > (found.curve[0]["drift"] or 0)
    assert not found.improved and equal(values(found.graph), values(student))
    assert "nothing came back" in found.sentence()
    assert found.result.records[-1].applied == 0


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_of_before() -> None:
    teacher = classifier()
    student = narrowed(teacher)
    output = output_terms(teacher, student)[0]
    calls = []

    def breaks(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return kl(a, b) * (float("nan") if len(calls) > 8 else 1.0)

    found = run(student, teacher, loss=[Term(output.teacher, output.student, breaks)])
    assert found.trained.stopped is not None and "not finite at step 8" in found.trained.stopped and found.trained.stopped in found.sentence()
    assert found.curve[-1]["step"] == 8 and found.improved
    assert all(t.isfinite().all() for t in found.graph.weights().values())


@pytest.mark.parametrize(
    ("trainable", "moved"),
    [
        ("all", {"embed.weight", "up.weight_kept", "up.bias_kept", "down.weight_kept", "down.bias", "head.weight"}),
        ("rewritten", {"up.weight_kept", "up.bias_kept", "down.weight_kept"}),
        ("down", {"down.weight_kept", "down.bias"}),
        (("head", "down.bias"), {"head.weight", "down.bias"}),
    ],
)
def test_only_what_was_chosen_is_trained(trainable: Any, moved: set[str]) -> None:
    teacher = classifier()
    student = narrowed(teacher)
    found = run(student, teacher, trainable=trainable)
    before, after = values(student), values(found.graph)
    assert {name for name in before if not torch.equal(before[name], after[name])} == moved
    assert found.weights == (sum(before[n].numel() for n in moved), sum(t.numel() for t in before.values()))
    assert all(p.requires_grad for p in found.graph.module.parameters()), "all of the result can be trained again"


def test_tied_weights_stay_tied_and_are_trained_once() -> None:
    teacher = classifier(tied=True)
    student = narrowed(teacher)
    name = next(n for n in student.weights() if n in ("embed.weight", "head.weight"))
    with student.fx.inserting_before(next(iter(student.fx.nodes))):  # the same weight under a second name, as other captures have it
        student.module.register_parameter("other", student.weight(name))  # type: ignore[arg-type]
        other = student.fx.get_attr("other")
    lookup = student.find(torch.ops.aten.embedding.default)[0]
    other.meta["val"] = lookup.args[0].meta["val"]  # type: ignore[union-attr]
    lookup.update_arg(0, other)
    student.recompile()
    found = run(student, teacher)
    assert found.graph.weight("other") is found.graph.weight(name) and found.graph.weight("other") is not student.weight("other")
    assert not torch.equal(found.graph.weight(name), student.weight(name))
    assert found.weights[0] == found.weights[1] == sum(p.numel() for p in found.graph.module.parameters())
    assert found.drift_back() > 0.3


def test_padding_counts_neither_in_the_loss_nor_in_the_drift() -> None:
    teacher = rw.capture(encoder(), (), example())
    student = narrowed(teacher, "layers.0.up", "layers.0.down")
    learned = Distillation(teacher, student, output_terms(teacher, student))
    flat = teacher.flat_inputs((), example())
    other = (torch.where(flat[1] != 0, flat[0], flat[0] + 1), flat[1])  # other words where there is padding
    assert not torch.equal(flat[0], other[0])
    assert torch.equal(learned.loss(flat)[0], learned.loss(other)[0]) and learned.mean([flat]) == learned.mean([other]) > 0
    assert learned.loss(flat)[1] == int((flat[1] != 0).sum())


def test_embeddings_are_learned_by_relative_error_and_the_residual_stream_beside_them() -> None:
    teacher = rw.capture(encoder(), (), example())
    student = narrowed(teacher, "layers.0.up", "layers.0.down", keep=64)
    texts = [{**example(), "input_ids": torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(s))} for s in range(6)]
    found = run(student, teacher, texts, hidden=1.0, rate=1e-3)
    assert found.terms[0] == "mse of values" and len(found.terms) > 2 and found.terms[1].startswith("hidden ")
    assert found.drift_back() > 0.3


def test_the_losses_are_what_they_say() -> None:
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p = torch.tensor([0.5, 0.5])
    assert kl(a, b).item() == pytest.approx((p * (p.log() - b[0].log_softmax(-1))).sum().item())
    assert kl(a, b, 2.0).item() == pytest.approx(4 * kl(a / 2, b / 2).item())
    assert kl(a.repeat(3, 1), b.repeat(3, 1)).item() == pytest.approx(kl(a, b).item())
    assert relative_mse(b, 1.5 * b).item() == pytest.approx(0.25)


def test_a_single_score_is_no_distribution() -> None:
    torch.manual_seed(0)
    graph = rw.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), (torch.randn(3, 4),))
    assert [t.name for t in output_terms(graph, graph)] == ["mse of values"]
    assert [t.name for t in output_terms(classifier(), classifier())] == ["kl of logits"]


def test_the_rate_rises_stays_and_falls() -> None:
    task = Training({}, lambda step: (torch.zeros(()), 0), dict, rate=2.0, steps=100, warm_up=10, decay=0.5)
    rates = [task.rate_at(step, task.share(step, 0.0)) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:51] == [2.0] * 42 and rates[75] == pytest.approx(1.0) and rates[99] == pytest.approx(0.04)
    timed = Training({}, task.loss, dict, rate=1.0, minutes=2.0, steps=100)
    assert timed.share(10, 90.0) == 0.75 and timed.share(80, 90.0) == 0.8


def test_a_run_by_time_ends_on_time() -> None:
    teacher = classifier()
    found = run(narrowed(teacher), teacher, steps=None, minutes=0.005)
    assert 0.2 < found.seconds < 5 and (found.curve[-1]["step"] or 0) >= 1


def test_refusals_say_what_is_missing() -> None:
    teacher = classifier()
    student = narrowed(teacher)
    for words, make in {
        "no data to learn from": lambda: run(student, teacher, []),
        "one batch to learn from": lambda: run(student, teacher, BATCHES[:1]),
        "nothing to train at 'dwn'.*Did you mean 'down'": lambda: run(student, teacher, trainable="dwn"),
        "every float weight is the original's": lambda: run(teacher.clone(), teacher, trainable="rewritten"),
        "takes ids and the original input_ids": lambda: run(student, rw.capture(encoder(), (), example())),
        "no loss 'kll'": lambda: run(student, teacher, loss="kll"),
        "no precision 'fp8'": lambda: run(student, teacher, precision="fp8"),
        "no value 'nothing'": lambda: run(student, teacher, loss=[Term("nothing", "nothing", kl)]),
        "depends on none of the weights": lambda: run(student, teacher, trainable="head", loss=[Term("embedding", "embedding", relative_mse)]),
    }.items():
        with pytest.raises(rw.UsageError, match=words):
            make()
    half = rw.capture(Classifier().eval().bfloat16(), (), ids(0))
    with pytest.raises(rw.UsageError, match="bfloat16, in which small steps are lost"):
        run(half, half)
    eight, six = (rw.capture(nn.Linear(4, width), (torch.randn(3, 4),)) for width in (8, 6))
    with pytest.raises(rw.UsageError, match="output 0 of the student"):
        run(eight, six, [torch.randn(3, 4)] * 4)


def test_a_result_keeps_its_records_and_saves_with_the_run_among_them(tmp_path: Path) -> None:
    result = rw.optimize(Classifier().eval(), ids(0), recipe=[])
    student = rw.Result(type(result.outcome)(result.graph, narrowed(result.graph), result.records, (), []), result.recipe, name="toy")
    folder = student.save(tmp_path / "student")
    found = finetune_folder(folder, classifier(), tmp_path / "out", BATCHES, steps=8, rate=1e-2, judgings=2)
    assert not (tmp_path / "out.checkpoint").exists()
    loaded = rw.load(tmp_path / "out")
    assert equal(values(loaded.graph), values(found.graph)) and loaded.name == "toy"
    assert loaded.records[-1].name == "finetune" and loaded.records[-1].options["rate"] == 1e-2
    assert found.result.outcome.total is not None and loaded.records[-1].measured == found.result.outcome.total.as_dict()
    assert len(loaded.records) == len(CANONICAL) + 1


def test_bfloat16_products_recover_too_and_the_weights_stay_float32() -> None:
    teacher = classifier()
    found = run(narrowed(teacher), teacher, precision="bf16")
    assert found.drift_back() > 0.3 and {p.dtype for p in found.graph.module.parameters()} == {torch.float32}


def test_a_student_of_fixed_sizes_learns_from_an_original_of_any() -> None:
    def text(seed: int, length: int) -> dict[str, Tensor]:
        made = torch.randint(0, 100, (4, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": made, "attention_mask": torch.ones_like(made)}

    batches = [text(seed, 5 + seed % 3) for seed in range(4)]
    student = rw.optimize(encoder(), example(), recipe=[rw.passes.LowRank(rank=8)], calibration=batches, sizes={"sequence": 9}, verify=False)
    found = finetune(student, rw.capture(encoder(), (), example()), batches=batches, steps=3, judgings=1)
    assert list(found.result.graph.dims) == ["batch"] and len(found.trained.curve) == 2
