"""A loss for models without labels: how likely the model finds an answer drawn from its own answers, which gives the true Fisher."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, fx

from ...ir.blocks.vocabulary import is_logits
from ...ir.graph import Flat, Graph
from ...ir.verify import padding_mask, real_rows
from .gradients import Loss


def own_loss(graph: Graph, seed: int = 0) -> Loss:
    """The negative log likelihood of outputs drawn from the model itself: classes from the softmax of logits, points from a unit
    normal around other outputs, padding left out. Its squared gradients average to the Fisher information of the model's
    own distribution (Martens 2020, section 5). The same sample draws the same answer each time.
    """
    kinds = [is_logits(n) if _is_float(n) else None for n in graph.output.all_input_nodes]
    mask = padding_mask(graph)

    def loss(outputs: tuple, flat: Flat) -> Tensor:
        digest = hashlib.sha256(flat[0].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(seed + int.from_bytes(digest[:6], "little"))
        real, total = mask(flat), torch.zeros(())
        for output, logits in zip(outputs, kinds):
            if logits is None:
                continue
            y = real_rows(output, real)
            if logits:
                rows = y.float().reshape(-1, y.shape[-1]).log_softmax(-1)
                drawn = torch.multinomial(rows.detach().exp(), 1, generator=generator)
                total = total - rows.gather(1, drawn).sum()
            else:
                total = total + (torch.randn(y.shape, generator=generator) * y.float()).sum()  # the gradient of |y - drawn|^2 / 2
        return total

    return loss


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
