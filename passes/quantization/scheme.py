"""Which formats of weights and activations go together, and the op that computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...ir.errors import RecipeError
from ...ir.formats import ACTIVATIONS, WEIGHTS, Format

Weights = Literal["int8-channel", "int6-channel", "int4-channel", "int8-group", "int4-group", "fp8-channel"]
Powers = Literal["pot4-channel", "pot8-channel"]
"""Weights of one or two power-of-two terms: shift-linear's, and choices of mixed-precision."""
Activations = Literal["none", "int8-dynamic", "int8-static", "int8-token", "int6-token", "int4-token", "fp8-token"]

_CHANNEL, _TOKEN = ("int8-channel", "int6-channel", "int4-channel"), ("int8-token", "int6-token", "int4-token")
# op -> the (weights, activations) it computes with
OPS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear_int8_dynamic": (("int8-channel", "int8-dynamic"),),
    "linear_int8_static": (("int8-channel", "int8-static"),),
    "linear_token": tuple((w, x) for w in _CHANNEL for x in _TOKEN),
    "linear_nbits": (("int8-group", "none"), ("int4-group", "none"), ("int8-channel", "none"), ("int4-channel", "none")),
    "linear_fp8": (("fp8-channel", "fp8-token"),),
    "shift_linear": tuple((w, x) for w in ("pot4-channel", "pot8-channel") for x in ("int8-dynamic", "int8-token", "none")),
}

SMALLEST_GROUP = 16
"""Channels that share a scale: onnxruntime's kernels take powers of two from here on."""


@dataclass(frozen=True)
class Scheme:
    """A format of weights, one of activations (None: as they are), and the op for both."""

    name: str
    op: str
    weights: Format
    activations: Format | None

    @property
    def activations_name(self) -> str:
        """The format of activations in ir.formats."""
        return self.name.partition("/")[2]

    @property
    def static(self) -> bool:
        """Whether activations have one range, fixed by calibration."""
        return self.op == "linear_int8_static"

    def why_not(self, dtype: torch.dtype, inputs: int) -> str | None:
        """One sentence why a layer with weights of this dtype and so many inputs can't have it, or None."""
        if dtype != torch.float32 and (dtype not in (torch.float16, torch.bfloat16) or self.op.startswith("linear_int8")):
            return f"its weight is {dtype}; {self.op} pays against float32"
        if self.activations is not None and self.activations.kind == "int":
            most = (2**31 - 1) // (self.weights.high * self.activations.high)
            if inputs > most:
                return f"the sum of its {inputs:,} products can overflow 32 bits; {self.name} is safe up to {most:,} inputs"
        return None


def scheme(weights: str, activations: str) -> Scheme:
    """The scheme for two names of ir.formats. Raises RecipeError with all pairs there are."""
    for op, pairs in OPS.items():
        if (weights, activations) in pairs:
            return Scheme(f"{weights}/{activations}", op, WEIGHTS[weights], ACTIVATIONS[activations])
    raise RecipeError(
        f"{weights} weights with {activations} activations is no combination there is an op for; there are "
        + ", ".join(f"{w}/{x}" for pairs in OPS.values() for w, x in pairs)
    )


def check_group_size(size: int) -> None:
    """Raises RecipeError for a group size the ops' layout has no room for."""
    if size < SMALLEST_GROUP or size & (size - 1):
        raise RecipeError(f"group_size must be a power of two from {SMALLEST_GROUP} on, got {size}")
