"""What the parts of a converted attention carry: the same program with one part switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..ir.graph import Graph

ours = torch.ops.rewright

WHOLE, NO_FAR, NO_NEAR, NO_MAPS = "whole", "without the linear part", "without the softmax window", "without the feature maps"

UNUSED = 0.01
"""Relative change below which a part counts as unused (specs/attention_tokens.md 8.4)."""

_NEAR_ALONE = 1e8  # gamma: what is far weighs nothing beside it


def parts(graph: Graph) -> dict[str, Graph]:
    """Programs with one kind of part off, by name; none where the graph has no linear attention.

    without the linear part: queries see their window alone; without the softmax window: far tokens alone, where there are any; without the feature
    maps: linear attention gives every query the mean of the values it sees.
    """
    found = {}
    if graph.find(ours.hybrid_attention.default):
        found |= {NO_FAR: _with_gamma(graph, _NEAR_ALONE), NO_NEAR: _with_gamma(graph, 0.0)}
    if graph.find(ours.linear_attention.default):
        found[NO_MAPS] = _without_maps(graph)
    return found


def ablation(graph: Graph, measure: Callable[[Graph], Mapping[str, float]], whole: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Measured numbers of the program whole and of each of `parts`; nothing without any."""
    found = {name: dict(measure(part)) for name, part in parts(graph).items()}
    return {WHOLE: dict(whole), **found} if found else {}


def sentence(found: Mapping[str, Mapping[str, float]], key: str, drift: str) -> str:
    """The ablation in words, by one of its numbers, and whether a part carries nothing or does harm. drift: the number that is low where all is well."""
    whole = found[WHOLE][key]
    said = ", ".join(f"{name} {row[key]:.4g}" for name, row in found.items() if name != WHOLE)
    said = f"{key} {whole:.4g}, {said}"
    for part, what, instead in (
        (NO_FAR, "linear part", "a window alone (sparse-attention) is cheaper"),
        (NO_MAPS, "feature maps' part", "a mean of the values would do"),
    ):
        if part in found and found[part][drift] < found[WHOLE][drift]:
            said += f": the {what} does harm; train it longer, or {instead}"
        elif part in found and abs(found[part][key] - whole) <= UNUSED * abs(whole):
            said += f": the {what} is unused to {100 * UNUSED:g} % on this data; {instead}"
    return said


def _with_gamma(graph: Graph, gamma: float) -> Graph:
    twin = graph.clone()
    for node in twin.find(ours.hybrid_attention.default):
        heads = node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
        node.update_arg(5, twin.add_constant(f"{node.name}.gamma", torch.full((heads,), gamma), like=node))
    twin.clean()
    return twin


def _without_maps(graph: Graph) -> Graph:
    twin = graph.clone()
    for node in twin.find(ours.linear_attention.default):
        node.update_arg(0, twin.insert(torch.ops.aten.mul.Tensor, node.args[0], 0.0, before=node))
    twin.clean()
    return twin
