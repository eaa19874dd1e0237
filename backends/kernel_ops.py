"""Each kernel of the table as a torch op, `torch.ops.rewright_kernels.{op}_{backend}`: one node for torch.compile and export.

Its meaning is the semantic op's. On a device or dtype its kernel can't run, it computes the meaning and warns, so that a
lowered module stays right wherever it is moved; gradients flow through the meaning.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..ir import ops as ops  # registers torch.ops.rewright
from .table import KERNELS, Kernel

LIBRARY = torch.library.Library("rewright_kernels", "FRAGMENT")


def kernel_op(kernel: Kernel) -> OpOverload:
    """The op that runs this kernel of the table."""
    return getattr(torch.ops.rewright_kernels, _name(kernel)).default


def _name(kernel: Kernel) -> str:
    return f"{kernel.op}_{kernel.backend}"


def _contiguous(outputs: Any) -> Any:
    """Kernels write dense outputs, so the meaning must claim and give the same strides."""
    return pytree.tree_map_only(Tensor, Tensor.contiguous, outputs)


def _define(kernel: Kernel) -> None:
    meaning = getattr(torch.ops.rewright, kernel.op).default
    name = f"{LIBRARY.ns}::{_name(kernel)}"

    def run(*args: Any) -> Any:
        x = next(a for a in args if isinstance(a, Tensor))
        if (reason := kernel.why_not(x.device.type, x.dtype)) is None:
            return kernel.load().launch(*args)
        warnings.warn(f"{name} computes in plain torch: {reason}", stacklevel=2)
        return _contiguous(meaning(*args))

    def fake(*args: Any) -> Any:
        return _contiguous(meaning(*args))

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
        ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        double = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that one tensor given twice gets two gradients
            args = [a.view_as(a) if i in wanted else a for i, a in enumerate(args)]
            outputs = pytree.tree_leaves(meaning(*args))
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        given = torch.autograd.grad([o for o, _ in pairs], [args[i] for i in wanted], [g for _, g in pairs], create_graph=double, allow_unused=True)
        found = dict(zip(wanted, given, strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    LIBRARY.define(str(meaning._schema).replace(f"{meaning.namespace}::{kernel.op}", _name(kernel), 1))
    LIBRARY.impl(_name(kernel), run, "CPU")
    LIBRARY.impl(_name(kernel), run, "CUDA")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)


for _kernel in KERNELS:
    _define(_kernel)
