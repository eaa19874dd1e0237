"""program -> the same program with trained weights: what passes before it lost is learned back from the original."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ...ir.errors import RecipeError, UsageError
from ...ir.graph import Graph
from ..rewrite import Context, GraphPass

NOT_TRAINED = "a dry run does not train"


@dataclass(frozen=True)
class Finetune(GraphPass):
    """Train the program as it is now to give what the original gives (distillation), as `rewright finetune` does.

    Before:  a program that passes before this one changed      After:  the same calls, weights with the least drift on held-out data
    The data are the calibration's first three quarters, or a zoo model's own training data. The budget of the passes before it is judged behind
    it (Pipeline). The record's details hold the curve. With `steps` and without `minutes` the same seed gives the same weights.
    Not run in a dry run. Never worse than it began: without a better judging the weights stay as they were.
    """

    steps: int | None = None
    minutes: float | None = None
    """The end, whichever comes first; 10 minutes without either."""
    rate: float = 3e-4
    """Peak of the learning rate."""
    warm_up: int = 20
    """Steps up to the peak."""
    decay: float = 0.25
    """Last share of the run, over which the rate falls to nothing."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient."""
    loss: Literal["auto", "kl", "mse", "cosine", "attention"] = "auto"
    """auto: KL of logits, relative squared error of other outputs. attention: each replaced attention alone, for the queries, keys and values its
    teacher has (attention transfer; right behind linear-attention)."""
    temperature: float = 1.0
    """Of the logits."""
    hidden: float = 0.0
    """Weight of the residual stream's relative error in the loss."""
    lora: int = 0
    """Rank of the updates that chosen matrices of the original get, merged in the end; 0: they are trained themselves."""
    trainable: str | tuple[str, ...] = "all"
    """One or several of all, rewritten (weights the original lacks or holds otherwise), attention (the linears around the original's
    attentions), and paths of modules or weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compiled: bool = False
    """torch.compile both programs: faster steps after about a minute."""
    seed: int = 0
    judgings: int = 10
    """Looks at held-out data on the way."""

    name = "finetune"
    exact = False
    trains = True

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1 or self.minutes is not None and self.minutes <= 0:
            raise RecipeError(f"finetune ends after steps or minutes above 0; got steps = {self.steps}, minutes = {self.minutes}")
        if self.lora < 0:
            raise RecipeError(f"finetune: lora is a rank, at least 0; got {self.lora}")
        if self.rate <= 0:
            raise RecipeError(f"finetune needs a rate above 0; got {self.rate:g}")

    def run(self, graph: Graph, context: Context) -> Graph:
        if context.finetune is None:
            context.decline(graph.output, NOT_TRAINED)
            return graph
        if context.ignore and "all" in ((self.trainable,) if isinstance(self.trainable, str) else self.trainable):
            what = ", ".join(context.ignore)
            raise UsageError(f'finetune: {what} is to be left alone, and trainable = "all" trains it too; give trainable = "rewritten" or paths to train')
        found = context.finetune(graph, dataclasses.asdict(self))
        context.details.update(found.details)
        found.graph.notes.append(f"{self.name}: {found.sentence}")
        context.matched, context.applied = found.trained, list(found.better)
        return found.graph
