"""What a kernel must do, in one place: the calls it is tried on, and what is wrong with what it gave. For tests, the kernel report and the GPU benchmark."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .table import Kernel


def shifted(t: Tensor) -> Tensor:
    """The same values one element into a larger storage: vector loads that trust an alignment crash here."""
    larger = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return larger.copy_(t)


def strided(t: Tensor) -> Tensor:
    """The same values, every second one of a larger storage."""
    return torch.empty(*t.shape, 2, dtype=t.dtype, device=t.device)[..., 0].copy_(t)


def calls(kernel: Kernel, dtype: torch.dtype, device: str) -> Iterator[tuple]:
    """The op's cases as they are, each off alignment or strided, in turn; then the kernel's own, which reach all of its code."""
    torch.manual_seed(0)
    cases = importlib.import_module(f"...ir.ops.{kernel.op}", __name__).cases(dtype, device)
    for i, case in enumerate(cases):
        yield case
        yield pytree.tree_map_only(Tensor, (shifted, strided)[i % 2], case)
    yield from getattr(kernel.load(), "examples", lambda *_: ())(dtype, device)


def error(value: Tensor, gold: Tensor) -> float:
    """The largest difference over the largest value of its row (the last axis; or 1 where all are 0), of all rows: small tokens count like large ones.

    gold: float64; where it is not finite nothing is compared.
    """
    if not gold.numel():
        return 0.0
    held = gold.isfinite()
    gold = torch.where(held, gold, 0.0)
    off = torch.where(held, (value.double() - gold).abs(), 0.0).amax(-1)
    most = gold.abs().amax(-1)
    return (off / torch.where(most == 0, 1.0, most)).max().item()


def fault(kernel: Kernel, dtype: torch.dtype, args: tuple, outputs: Any, after: tuple, slack: float = 0.0) -> str | None:
    """What is wrong with the outputs of one call, by the op's meaning in float64; `after` are its arguments when it is done.

    Integers must be the meaning's. Of floats the error may be the table's rtol, the dtype's own rounding, what the meaning loses in
    this dtype, which is not the kernel's fault, and `slack`.
    """
    meaning = getattr(torch.ops.rewright, kernel.op)
    golds = pytree.tree_leaves(meaning(*pytree.tree_map_only(Tensor, _double, args)))
    owns = pytree.tree_leaves(meaning(*args))
    for i, (out, own, gold) in enumerate(zip(pytree.tree_leaves(outputs), owns, golds, strict=True)):
        where = f"output {i} of {kernel.op}({', '.join(map(_shown, args))}) in {dtype}"
        if (out.dtype, out.shape) != (own.dtype, own.shape):
            return f"{where} is {out.dtype} {list(out.shape)}, not {own.dtype} {list(own.shape)}"
        if not out.is_contiguous():
            return f"{where} is not contiguous"
        if not out.is_floating_point():
            if not torch.equal(out, gold):
                return f"{where} differs in {(out != gold).sum()} of {out.numel()} places"
            continue
        if not torch.equal(out.isnan(), own.isnan()):
            return f"{where} is NaN in {out.isnan().sum()} places, its meaning in {own.isnan().sum()}"
        gold = torch.where(own.isfinite(), gold, torch.nan)  # where the dtype can't hold what the meaning gives, there is nothing to compare
        allowed = kernel.rtol + torch.finfo(out.dtype).eps + error(own, gold) + slack
        if not (found := error(out, gold)) <= allowed:
            return f"{where} is off by {found:.2e}, which may be {allowed:.2e}"
    for given, left in zip(pytree.tree_leaves(args), pytree.tree_leaves(after), strict=True):
        if isinstance(given, Tensor) and not torch.equal(_plain(given), _plain(left)):
            return f"{kernel.op} wrote into an operand of {list(given.shape)}"
    return None


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _plain(t: Tensor) -> Tensor:
    """Its bytes: a NaN is itself there."""
    return t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else str(value)
