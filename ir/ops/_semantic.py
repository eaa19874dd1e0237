"""Register an op of ours from its meaning: one node in every graph, with gradients and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def opaque(schema: str, fake: Callable[..., Tensor]) -> Callable[[Meaning], Meaning]:
    """The same for a meaning that can't be traced because it loops over data; its arguments and its result are tensors.

    `fake` gives the result's shape. The gradient comes from running the meaning again. The op never dissolves: ONNX and
    other backends need a form of it.
    """

    def register(meaning: Meaning) -> Meaning:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rewright::{name}", fake, lib=LIBRARY)

        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
                floats = [x for x in inputs if x.requires_grad]
                found = iter(torch.autograd.grad(meaning(*inputs), floats, gradient))
            return tuple(next(found) if x.requires_grad else None for x in inputs)

        def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        torch.library.register_autograd(f"rewright::{name}", backward, setup_context=keep, lib=LIBRARY)
        return meaning

    return register
