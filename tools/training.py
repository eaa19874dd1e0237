"""A training run that stops and goes on: AdamW, a learning rate that warms up and falls at the end, held-out judgings, checkpoints."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import InputFileError, UsageError
from ..ir.files import replacing

Row = dict[str, float | None]
"""One judging: step, seconds, rows seen so far, the mean training loss since the last one (None at the start), what the judge found."""


@dataclass(frozen=True)
class Training:
    """What to train and how. The batch of a step follows from its number, so that a run can go on anywhere."""

    parameters: Mapping[str, nn.Parameter]
    """What is trained, by name; a tied weight once."""
    loss: Callable[[int], tuple[Tensor, int]]
    """Step -> the scalar loss on that step's batch, and of how many rows (tokens, texts, images) it is the mean."""
    judge: Callable[[], Mapping[str, float]]
    """Held-out numbers of the model as it is now."""
    rate: float
    """Peak learning rate."""
    steps: int | None = None
    minutes: float | None = None
    """Wall time of the run, judgings included; with `steps` too, what comes first ends it."""
    judgings: int = 10
    """Held-out judgings after the one at the start, evenly over the run."""
    warm_up: int = 20
    """Steps over which the rate rises to its peak."""
    decay: float = 0.25
    """Last share of the run, over which the rate falls to nothing."""
    weight_decay: float = 0.0
    """Of matrices; vectors (norms, biases) have none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    autocast: torch.dtype | None = None
    """Lower precision of the training steps' products; the judge chooses its own."""
    best: str | None = None
    """What the judge wants low: the weights of the best judging are kept. None: those of the end."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a checkpoint must have been made with to be gone on from: plain values by name."""

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is over."""
        shares = [step / self.steps] if self.steps is not None else []
        return max([*shares, seconds / 60 / self.minutes] if self.minutes is not None else shares)

    def rate_at(self, step: int, share: float) -> float:
        """The learning rate: linear warm-up, constant, linear decay."""
        return self.rate * max(0.0, min((step + 1) / self.warm_up if self.warm_up else 1.0, 1.0, (1 - share) / self.decay if self.decay else 1.0))


@dataclass
class Trained:
    """What a run did."""

    curve: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    """Rows trained on."""
    best: int = 0
    """Which row of the curve the weights are of."""
    resumed_at: int | None = None
    """The step a checkpoint let it start from."""
    stopped: str | None = None
    """Why it ended early."""


def train(task: Training, checkpoint: Path | None = None, seen: Callable[[Trained], None] = lambda trained: None) -> Trained:
    """Train `task.parameters` in place, up to the end or on from a checkpoint, and leave the best or the last values in them.

    checkpoint: a file, written at every judging (`seen` is called behind it); it stays when the run is done.
    Raises UsageError for a checkpoint of a run with other settings, InputFileError for a damaged one.
    """
    if task.steps is None and task.minutes is None:
        raise UsageError("a training run needs an end: give steps or minutes")
    run = _Run(task)
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint)
    begin = time.perf_counter() - run.trained.seconds
    while True:
        run.trained.seconds = time.perf_counter() - begin
        share = task.share(run.step, run.trained.seconds)
        done = share >= 1 or run.trained.stopped is not None
        if done or int(share * task.judgings + 1e-9) >= run.judged:
            if not run.trained.curve or run.trained.curve[-1]["step"] != run.step:
                run.judge()
                run.trained.seconds = time.perf_counter() - begin
            run.judged = int(share * task.judgings + 1e-9) + 1
            if checkpoint is not None:
                run.save(checkpoint)
            seen(run.trained)
        if done:
            run.finish()
            return run.trained
        run.take_step(share)


class _Run:
    """The state between two steps, all of which a checkpoint holds."""

    def __init__(self, task: Training) -> None:
        self.task, self.trained = task, Trained()
        self.parameters = list(task.parameters.values())
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": task.weight_decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=task.rate, betas=(0.9, 0.98), fused=True)
        self.step, self.judged = 0, 0
        self.recent: list[float] = []
        self.best: dict[str, Tensor] = {}

    def take_step(self, share: float) -> None:
        """One batch. A loss or gradient that is not finite ends the run with the weights of before."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.rate_at(self.step, share)
        device = self.parameters[0].device.type
        with torch.autocast(device, dtype=self.task.autocast or torch.bfloat16, enabled=self.task.autocast is not None):
            loss, rows = self.task.loss(self.step)
        if not loss.requires_grad:
            raise UsageError("nothing to train: the loss depends on none of the weights chosen")
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.task.clip)
        if math.isfinite(found := loss.item()) and math.isfinite(norm.item()):
            self.optimizer.step()
            self.recent.append(found)
            self.trained.rows += rows
            self.step += 1
        else:
            self.trained.stopped = f"the loss or its gradient was not finite at step {self.step}; a lower rate may help"
        self.optimizer.zero_grad()

    def judge(self) -> None:
        """A row of the curve; better weights than before are kept."""
        with torch.no_grad():
            found = self.task.judge()
        loss = sum(self.recent) / len(self.recent) if self.recent else None
        self.recent = []
        curve, key = self.trained.curve, self.task.best
        curve.append({"step": self.step, "seconds": round(self.trained.seconds, 1), "rows": self.trained.rows, "loss": loss, **found})
        if key is None or len(curve) == 1 or found[key] < (curve[self.trained.best][key] or 0.0):
            self.trained.best = len(curve) - 1
            self.best = {} if key is None else {name: p.detach().clone() for name, p in self.task.parameters.items()}

    def finish(self) -> None:
        """The best weights, where they were kept."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.task.parameters[name].copy_(value)

    def save(self, checkpoint: Path) -> None:
        state = {
            "settings": json.dumps(dict(self.task.settings), default=str),
            "weights": {name: p.detach() for name, p in self.task.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "step": self.step,
            "judged": self.judged,
            "trained": json.dumps(vars(self.trained)),
        }
        with replacing(checkpoint) as temporary:
            torch.save(state, temporary)

    def load(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint, weights_only=True)
            theirs = json.loads(state["settings"])
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, TypeError) as error:
            raise InputFileError(f"{checkpoint} is no checkpoint of a training run, or damaged; remove it to start anew") from error
        ours = json.loads(json.dumps(dict(self.task.settings), default=str))
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                other = f"{checkpoint} is of a run with {key} {theirs.get(key)}, this one has {ours.get(key)}"
                raise UsageError(f"{other}; give the same to go on, or remove it to start anew")
        with torch.no_grad():
            for name, p in self.task.parameters.items():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.step, self.judged = state["best"], state["step"], state["judged"]
        self.trained = Trained(**json.loads(state["trained"]))
        self.trained.resumed_at = self.step
