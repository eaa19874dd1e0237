"""image embeddings -> half as many, some times over: nearest pairs of a frame become their mean (AIM, ICCV 2025, before the language model)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .prompt import PromptSweep, PromptTokens, batch_of, chosen_rows, image_rows

aten = torch.ops.aten
ours = torch.ops.rewright


def merged_image(sweep: PromptSweep, value: fx.Node, tokens: PromptTokens, frame: int, count: int, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A prompt's embeddings with `count` image tokens, [B, left, C], and int64 [B, count], ascending: of which of them each has the place.

    The metric is the embedding itself, every other token of a frame goes, means are plain: a token that stands for two counts once.
    """

    def insert(target: Any, *args: Any) -> fx.Node:
        return sweep.insert(before, target, *args)

    image, width = tokens.image, int(value.meta["val"].shape[-1])
    frames, left = image.count // frame, frame
    batch = batch_of(sweep, value, before)
    now = insert(aten.reshape.default, image_rows(sweep, value, image, 1, before), [-1, frame, width])
    numbers = sweep.graph.add_constant("image_tokens.numbers", torch.arange(image.count).reshape(1, frames, frame), like=before)
    places = insert(aten.reshape.default, insert(aten.expand.default, numbers, [batch, -1, -1]), [-1, frame])
    while left * frames > count:
        keep, source, slot = sweep.items(insert(ours.token_match.default, now, left // 2), before)
        now = sweep.items(insert(ours.token_merge.default, now, keep, source, slot), before)[0]
        places, left = insert(ours.token_take.default, places, keep), left - left // 2
    chosen = insert(aten.reshape.default, places, [batch, count])
    return chosen_rows(sweep, value, tokens, chosen, insert(aten.reshape.default, now, [batch, count, width]), before), chosen
