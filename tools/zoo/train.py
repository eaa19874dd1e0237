"""Train the zoo's own models: `python -m rewright.tools.zoo.train digits-vit|stdlib-lm`. What ships was made by this.

AdamW under bfloat16 autocast, warm-up, constant rate, linear decay to nothing over the last quarter, held-out metrics on
the way (tools/training.py). A run that stops goes on from its checkpoint; the same seed gives the same batches.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...ir.files import replacing
from ..training import Trained, Training
from ..training import train as run
from . import DATA, digits_vit, stdlib_lm
from .curve import CARDS, draw

SEED = 0


@dataclass
class Task:
    """What to train: `loss(step)` draws that step's batch and runs the model on it, `judge()` gives held-out metrics."""

    name: str
    model: nn.Module
    loss: Callable[[int], tuple[Tensor, int]]
    judge: Callable[[], dict[str, float]]
    weights: Path
    rate: float
    """Peak learning rate."""
    weight_decay: float
    steps: int
    judge_every: int


def digits_task() -> Task:
    """1,198 augmented digits, 64 a step, label smoothing 0.1."""
    images, labels, held_images, held_labels = digits_vit.images()
    model = digits_vit.untrained()

    def loss(step: int) -> tuple[Tensor, int]:
        chosen, wanted = digits_vit.training_images(images, labels, step, SEED)
        return F.cross_entropy(model(pixel_values=chosen).logits.float(), wanted, label_smoothing=0.1), len(chosen)

    def judge() -> dict[str, float]:
        logits = model(pixel_values=held_images).logits
        return {"held_out_loss": F.cross_entropy(logits, held_labels).item(), "accuracy": (logits.argmax(-1) == held_labels).double().mean().item()}

    return Task("digits-vit", model, loss, judge, digits_vit.WEIGHTS, 1e-3, 0.05, 2000, 100)


def language_task() -> Task:
    """Windows of the training modules, 8 x 256 tokens a step; every epoch cuts the text at other places."""
    stream = _prepare_tokens()
    model = stdlib_lm.untrained()
    held_out, _ = stdlib_lm.tokens("held_out")

    def loss(step: int) -> tuple[Tensor, int]:
        ids = stdlib_lm.training_windows(stream, step, SEED)
        return _next_token_loss(model(input_ids=ids[:, :-1]).logits, ids), ids[:, 1:].numel()

    def judge() -> dict[str, float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [_next_token_loss(model(input_ids=ids[:, :-1]).logits, ids) for ids in held_out[::4].split(16)]
        return {"held_out_loss": torch.stack(losses).mean().item()}

    return Task("stdlib-lm", model, loss, judge, stdlib_lm.WEIGHTS, 1.5e-3, 0.1, 7000, 250)


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def _prepare_tokens() -> Tensor:
    """Train the tokenizer and write it and the held-out and calibration windows, unless they ship already; the training text as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    training, held_out = stdlib_lm.corpus()
    if not stdlib_lm.TOKENIZER.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            map(stdlib_lm.read, training), trainers.BpeTrainer(vocab_size=stdlib_lm.VOCABULARY, special_tokens=[stdlib_lm.END], initial_alphabet=alphabet)
        )
        tokenizer.save(str(stdlib_lm.TOKENIZER))
    train_ids = stdlib_lm.encoded(training)
    if not stdlib_lm.TOKENS.exists():
        found = {}
        for split, ids, count in (("held_out", stdlib_lm.encoded(held_out), 256), ("calibration", train_ids, 64)):
            found[f"{split}.tokens"], found[f"{split}.files"] = stdlib_lm.windows(ids, count)
        save_file({k: v.to(torch.int16).contiguous() for k, v in found.items()}, stdlib_lm.TOKENS, {"held_out": json.dumps(held_out)})
    return torch.cat(train_ids)


TASKS = {"digits-vit": digits_task, "stdlib-lm": language_task}


def train(task: Task, work: Path, steps: int, compiled: bool) -> None:
    """Run or go on to `steps`, then write the weights that ship. `work` holds the checkpoint and curve.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    curve = work / f"{task.name}.jsonl"
    if compiled:
        task.model.compile()

    def judge() -> dict[str, float]:
        task.model.eval()
        found = task.judge()
        task.model.train()
        return found

    def seen(trained: Trained) -> None:
        print(json.dumps(trained.curve[-1]), flush=True)
        curve.write_text("".join(json.dumps(row) + "\n" for row in trained.curve), encoding="utf8")

    how: dict[str, Any] = {"steps": steps, "rate": task.rate, "weight_decay": task.weight_decay, "warm_up": 200, "judgings": steps // task.judge_every}
    training = Training(dict(task.model.named_parameters()), task.loss, judge, **how, autocast=torch.bfloat16, settings=how)
    trained = run(training, work / f"{task.name}.pt", seen)
    _ship(task, steps, trained.seconds)
    (CARDS / curve.name).write_bytes(curve.read_bytes())
    draw(task.name)


def _ship(task: Task, steps: int, seconds: float) -> None:
    facts: dict[str, Any] = {"steps": steps, "seconds": round(seconds), "seed": SEED, "rate": task.rate, "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    tied = {name for name, p in task.model.named_parameters(remove_duplicate=False)} - {name for name, _ in task.model.named_parameters()}
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in task.model.state_dict().items() if k not in tied}
    with replacing(task.weights) as temporary:
        save_file(weights, temporary, {k: str(v) for k, v in facts.items()})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(TASKS))
    parser.add_argument("--work", type=Path, default=Path("zoo-training"), help="folder of the checkpoint and the curve")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    chosen = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(SEED)
    task = TASKS[chosen.model]()
    train(task, chosen.work, chosen.steps or task.steps, chosen.compile)


if __name__ == "__main__":
    main()
