"""Models whose norms and scales do something, so that a fold left out shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewright.ir.graph import Flat, Graph
from rewright.passes.rewrite import Context, Pass

from ...ir.block_models import Model, canonical


def moved(model: nn.Module) -> nn.Module:
    """With vectors (norms, biases, scales) away from where they start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def language_model(*blocks: nn.Module, tied: bool = False) -> Graph:
    """Ids [3, 9] and a mask -> logits: an embedding, these blocks, a LayerNorm, a head."""
    torch.manual_seed(1)
    return canonical(moved(Model(*blocks, tied=tied)))


def ids(rows: int = 3) -> Flat:
    """Inputs of a language model."""
    torch.manual_seed(2)
    return torch.randint(0, 50, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)


def edited(graph: Graph, step: Pass, context: Context | None = None) -> tuple[Graph, Context]:
    """The graph after one pass, and its log."""
    context = context or Context()
    after = step.run(graph.clone(), context)
    after.clean()
    return after, context


def error(before: Graph, after: Graph, flat: Flat) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    pairs = list(zip(before.run(flat), after.run(flat)))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point())


def only(log: Context) -> str:
    """The one sentence a pass said no with."""
    assert log.applied == []
    (why,) = {d.why for d in log.declined}
    return why
