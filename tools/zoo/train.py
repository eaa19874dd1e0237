"""Train the zoo's own models: `python -m rewright.tools.zoo.train digits-vit|stdlib-lm`. What ships was made by this.

One loop for both: AdamW under bfloat16 autocast, warm-up, constant rate, linear decay to nothing over the last quarter,
held-out metrics on the way. A run that stops goes on from its checkpoint; the same seed gives the same batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ...ir.files import replacing
from . import DATA, digits_vit, stdlib_lm
from .curve import CARDS, draw

SEED = 0


@dataclass
class Task:
    """What to train: `loss(step)` draws that step's batch and runs the model on it, `judge()` gives held-out metrics."""

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    judge: Callable[[], dict[str, float]]
    weights: Path
    rate: float
    """Peak learning rate."""
    weight_decay: float
    steps: int
    judge_every: int


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + 1 + step)


def digits_task() -> Task:
    """1,198 augmented digits, 64 a step, label smoothing 0.1."""
    images, labels, held_images, held_labels = digits_vit.images()
    model = digits_vit.untrained()

    def loss(step: int) -> Tensor:
        generator = _generator(step)
        chosen = torch.randint(len(images), (64,), generator=generator)
        logits = model(pixel_values=digits_vit.augmented(images[chosen], generator)).logits
        return F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)

    def judge() -> dict[str, float]:
        logits = model(pixel_values=held_images).logits
        return {"held_out_loss": F.cross_entropy(logits, held_labels).item(), "accuracy": (logits.argmax(-1) == held_labels).double().mean().item()}

    return Task("digits-vit", model, loss, judge, digits_vit.WEIGHTS, 1e-3, 0.05, 2000, 100)


def language_task() -> Task:
    """Windows of the training modules, 8 x 256 tokens a step; every epoch cuts the text at other places."""
    stream = _prepare_tokens()
    model = stdlib_lm.untrained()
    context, batch = stdlib_lm.CONTEXT, 8
    a_epoch = (len(stream) - 2 * context) // context // batch  # steps
    held_out, _ = stdlib_lm.tokens("held_out")

    def loss(step: int) -> Tensor:
        epoch, i = divmod(step, a_epoch)
        generator = _generator(10**6 + epoch)
        offset = int(torch.randint(context, (1,), generator=generator))
        places = torch.randperm(a_epoch * batch, generator=generator)[i * batch : (i + 1) * batch]
        ids = torch.stack([stream[offset + p * context :][: context + 1] for p in places.tolist()]).long()
        return _next_token_loss(model(input_ids=ids[:, :-1]).logits, ids)

    def judge() -> dict[str, float]:
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
    tokenizer = Tokenizer.from_file(str(stdlib_lm.TOKENIZER))

    def encoded(paths: list[str]) -> list[Tensor]:
        return [torch.tensor([0, *e.ids], dtype=torch.int16) for e in tokenizer.encode_batch([stdlib_lm.read(p) for p in paths])]

    train_ids = encoded(training)
    if not stdlib_lm.TOKENS.exists():
        found = {}
        for split, ids, count in (("held_out", encoded(held_out), 256), ("calibration", train_ids, 64)):
            found[f"{split}.tokens"], found[f"{split}.files"] = stdlib_lm.windows(ids, count)
        save_file({k: v.to(torch.int16).contiguous() for k, v in found.items()}, stdlib_lm.TOKENS, {"held_out": json.dumps(held_out)})
    return torch.cat(train_ids)


TASKS = {"digits-vit": digits_task, "stdlib-lm": language_task}


def train(task: Task, work: Path, steps: int, compiled: bool) -> None:
    """Run or go on to `steps`, then write the weights that ship. `work` holds the checkpoint and curve.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = work / f"{task.name}.pt", work / f"{task.name}.jsonl"
    decayed = [p for p in task.model.parameters() if p.dim() > 1]
    others = [p for p in task.model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": task.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=task.rate, betas=(0.9, 0.98), fused=True)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    if compiled:
        task.model.compile()
    begin, recent = time.perf_counter() - seconds, []
    for step in range(first, steps + 1):
        if step % task.judge_every == 0 or step == steps:
            task.model.eval()
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.name == "stdlib-lm"):
                found = task.judge()
            task.model.train()
            seconds = time.perf_counter() - begin
            row = {"step": step, "seconds": round(seconds), "loss": sum(recent) / len(recent) if recent else None, **found}
            recent = []
            print(json.dumps(row), flush=True)
            with open(curve, "a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            with replacing(checkpoint) as temporary:
                torch.save({"model": task.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}, temporary)
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = task.rate * _schedule(step, steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = task.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
    _ship(task, steps, seconds)
    (CARDS / curve.name).write_bytes(curve.read_bytes())
    draw(task.name)


def _schedule(step: int, steps: int) -> float:
    return min((step + 1) / 200, 1.0, (steps - step) / (steps / 4))


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
