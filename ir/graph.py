"""What a program is: a flat torch.fx graph of ATen ops and ours, its weights, its dynamic dims, its original call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from . import ops as ops  # registers torch.ops.rewright
from .call import Call, CallCodeGen

Flat = tuple[Tensor, ...]
"""The tensors of one call, in the order of `Graph.inputs`."""

UNTOLD = 16
"""What a length is taken for that is known only when the program has run (a search's hits, an ONNX node of unknown sizes)."""

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension: its example size and the range the capture allows."""

    name: str
    example: int
    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How a new weight was made: `function(*sources)`, so that a graph captured without weights can be filled later."""

    function: Callable[..., Tensor]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """What of an ONNX file the graph does not hold itself, and a file written of it keeps."""

    inputs: Mapping[str, str]
    """Name of an argument -> the file's own name of that input."""
    outputs: tuple[str, ...]
    weights: Mapping[str, str]
    """Weight -> the file's own name of it."""
    opset: int
    metadata: Mapping[str, str]
    external: bool
    """Whether weights lay in a file beside it."""


@dataclass
class Graph:
    """A program that runs, differentiates and prints after every edit (DESIGN 2).

    `module` is a plain fx.GraphModule with the original's parameter names and call signature; weights are `get_attr`
    nodes. `node.meta` holds `val` (a fake tensor: shape, dtype, symbolic sizes) and `path` (the module it came from).
    """

    module: fx.GraphModule
    call: Call
    dims: dict[str, Dim]
    recipes: dict[str, Recipe] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Remarks of the capture a user should see."""
    canonical: bool = False
    fake_mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))
    symbols: dict[str, torch.SymInt] = field(default_factory=dict)
    """Dim name -> the SymInt that stands for it in `meta["val"]`."""
    known: dict[tuple, Any] = field(default_factory=dict, repr=False)
    """What `infer` found for calls seen before: equal layers are inferred once. Shared by clones."""
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Weight name -> the other names the original model has for the same weight: a checkpoint may know it by one of them only."""
    source: Source | None = None
    """Of an imported ONNX file."""

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def fx(self) -> fx.Graph:
        """The torch.fx graph itself."""
        return self.module.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders, in the order of `call.names`."""
        return self.fx.find_nodes(op="placeholder")

    @property
    def nodes(self) -> list[fx.Node]:
        """Everything that computes, in order."""
        return [n for n in self.fx.nodes if n.op == "call_function"]

    @property
    def output(self) -> fx.Node:
        """The output node; its single argument is the tuple of flat outputs."""
        return self.fx.output_node()

    def find(self, *targets: Any) -> list[fx.Node]:
        """All nodes that call one of these op overloads, in graph order."""
        found = [n for t in targets for n in self.fx.find_nodes(op="call_function", target=t, sort=False)]
        return sorted(found)

    def is_weight(self, node: Any) -> bool:
        """Whether the value is a weight or constant of the graph."""
        return isinstance(node, fx.Node) and node.op == "get_attr"

    def weight(self, node: fx.Node | str) -> Tensor:
        """The tensor behind a weight node or name (on the meta device for a graph captured without weights)."""
        owner, leaf = owner_of(self.module, node if isinstance(node, str) else str(node.target))
        return getattr(owner, leaf)

    def weights(self) -> dict[str, Tensor]:
        """All weights the graph reads, by name; a tied weight appears under the name that is read."""
        return {str(n.target): self.weight(n) for n in self.fx.find_nodes(op="get_attr")}

    def weight_bytes(self) -> int:
        """Bytes of all distinct weights."""
        return sum({id(t): t.nbytes for t in self.weights().values()}.values())

    @property
    def on_meta(self) -> bool:
        """Whether any weight has no data."""
        return any(t.is_meta for t in self.weights().values())

    def size(self, value: Any) -> int:
        """An int for a size that may be symbolic: its value at the example sizes. A length that only data tell counts as `UNTOLD`, for estimates."""
        if isinstance(value, torch.SymInt):
            return UNTOLD if value.node.hint is None else int(value.node.hint)
        return int(value)

    # -- editing ----------------------------------------------------------------------------------------------------

    def add_weight(self, name: str, function: Callable[..., Tensor], *sources: str, like: fx.Node | None = None) -> fx.Node:
        """A new weight `function(*sources)` as a node before everything that computes. The old ones stay until unused.

        How it was made is remembered, for graphs captured without data; what holds much data of its own goes through `add_constant`.
        """
        name = self._free_name(name)
        with torch.no_grad():
            value = function(*(self.weight(s).detach() for s in sources))
        self.recipes[name] = Recipe(function, sources)
        return self._register(name, value, like)

    def add_constant(self, name: str, value: Tensor, like: fx.Node | None = None) -> fx.Node:
        """A new constant that does not come from other weights."""
        return self._register(self._free_name(name), value, like)

    def _free_name(self, name: str) -> str:
        candidate, n = name, 1
        while self.has_weight(candidate):
            candidate, n = f"{name}_{n}", n + 1
        return candidate

    def has_weight(self, name: str) -> bool:
        """Whether the graph holds a tensor (or has a module) of that name."""
        try:
            owner, leaf = owner_of(self.module, name)
        except AttributeError:
            return False
        return hasattr(owner, leaf)

    def _register(self, name: str, value: Tensor, like: fx.Node | None) -> fx.Node:
        owner, leaf = owner_of(self.module, name, create=True)
        if value.is_floating_point() and value.dtype.itemsize > 1:  # an 8-bit float is a code, nothing to train
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=True))
        else:
            owner.register_buffer(leaf, value)
        first = next(iter(self.fx.nodes))
        with self.fx.inserting_before(first):  # weights stand first, so that any edit may read them
            node = self.fx.get_attr(name)
        node.meta["val"] = self.fake(getattr(owner, leaf))
        node.meta["path"] = like.meta.get("path", "") if like is not None else name.rpartition(".")[0]
        return node

    def fake(self, tensor: Tensor) -> Tensor:
        """The static fake twin of a real tensor under this graph's fake mode."""
        with self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu" if tensor.is_meta else tensor.device)

    def insert(self, target: Any, *args: Any, before: fx.Node, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call before `before`, with its `val` computed and the provenance of `like` (default: of `before`)."""
        with self.fx.inserting_before(before):
            name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else target.__name__
            node = self.fx.create_node("call_function", target, args, kwargs, name=name)
        node.meta["path"] = (like or before).meta.get("path", "")
        self.infer(node)
        return node

    def infer(self, node: fx.Node) -> None:
        """Compute `meta["val"]` of a call from its operands' fake values."""
        made_of = _made_of(node)
        if made_of not in self.known:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])  # type: ignore[misc]
            target: Any = node.target
            with self.fake_mode, torch.no_grad(), enable_python_dispatcher() if _may_pad(node) else contextlib.nullcontext():
                try:
                    _FAKE_LOG.disabled = True  # it would print the failure answered below
                    self.known[made_of] = target(*args, **kwargs)
                except RuntimeError:  # baddbmm and others take symbolic sizes only through their Python decompositions, which are slow
                    with enable_python_dispatcher():
                        self.known[made_of] = target(*args, **kwargs)
                finally:
                    _FAKE_LOG.disabled = False
        node.meta["val"] = self.known[made_of]
        node.meta["inferred"] = node.meta["val"], made_of

    def is_inferred(self, node: fx.Node) -> bool:
        """Whether `meta["val"]` was computed from the call as it stands: same op, same literals, operands of the same types."""
        value, made_of = node.meta.get("inferred", (None, None))
        return value is node.meta.get("val") and made_of == _made_of(node)

    def clean(self) -> int:
        """Drop dead calls and unused weights, check the graph, regenerate its code. Returns the number of dropped calls."""
        dead = 0
        for node in reversed(self.fx.nodes):
            if node.users or node.op in ("placeholder", "output"):
                continue
            if node.op == "call_function" and node.is_impure():
                continue
            dead += node.op == "call_function"
            self.fx.erase_node(node)
        _prune(self.module, {str(n.target) for n in self.fx.find_nodes(op="get_attr")})
        self.recompile()
        return dead

    def recompile(self) -> None:
        """Regenerate `module.forward` after edits; raises if the graph is malformed."""
        self.fx.lint()
        self.module.recompile()

    def clone(self) -> Graph:
        """An independent graph that shares the weights (no edit ever writes into a weight)."""
        twin = self.draft()
        twin.recompile()
        return twin

    def draft(self) -> Graph:
        """A clone to be edited: its `module` has no generated code before `clean` or `recompile` (which take most of a clone's time)."""
        copy = fx.Graph()
        output = copy.graph_copy(self.fx, {})
        copy.output(output)
        copy.output_node().meta.update(self.output.meta)
        copy._codegen = CallCodeGen(self.call)
        twin = fx.GraphModule(nn.Module(), fx.Graph())
        twin.training = self.module.training
        for name in (str(n.target) for n in copy.find_nodes(op="get_attr")):
            share_weight(self.module, twin, name)
        twin._graph, copy.owning_module = copy, twin
        shared = self.fake_mode, self.symbols, self.known, self.ties, self.source
        return Graph(twin, self.call, dict(self.dims), dict(self.recipes), list(self.notes), self.canonical, *shared)

    # -- running ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def flat_inputs(self, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """The flat tensors of a call, in the order of `inputs`."""
        return self.call.flatten(self.call.bind(args, kwargs or {}), {})

    def run(self, flat: tuple[Tensor, ...]) -> tuple:
        """Flat inputs -> flat outputs."""
        with torch.no_grad():
            return fx.Interpreter(self.module).run(*flat, enable_io_processing=False)

    def propagate(self) -> None:
        """Recompute every `meta["val"]` from the inputs' and the weights: shapes, dtypes, symbolic sizes."""
        with quiet():
            for node in self.fx.nodes:
                if node.op == "get_attr":
                    node.meta["val"] = self.fake(self.weight(node))
                elif node.op == "call_function":
                    self.infer(node)

    def add_dim(self, dim: Dim) -> torch.SymInt:
        """A dynamic dimension and its symbol, to be used in the shapes of inputs before `propagate`."""
        from torch._dynamo.source import ConstantSource  # takes a second to import

        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake = self.fake_mode.from_tensor(torch.empty(dim.example), symbolic_context=context, source=ConstantSource(dim.name))
        size: Any = fake.shape[0]
        self.dims[dim.name], self.symbols[dim.name] = dim, size
        return size

    def materialize(self, weights: Mapping[str, Tensor]) -> None:
        """Fill a graph captured on the meta device: original weights by name, ours by their recipes. KeyError if one is missing.

        Holds all of them; `ir.stream` runs and rewrites without.
        """
        filled: dict[int, Tensor] = {}  # by the weight they replace, so that tied ones stay tied
        for name, old in self.weights().items():
            if old.is_meta:
                owner, leaf = owner_of(self.module, name)
                if id(old) not in filled:
                    new = self.weight_from(name, weights).detach()
                    filled[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
                store: Any = owner._parameters if isinstance(old, nn.Parameter) else owner._buffers
                store[leaf] = filled[id(old)]

    def weight_from(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """A weight's tensor: its own data, made by its recipe, or from `weights` by its name or one tied to it. KeyError if it is missing."""
        own = self.weight(name) if self.has_weight(name) else None
        if own is not None and not own.is_meta:
            return own
        if (recipe := self.recipes.get(name)) is not None:
            with torch.no_grad():
                return recipe.function(*(self.weight_from(s, weights).detach() for s in recipe.sources))
        return weights[self.stored_name(name, weights)]

    def stored_name(self, name: str, weights: Container[str]) -> str:
        """The name by which `weights` has an original weight: its own, or one the original model tied to it."""
        return name if name in weights else next((other for other in self.ties.get(name, ()) if other in weights), name)


def _made_of(node: fx.Node) -> tuple:
    """What `meta["val"]` follows from. Operands count by type, so renaming or replacing one by its equal changes nothing."""
    literals = fx.map_arg((node.args, node.kwargs), lambda n: "%")
    return node.target, str(literals), tuple(_type(n) for n in node.all_input_nodes)


def _may_pad(node: fx.Node) -> bool:
    """Whether constant_pad_nd may meet symbolic sizes: but for its Python decomposition it makes them their examples' numbers, for the whole graph."""
    target: Any = node.target
    if getattr(target, "namespace", "") != "rewright" and target not in (torch.ops.aten.constant_pad_nd.default, torch.ops.aten.pad.default):
        return False
    values = (n.meta.get("val") for n in node.all_input_nodes)
    return any(isinstance(s, torch.SymInt) for v in values if isinstance(v, Tensor) for s in v.shape)


def _type(node: fx.Node) -> Any:
    """dtype, device and sizes of a node's value, hashable; computed once for a value."""
    value = node.meta.get("val")
    known = node.meta.get("type")
    if known is None or known[0] is not value:
        known = node.meta["type"] = (value, _type_of(value))
    return known[1]


def _type_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(_type_of(s) for s in value.shape)
    if isinstance(value, list | tuple):
        return tuple(_type_of(v) for v in value)
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule over `root`'s weights that keeps non-persistent buffers out of the state_dict."""
    module = fx.GraphModule(root, graph)
    transient = {name for name, _ in root.named_buffers()} - set(root.state_dict(keep_vars=True))
    for name, _ in list(module.named_buffers()):
        if name in transient:
            owner, leaf = owner_of(module, name)
            owner._non_persistent_buffers_set.add(leaf)
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's warnings about things we do on purpose."""
    import warnings

    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def share_weight(source: nn.Module, twin: nn.Module, name: str) -> None:
    """Register one parameter or buffer of `source` in `twin` under its name: the same object, persistent if it was."""
    old, leaf = owner_of(source, name)
    new, _ = owner_of(twin, name, create=True)
    if leaf in old._parameters:
        new._parameters[leaf] = old._parameters[leaf]
    else:
        new.register_buffer(leaf, getattr(old, leaf), persistent=leaf not in old._non_persistent_buffers_set)


def owner_of(module: nn.Module, name: str, create: bool = False) -> tuple[nn.Module, str]:
    """The submodule that holds a dotted name, made where it is missing if `create`, and the last part of the name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if create and not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    return module, leaf


def _prune(module: nn.Module, used: set[str]) -> None:
    """Delete weights no node reads, and the submodules left empty."""
    for path, child in list(module.named_modules(remove_duplicate=False)):
        prefix = f"{path}." if path else ""
        for store in (child._parameters, child._buffers):
            for leaf in [x for x in store if prefix + x not in used]:
                del store[leaf]
    for _, child in sorted(module.named_modules(), key=lambda item: -item[0].count(".")):
        for name, grandchild in list(child._modules.items()):
            if grandchild is not None and not any(True for _ in grandchild.parameters()) and not any(True for _ in grandchild.buffers()):
                del child._modules[name]
