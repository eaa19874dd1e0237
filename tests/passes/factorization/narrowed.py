"""What a narrowed program is to compute: the original with the columns of hidden channels that went set to zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewright.ir.blocks import FFNBlock, ffn_blocks
from rewright.ir.graph import Graph
from rewright.passes.factorization.hidden_channels import HiddenChannels, hidden_channels, set_argument, weight_name


def narrowable(graph: Graph) -> list[FFNBlock]:
    """The blocks whose hidden channels can be taken away."""
    return [b for b in ffn_blocks(graph) if isinstance(hidden_channels(graph, b), HiddenChannels)]


def random_masks(graph: Graph, share: float = 0.5) -> dict[str, Tensor]:
    """By down weight: bool [hidden] or [experts, hidden], as many true for each expert, others for each."""
    g, found = torch.Generator().manual_seed(0), {}
    for block in narrowable(graph):
        rows = [torch.randperm(block.hidden, generator=g) < round(share * block.hidden) for _ in range(block.experts or 1)]
        found[weight_of(block)] = torch.stack(rows) if block.experts is not None else rows[0]
    return found


def weight_of(block: FFNBlock) -> str:
    """The name of its down weight."""
    weight: Any = block.down.args[1]
    return str(weight.target)


def mask_file(masks: dict[str, Tensor], folder: Path) -> str:
    """Masks as a file."""
    save_file(masks, folder / "mask.safetensors")
    return str(folder / "mask.safetensors")


def silenced(graph: Graph, masks: dict[str, Tensor]) -> Graph:
    """The program with every masked channel's output weights at zero."""
    twin, left = graph.draft(), dict(masks)
    for block in ffn_blocks(twin):
        if (mask := left.pop(weight_of(block), None)) is None:
            continue
        w = twin.weight(weight_of(block)).detach()
        w = w * (mask if mask.dim() == 1 else mask[:, :, None])
        set_argument(block.down, weight_name(block.down), twin.add_constant("silenced", w, like=block.down))
    assert not left, f"no block has {', '.join(left)}"
    twin.clean()
    return twin
