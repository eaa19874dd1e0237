"""Loops of what TE made: TVM's own CPU pipeline leaves them scalar and on one thread."""

from __future__ import annotations

import contextlib
from typing import Any

from .compat import s_tir, tvm


def schedule(lanes: int) -> Any:
    """A pass over all functions: producers inlined, the outer loops parallel, the innermost in vectors where its size is known."""

    @tvm.transform.module_pass(opt_level=0)
    def run(module: Any, _: Any) -> Any:
        for variable, function in list(module.functions_items()):
            if isinstance(function, tvm.tirx.PrimFunc):
                module[variable] = _scheduled(function, lanes)
        return module

    return run


def _scheduled(function: Any, lanes: int) -> Any:
    plan = s_tir.Schedule(function)
    blocks = plan.get_child_blocks(plan.get_sblock("root")) if _has_root(plan) else []
    for block in blocks:
        if not _reduces(plan, block):
            with contextlib.suppress(s_tir.ScheduleError):  # an output, or read by a reduction in a way that can't be inlined
                plan.compute_inline(block)
    for block in plan.get_child_blocks(plan.get_sblock("root")) if blocks else []:
        _loops(plan, block, lanes)
    return plan.mod["main"].with_attrs(function.attrs)


def _has_root(plan: Any) -> bool:
    try:
        plan.get_sblock("root")
    except s_tir.ScheduleError:
        return False
    return True


def _reduces(plan: Any, block: Any) -> bool:
    return any(v.iter_type != tvm.tirx.IterVar.DataPar for v in plan.get(block).iter_vars)


def _loops(plan: Any, block: Any, lanes: int) -> None:
    loops, kinds = plan.get_loops(block), [v.iter_type for v in plan.get(block).iter_vars]
    if len(loops) != len(kinds) or not loops:
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == tvm.tirx.IterVar.DataPar]
    if len(spatial) == len(loops):
        last = plan.get(loops[-1]).extent
        if len(loops) > 1:
            plan.parallel(plan.fuse(*loops[:-1]))
        if hasattr(last, "value"):
            if last.value % lanes == 0 and last.value > lanes:
                plan.vectorize(plan.split(loops[-1], [None, lanes])[1])
            elif last.value <= lanes and last.value & (last.value - 1) == 0 and last.value > 1:
                plan.vectorize(loops[-1])
    elif spatial and spatial == loops[: len(spatial)]:
        plan.parallel(plan.fuse(*spatial))
