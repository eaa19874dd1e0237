"""The models that come with us are trained, small, judged on what they have not seen, and the judges see damage."""

from functools import cache

import pytest
import torch
from torch import nn

from rewright.ir.errors import UsageError
from rewright.tools.models import load_model, own_metric, runner_of
from rewright.tools.zoo import DATA, ZOO, ZooModel, digits_vit, load_zoo, minilm, stdlib_lm
from rewright.tools.zoo.texts import described_functions, docstrings

ITEMS = {"minilm": 48, "digits-vit": 599, "stdlib-lm": 24}


@cache
def zoo(name: str) -> ZooModel:
    return load_zoo(name)


def scores(name: str, module: nn.Module, split: str = "held_out") -> dict[str, float]:
    return {s.name: s.value for s in zoo(name).judge(runner_of(module), ITEMS[name], split)}


@cache
def damaged(name: str) -> nn.Module:
    """The same model with noise on every matrix: a quarter of its own spread, for the sturdy digits twice it."""
    module = load_zoo(name).module
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 2:
                p += (2.0 if name == "digits-vit" else 0.25) * p.std() * torch.randn(p.shape, generator=generator)
    return module


def test_weights_fit_in_25_megabytes():
    assert sum(f.stat().st_size for f in DATA.glob("*.safetensors")) < 25e6


@pytest.mark.parametrize("name", ZOO)
def test_every_model_captures_calibrates_and_gives_what_the_module_gives(name):
    loaded = load_model(f"zoo:{name}")
    assert len(loaded.inputs) == 1 + {"minilm": 32}.get(name, 16)
    assert loaded.module is not None
    batch = zoo(name).calibration[3]
    assert torch.equal(loaded.graph.run(loaded.inputs[4])[0], runner_of(loaded.module)(batch))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "digits-vit" else pytest.mark.slow) for n in ZOO])
def test_the_judge_finds_nothing_wrong_with_the_original_and_much_with_a_damaged_one(name):
    original, worse = scores(name, zoo(name).module), scores(name, damaged(name))
    agreement = {"minilm": "nearest neighbour", "digits-vit": "agreement", "stdlib-lm": "agreement"}[name]
    assert original[agreement] == 1.0 and worse[agreement] < 0.99
    change = {"minilm": "cosine", "digits-vit": "accuracy change", "stdlib-lm": "perplexity ratio"}[name]
    assert original[change] == pytest.approx({"minilm": 1.0, "digits-vit": 0.0, "stdlib-lm": 1.0}[name], abs=1e-6)
    assert abs(worse[change] - original[change]) > 0.005


def test_digits_are_read_and_python_is_predicted_as_the_cards_say():
    assert scores("digits-vit", zoo("digits-vit").module)["accuracy"] > 0.98
    found = scores("stdlib-lm", zoo("stdlib-lm").module)
    assert found["perplexity"] < 30 and found["next-token accuracy"] > 0.35


@pytest.mark.parametrize("name", ["digits-vit", "stdlib-lm"])
def test_a_budgets_own_metric_is_higher_for_the_better_model(name):
    metric = own_metric(load_model(f"zoo:{name}"))
    assert metric is not None and metric(zoo(name).module) > metric(damaged(name))


def test_what_calibrates_is_not_what_judges():
    texts = minilm.judged_texts("calibration")
    assert not set(texts) & set(minilm.judged_texts("held_out"))
    assert not set(texts) & {text for text, _ in described_functions()}
    assert len(set(docstrings())) == len(docstrings())
    training, _, held_out, _ = digits_vit.images()
    assert not {x.numpy().tobytes() for x in training} & {x.numpy().tobytes() for x in held_out}
    windows = [{tuple(w) for w in stdlib_lm.tokens(split)[0].tolist()} for split in ("held_out", "calibration")]
    assert not windows[0] & windows[1]


def test_what_trains_is_neither_judged_nor_chosen_by(monkeypatch):
    others = {*docstrings()[: minilm.HELD_OUT], *minilm.judged_texts("calibration"), *(text for text, _ in described_functions())}
    assert len(minilm.training_texts()) > 1000 and not set(minilm.training_texts()) & others
    monkeypatch.setattr(digits_vit, "augmented", lambda images, generator: images)
    seen = {x.numpy().tobytes() for step in range(9) for x in zoo("digits-vit").training_batch(step, 0)["pixel_values"]}
    assert len(seen) > 300 and not seen & {x.numpy().tobytes() for batch in zoo("digits-vit").validation() for x in batch["pixel_values"]}
    training, validating = map(set, stdlib_lm.training_modules())
    assert len(training) > 15 * len(validating) > 0
    assert not validating & training and not (validating | training) & set(stdlib_lm.corpus()[1])


@pytest.mark.parametrize("name", ["minilm", "digits-vit"])
def test_a_training_batch_follows_from_its_step_and_seed(name):
    batch = {key: next(iter(zoo(name).training_batch(*key).values())) for key in ((0, 0), (1, 0), (0, 1))}
    assert torch.equal(batch[0, 0], next(iter(zoo(name).training_batch(0, 0).values())))
    assert not torch.equal(batch[0, 0], batch[1, 0]) and not torch.equal(batch[0, 0], batch[0, 1])
    windows = [stdlib_lm.training_windows(torch.arange(9000, dtype=torch.int16), *key) for key in ((0, 0), (0, 0), (1, 0), (0, 1), (4, 0))]
    assert torch.equal(windows[0], windows[1]) and not any(torch.equal(windows[0], w) for w in windows[2:])
    assert windows[0].shape == (8, stdlib_lm.CONTEXT + 1) and bool((windows[0].diff() == 1).all())


def test_a_module_and_its_tests_are_on_the_same_side():
    """Whatever the Python that runs this comes with: some leave the tests out."""
    training, held_out = stdlib_lm.corpus()
    names = [{path.rpartition("/")[2].removeprefix("test_") for path in side} - {"__init__.py"} for side in (training, held_out)]
    assert "linecache.py" in held_out and not names[0] & names[1]
    assert len(training) > 15 * len(held_out)


def test_the_tokenizer_gives_back_what_it_was_given():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(stdlib_lm.TOKENIZER))
    text = 'def f(x: int) -> str:\n    return "é\\t" * x  # \u2603\n'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == stdlib_lm.VOCABULARY


def test_an_unknown_name_is_answered_with_the_near_one():
    with pytest.raises(UsageError, match="Did you mean 'stdlib-lm'"):
        load_zoo("stdlib")
