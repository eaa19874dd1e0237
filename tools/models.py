"""MODEL on the command line and in `optimize`: a file, a saved result, hf:, timm:, py:, zoo:, or a module in hand."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ir.capture import capture
from ..ir.errors import InputFileError, UsageError, near
from ..ir.graph import Flat, Graph, quiet
from ..ir.onnx.model import read_onnx, what_is
from ..ir.sizes import fixed, in_batches, token_count
from .calibration import read_npz
from .score import Run
from .zoo import ZOO, ZooModel, load_zoo, offline


@dataclass
class Loaded:
    """A captured model with inputs to run it on."""

    name: str
    graph: Graph
    inputs: list[Flat]
    """Flat inputs: the example first, then calibration batches."""
    module: nn.Module | None = None
    zoo: ZooModel | None = None
    made_up: bool = False
    """Whether the inputs are random ones, for want of any."""


def load_model(spec: str, inputs: str | None = None, example: Any = None) -> Loaded:
    """Load and capture what MODEL names. `inputs`: an .npz file or 'name=dtype[2,16],...' where the model brings none; example: of a file, a batch.

    Raises UsageError for an unknown kind of MODEL, InputFileError for a file that is missing, damaged or another kind.
    """
    kind, _, rest = spec.partition(":")
    if kind == "zoo" and rest:
        zoo = load_zoo(rest)
        return _capture(spec, zoo.module, (), named_inputs(inputs) or zoo.example, zoo, zoo.calibration)
    if kind == "hf" and rest:
        module, example = _transformers(rest)
        return _capture(spec, module, (), named_inputs(inputs) or example)
    if kind == "timm" and rest:
        loaded = _capture(spec, *_timm(rest, inputs))
        loaded.graph.notes.append(f"{spec} has random weights, for nothing is downloaded: sizes and times are right, quality says nothing")
        return loaded
    if kind == "py" and rest:
        return _capture(spec, *_python(rest, inputs))
    return _from_file(spec, inputs, example)


def _capture(name: str, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], zoo: ZooModel | None = None, batches: Iterable[Any] = ()) -> Loaded:
    graph = capture(module, args, kwargs)
    return Loaded(name, graph, [graph.flat_inputs(args, kwargs), *(as_flat(graph, b) for b in batches)], module, zoo)


def as_flat(graph: Graph, batch: Any) -> Flat:
    """One batch of a user's data as flat inputs: a dict of keyword arguments, a tuple of positional ones, or one tensor."""
    if isinstance(batch, Mapping):
        return graph.flat_inputs((), batch)
    return graph.flat_inputs(tuple(batch) if isinstance(batch, list | tuple) else (batch,))


def runner_of(module: Any) -> Run:
    """What a judge runs: a batch of named inputs -> the module's first output."""

    def run(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), quiet():
            return next(x for x in pytree.tree_leaves(module(**batch)) if isinstance(x, Tensor))

    return run


def at_length(run: Run, count: int | None) -> Run:
    """A runner of texts of any length up to `count`, over one of a program fixed at it: they are filled up, behind the mask, and the output is cut back."""
    if count is None:
        return run

    def filled_up(batch: dict[str, Tensor]) -> Tensor:
        ids = [name for name, t in batch.items() if t.dim() == 2 and not t.is_floating_point()]
        length = batch[ids[0]].shape[1] if ids else count
        if length == count:
            return run(batch)
        if length > count or not any("mask" in name for name in ids):
            raise UsageError(
                f"the model takes {count} tokens, and the data has {length}" + (", with no mask to hide what would fill them up" if length < count else "")
            )
        out = run({name: F.pad(t, (0, count - length)) if name in ids else t for name, t in batch.items()})
        return out[:, :length] if out.dim() > 1 and out.shape[1] == count else out

    return filled_up


def at_sizes(loaded: Loaded, sizes: Mapping[str, int]) -> Loaded:
    """A model with dynamic dims fixed, and its inputs brought to them (ir.sizes)."""
    if not sizes:
        return loaded
    graph = fixed(loaded.graph, sizes)
    example = [_made_up(graph, loaded.name)] if loaded.made_up else loaded.inputs[:1]  # a short one would be mostly padding
    return replace(loaded, graph=graph, inputs=list(in_batches(graph, [*example, *loaded.inputs[1:]])))


def own_metric(loaded: Loaded) -> Callable[[nn.Module], float] | None:
    """A zoo model's own metric on its calibration data, higher is better, for budgets; None for other models.

    Not on held-out data: what a budget chose by must not be what the result is judged by.
    """
    if loaded.zoo is None:
        return None
    judge, count = loaded.zoo.judge, token_count(loaded.graph)

    def metric(module: nn.Module) -> float:
        score = judge(at_length(runner_of(module), count), split="calibration")[0]
        return score.value if score.higher_is_better else -score.value

    return metric


