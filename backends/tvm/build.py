"""A Graph as a TVM library for a CPU: compiled, run on torch tensors without copies, saved as a folder that needs TVM's runtime alone."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ... import __version__
from ...ir.errors import UsageError
from ...ir.files import digest, replacing
from ...ir.graph import Graph
from ..target import cpu_features
from . import runtime
from .compat import TVM, llvm_target, needed, relax, tvm
from .convert import Program, aligned, convert, tensors
from .gemm import lanes_of
from .schedule import schedule

_NUMBERS = itertools.count()

_THREADS = 0
"""What TVM's pool was last set to."""


@dataclass(frozen=True)
class Compiled:
    """A program that runs: flat tensors in, flat tensors out, any of the sizes the graph allows."""

    executable: Any
    inputs: list[dict[str, Any]]
    """Name, dtype and shape (numbers, and names of dynamic dims) of each."""
    in_torch: Mapping[str, str]
    """Node -> op of what runs in torch, for want of a converter."""
    seconds: float
    """Compilation took."""
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        machine = relax.VirtualMachine(self.executable, tvm.cpu())
        object.__setattr__(self, "_main", machine["main"])

    def __call__(self, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run once; results own their memory."""
        _share_threads()
        found = self._main(*(aligned(x.detach()) for x in flat))  # type: ignore[attr-defined]
        return tuple(torch.from_dlpack(y) for y in found)

    def profile(self, flat: Sequence[Tensor], rounds: int = 10) -> dict[str, dict[str, float]]:
        """Kernel -> calls and processor milliseconds of one run; the time to measure a call, some microseconds, counts as its own."""
        machine = relax.VirtualMachine(self.executable, tvm.cpu())
        main, given = machine["main"], [aligned(x.detach()) for x in flat]
        calls, spent, begin = Counter[str](), defaultdict[str, float](float), 0.0

        def watch(function: Any, name: str, before: bool, result: Any, *given: Any) -> None:
            nonlocal begin
            if before:
                begin = time.process_time()
            else:
                spent[name] += time.process_time() - begin
                calls[name] += 1

        for _ in range(2):
            main(*given)
        machine.set_instrument(watch)
        for _ in range(rounds):
            machine["main"](*given)
        return {name: {"calls": calls[name] // rounds, "ms": spent[name] / rounds * 1e3} for name in spent}

    def check_complete(self) -> None:
        """Raises UsageError if the program could not be saved: a part runs in torch, or nothing here can link it."""
        if self.in_torch:
            raise UsageError(f"the program can't leave this process: {', '.join(sorted(set(self.in_torch.values())))} run in torch, for want of a converter")
        if not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise UsageError("a program is linked by a C++ compiler, and there is none: install g++")

    def save(self, folder: str | Path) -> Path:
        """Write a folder: program.so with code and weights, manifest.json, and run.py, which loads it with TVM's runtime alone.

        Raises UsageError where a part runs in torch, ResourceError when it can't be written; what was there before then stays.
        """
        self.check_complete()
        folder = Path(folder)
        with replacing(folder) as temporary:
            temporary.mkdir()
            with runtime.silence():
                self.executable.export_library(str(temporary / runtime.LIBRARY))
            manifest = {
                "rewright": __version__,
                "tvm": TVM,
                "inputs": self.inputs,
                "cpu": sorted(needed(self.features)),
                "sha256": digest(temporary / runtime.LIBRARY),
            }
            (temporary / runtime.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf8")
            shutil.copyfile(runtime.__file__, temporary / "run.py")
        return folder


def compile_graph(graph: Graph, features: Collection[str] | None = None) -> Compiled:
    """Compile for a CPU with these features (default: this machine's, which alone can run it). Raises UsageError where TVM can't."""
    begin = time.perf_counter()
    features = cpu_features() if features is None else features
    try:
        program = convert(graph, features, _register)
        try:
            executable = _built(program, features, fuse=True)
        except tvm.error.InternalError:  # its fusion loses sizes that occur only inside others, as in some convolutional nets
            executable = _built(program, features, fuse=False)
    except (tvm.error.InternalError, NotImplementedError) as error:
        raise UsageError(f"TVM can't compile this program ({str(error).strip().splitlines()[-1][:200]}); choose another backend") from error
    return Compiled(executable, [_described(graph, n) for n in graph.inputs], program.in_torch, time.perf_counter() - begin, tuple(sorted(features)))


def _built(program: Program, features: Collection[str], fuse: bool) -> Any:
    steps = relax.transform

    @tvm.transform.module_pass(opt_level=0)
    def add_kernels(module: Any, _: Any) -> Any:
        for name, function in program.kernels.items():  # after the passes over Relax, which want functions made of blocks
            module[name] = function.with_attr("global_symbol", name)
        return module

    passes = [
        *((steps.AnnotateTIROpPattern(), steps.FuseOps(), steps.FuseTIR()) if fuse else ()),  # pointwise chains become one loop
        *(steps.ToNonDataflow(), steps.RemovePurityChecking(), steps.CallTIRRewrite()),
        schedule(lanes_of(features)),
        *(steps.StaticPlanBlockMemory(), steps.LowerAllocTensor(), steps.KillAfterLastUse()),
        *(steps.LowerRuntimeBuiltin(), steps.ComputePrimValue(), steps.VMShapeLower(), steps.AttachGlobalSymbol()),
        add_kernels,
    ]
    return relax.build(program.module, target=tvm.target.Target(llvm_target(features)), relax_pipeline=tvm.transform.Sequential(passes))


def _share_threads() -> None:
    """TVM's own pool runs on as many threads as torch is set to, and no more than the cores TVM counts."""
    global _THREADS
    if (threads := torch.get_num_threads()) != _THREADS:
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        _THREADS = threads


def _described(graph: Graph, node: fx.Node) -> dict[str, Any]:
    value = node.meta["val"]
    names = {s.node.expr: name for name, s in graph.symbols.items()}
    shape = [names.get(s.node.expr, str(s)) if isinstance(s, torch.SymInt) else int(s) for s in value.shape]
    return {"name": graph.call.names[graph.inputs.index(node)], "dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def _register(node: fx.Node) -> str:
    """A node's op as a function TVM can call: (operands, [sizes], results), all in torch's memory."""
    name = f"rewright.torch.{next(_NUMBERS)}"
    inputs = node.all_input_nodes
    with_sizes = any(isinstance(n.meta.get("val"), torch.SymInt) for n in inputs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]

    def run(*given: Any) -> None:
        results = [torch.from_dlpack(y) for y in given[len(given) - len(tensors(node.meta["val"])) :]]
        operands = iter(given)
        values: dict[fx.Node, Any] = {n: torch.from_dlpack(next(operands)) for n in inputs if isinstance(n.meta.get("val"), Tensor)}
        sizes = iter(next(operands) if with_sizes else ())
        values.update({n: int(next(sizes)) for n in inputs if isinstance(n.meta.get("val"), torch.SymInt)})
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # type: ignore[misc]
        with torch.no_grad():
            found = target(*args, **kwargs)
        for result, value in zip(results, tensors(found), strict=True):
            result.copy_(value)

    tvm.register_global_func(name, run, override=True)
    return name
