"""linear(x, w, b) -> linear_int8_dynamic(x, int8 w, scale, b): four times smaller weights, integer products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...ir.pattern import Match
from ..rewrite import Builder, Rewrite


@dataclass(frozen=True)
class QuantizeLinear(Rewrite):
    """Quantize linear layers: weights once, activations as they come.

    Before:  linear(x, w, b)      After:  linear_int8_dynamic(x, round(w / scale), scale, b)
    Weights: symmetric per output channel, scale = max|w| / 127, codes -127..127. Activations: 8 bits over each tensor's
    present range. Source: specs/quant_shiftadd.md 1. Lossy: on MiniLM all 37 linears cost the mean embedding cosine
    about 0.004 (README's table, from a run). Declines weights another call reads too (tied embeddings), computed
    weights, half-precision layers, and layers below `min_weights`.
    """

    weights: Literal["int8-channel"] = "int8-channel"
    activations: Literal["int8-dynamic"] = "int8-dynamic"
    min_weights: int = 4096
    """Layers with fewer weights stay: quantizing their input costs more than their product."""

    name = "quantize-linear"
    exact = False

    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        return op.linear(x, w, b)

    def why_not(self, m: Match) -> str | None:
        if not m.graph.is_weight(m.w) or m.b is not None and not m.graph.is_weight(m.b):
            return "its weight is computed, not stored"
        weight = m.w.meta["val"]
        if weight.dtype != torch.float32:
            return f"its weight is {weight.dtype}; 8-bit products pay against float32"
        if len(m.w.users) > 1:
            return f"its weight {m.w.target} is also read by {next(u.name for u in m.w.users if u is not m.anchor)}"
        if weight.numel() < self.min_weights:
            return f"its {weight.numel()} weights are fewer than min_weights = {self.min_weights}"
        return None

    def rewrite(self, op: Builder, m: Match) -> Any:
        scale = op.weight(f"{m.w.target}_scale", channel_scales, m.w)
        codes = op.weight(f"{m.w.target}_int8", channel_codes, m.w)
        return op.linear_int8_dynamic(m.x, codes, scale, m.b)


def channel_scales(w: Tensor) -> Tensor:
    """[out, in] -> [out]: the step of symmetric int8 codes; 1 for a row of zeros."""
    step = torch.linalg.vector_norm(w, ord=float("inf"), dim=1) / 127  # max |w| without a copy of w
    return torch.where(step == 0, 1.0, step)


def channel_codes(w: Tensor) -> Tensor:
    """[out, in] -> int8 [out, in] in -127..127, rounded half to even."""
    return (w / channel_scales(w)[:, None]).round_().clamp_(-127, 127).to(torch.int8)  # one copy of w at a time