def _from_file(spec: str, inputs: str | None, example: Any) -> Loaded:
    path = Path(spec)
    if path.is_dir():
        from ..ir.save import load_graph

        graph = load_graph(path)
    elif not path.exists():
        looks_like_file = path.suffix in (".onnx", ".pt2") or "/" in spec
        if looks_like_file:
            raise InputFileError(f"no file {spec}")
        raise UsageError(
            f"{spec!r} is no model: give a .pt2 file, a saved result folder, hf:NAME, timm:NAME, py:module:callable or "
            f"zoo:NAME.{near(spec, [f'zoo:{n}' for n in ZOO])}"
        )
    elif path.suffix in (".pt2", ".onnx"):
        graph = capture(path)
    else:
        with open(path, "rb") as file:
            raise InputFileError(f"{spec} is {what_is(file.read(8))}; expected .pt2, .onnx or a saved result folder")
    given = named_inputs(inputs) or example
    if given is not None:
        return Loaded(spec, graph, [as_flat(graph, given)])
    return Loaded(spec, graph, [_made_up(graph, spec)], made_up=True)


def _made_up(graph: Graph, spec: str) -> Flat:
    return runnable_inputs(graph, spec) if spec.endswith(".onnx") else random_inputs(graph)


def runnable_inputs(graph: Graph, spec: str) -> Flat:
    """Random inputs that a file's graph takes: integers may be indices into something small, or divide something. Raises UsageError."""
    why: Exception | None = None
    for most in (100, 2, 1, None):
        flat = random_inputs(graph, most=most or 1)
        flat = flat if most is not None else tuple(t if t.is_floating_point() else torch.ones_like(t) for t in flat)
        try:
            graph.run(flat)
            return flat
        except Exception as error:  # whatever an operator says of numbers it does not take
            why = error
    raise UsageError(f"{spec} does not run on made inputs ({str(why).splitlines()[0][:160]}); give some: --inputs data.npz, or example_inputs") from why


def random_inputs(graph: Graph, seed: int = 0, most: int = 100) -> Flat:
    """Inputs of the example sizes: random integers below `most` (masks are ones), unit normal floats."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for node in graph.inputs:
        value = node.meta["val"]
        made.append(random_input(str(node.target), [graph.size(s) for s in value.shape], value.dtype, generator, most))
    return tuple(made)


def random_input(name: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator | None = None, most: int = 100) -> Tensor:
    """Random integers below `most`, unit normal floats; ones for what is called a mask."""
    if "mask" in name or dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.randint(0, most, shape, generator=generator).to(dtype)


def check_onnx(path: Path) -> Any:
    """Read an ONNX file as an onnx_ir model. Raises InputFileError when it is missing, unsound, unsafe or not one."""
    return read_onnx(path).model


_INPUT = re.compile(r"(?P<name>\w+)=(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\]")


def named_inputs(spec: str | None) -> dict[str, Tensor]:
    """--inputs: the arrays of an .npz file, or random tensors of 'name=dtype[2,16],...' (ints are small, masks ones)."""
    if not spec:
        return {}
    if spec.endswith(".npz"):
        return read_npz(spec)
    found = list(_INPUT.finditer(spec))
    if not found or "".join(m.group(0) for m in found) != re.sub(r"\]\s*,\s*", "]", spec):
        raise UsageError(f"--inputs {spec!r} is not 'name=dtype[2,16],...' or an .npz file")
    made = {}
    for m in found:
        dtype = getattr(torch, m["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"--inputs names the dtype {m['dtype']!r}; expected one like float32 or int64")
        shape = [int(s) for s in m["shape"].split(",") if s.strip()]
        made[m["name"]] = random_input(m["name"], shape, dtype)
    return made


def _transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A local transformers model (folder or cached name; nothing is downloaded) with example inputs from its config."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("hf: models need the package transformers; install rewright[hf]") from error
    try:
        with offline():
            model = transformers.AutoModel.from_pretrained(name, local_files_only=True).eval()
    except OSError as error:
        raise InputFileError(f"hf:{name} is neither a folder with a transformers model nor in the local cache: {str(error).splitlines()[0][:200]}") from error
    model.config.use_cache = False
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(model.config, "image_size", 224)
        return model, {"pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3), size, size)}
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _timm(name: str, inputs: str | None) -> tuple[nn.Module, tuple, dict[str, Any]]:
    from .torchvision_stand_in import torchvision_stand_in

    try:
        with torchvision_stand_in():
            import timm  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(f"timm: models need the package timm ({error})") from error
    try:
        model: Any = timm.create_model(name, pretrained=False).eval()
    except RuntimeError as error:
        raise UsageError(f"timm has no model {name!r}") from error
    given = tuple(named_inputs(inputs).values())
    return model, given or (torch.randn(2, *model.default_cfg["input_size"]),), {}


def _python(place: str, inputs: str | None) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """py:module:callable runs the user's own code: it returns a module, or (module, args) or (module, kwargs)."""
    module_name, _, function = place.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function or "model")
    except ModuleNotFoundError as error:
        raise UsageError(f"py:{place}: no module named {error.name!r} on the Python path") from error
    except AttributeError as error:
        raise UsageError(f"py:{place}: module {module_name} has no {function or 'model'!r}") from error
    made = made() if callable(made) and not isinstance(made, nn.Module) else made
    model, example = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"py:{place} gave a {type(model).__name__}; expected an nn.Module, (module, args) or (module, kwargs)")
    if given := named_inputs(inputs):
        return model, (), given
    if isinstance(example, Mapping):
        return model, (), dict(example)
    if example is None:
        raise UsageError(f"py:{place} gave no example inputs; return (module, inputs) from it, or give --inputs")
    return model, tuple(example) if isinstance(example, list | tuple) else (example,), {}
