"""Register an op of ours from its meaning: one node in every graph, gradients and fake tensors for free."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

LIBRARY = torch.library.Library("rewright", "FRAGMENT")

Meaning = TypeVar("Meaning", bound=Callable)


def semantic(schema: str) -> Callable[[Meaning], Meaning]:
    """`@semantic("name(Tensor x) -> Tensor")` over a plain torch function makes it `torch.ops.rewright.name`.

    CompositeImplicitAutograd: the op stays one node through torch.export and `run_decompositions({})`, and
    dissolves into its meaning under torch.compile and ONNX export without a translation (specs/capture_ir.md 2).
    """

    def register(meaning: Meaning) -> Meaning:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, meaning, "CompositeImplicitAutograd")
        return meaning

    return register
