"""Graph -> Relax: products, norms and attention as our own kernels with what surrounds them fused in, the rest as TE.

Every value's shape and dtype come from the graph's own metadata, so that nothing is inferred twice. Sizes stay symbolic: the kernels
walk any number of rows, and one program serves all shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ...ir.formats import unpack
from ...ir.graph import Graph
from ...ir.nodes import arguments, same_shape
from ...ir.ops.linear_nbits import group_values
from . import elementwise, images
from .compat import relax, te, tvm
from .converters import CONVERTERS, SPLITS, UNLESS, count_of
from .gemm import Plan, Product, lanes_of, pack, pack_channels, pack_codes
from .images import CONVOLUTIONS, NORMS, is_one, last_of
from .nbits import Grouped, pack_groups
from .rows import Sink, quantize

tirx = tvm.tirx
aten, ours = torch.ops.aten, torch.ops.rewright

DTYPES = elementwise.TYPES

VIEWS = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten._unsafe_view.default, aten.unflatten.int, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
    aten.dropout.default, aten.lift_fresh_copy.default,
}  # fmt: skip
"""The same values in the same order."""

ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    ours.quick_gelu.default: "quick_gelu",
    aten.hardsigmoid.default: "hard_sigmoid",
    aten.hardswish.default: "hard_swish",
    aten.relu6.default: "relu6",
}

KERNELS = {
    aten.linear.default, aten.layer_norm.default, aten.conv1d.default, aten.conv2d.default, ours.add_layer_norm.default, ours.add_rms_norm.default,
    ours.attention.default, ours.multi_head_attention.default, ours.rms_norm.default, ours.linear_token.default, ours.linear_int8_static.default,
    ours.linear_nbits.default, aten.adaptive_avg_pool2d.default, aten.max_pool2d.default, aten.avg_pool2d.default,
}  # fmt: skip
"""Computed in float32 only."""

PRODUCTS = {aten.linear.default, ours.linear_token.default, ours.linear_int8_static.default, ours.linear_nbits.default}


@dataclass
class Program:
    """What `convert` gives: a Relax module with a function `main` that holds the weights, and kernels it calls by name."""

    module: Any
    kernels: dict[str, Any]
    in_torch: dict[str, str]
    """Node -> op, of what runs in torch."""


@dataclass(frozen=True)
class Read:
    """How an int8 product reads its operand: codes with a step a row, or on a fixed grid of this step and zero point."""

    high: int = 127
    step: float | None = None
    zero: int = 128

    @property
    def sink(self) -> Sink:
        """What a kernel does for it."""
        return Sink(self.high, self.step is not None)


@dataclass
class Fused:
    """A product with what follows it in its epilogue; `end` is the node whose value it gives."""

    product: fx.Node
    end: fx.Node
    activation: str | None = None
    residual: fx.Node | None = None
    after: str | None = None
    """An activation behind the addition."""
    norm: fx.Node | None = None
    """A batch norm before all of these, part of a convolution's weights."""


def why_not(node: fx.Node) -> str | None:
    """Why a node of a graph has no converter, or None."""
    values = [v for n in (node, *node.all_input_nodes) for v in tensors(n.meta.get("val"))]
    if odd := sorted({str(v.dtype).removeprefix("torch.") for v in values if v.dtype not in DTYPES}):
        return f"{_name(node.target)} of {', '.join(odd)}"
    target = node.target
    if target in UNLESS and (reason := UNLESS[target](node)) is not None:
        return f"{_name(target)}: {reason}"
    if not isinstance(target, torch._ops.OpOverload) or target in CONVERTERS or target in VIEWS or target in PRODUCTS or elementwise.why_not(node) is None:
        return None
    return _name(target)


def convert(graph: Graph, features: Collection[str], torch_op: Callable[[fx.Node], str]) -> Program:
    """The program for a CPU with these features. `torch_op` registers a node without a converter as a function and gives its name."""
    return Converter(graph, features, torch_op).run()


@dataclass
class Converter:
    graph: Graph
    features: Collection[str]
    torch_op: Callable[[fx.Node], str]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    flat: dict[fx.Node, Any] = field(default_factory=dict)
    """The same values as [rows, channels], as our kernels make them; only who wants another shape pays for it."""
    last: dict[fx.Node, Any] = field(default_factory=dict)
    """Values with their channels last, [n, *space, channels], as kernels of images make them, likewise."""
    codes: dict[tuple[fx.Node, Read], tuple[Any, ...]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)
    stored: dict[Any, Any] = field(default_factory=dict)
    fused: dict[fx.Node, Fused] = field(default_factory=dict)
    """By product and by end."""
    in_torch: dict[str, str] = field(default_factory=dict)
    done: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.block = relax.BlockBuilder()
        self.symbols: dict[sympy.Symbol, Any] = {}
        self.lanes = lanes_of(self.features)

    # -- the walk ----------------------------------------------------------------------------------------------------

    def run(self) -> Program:
        self._fuse()
        inputs = []
        for node in self.graph.inputs:
            value = node.meta["val"]
            self.values[node] = relax.Var(node.name, self.type(value.shape, value.dtype))
            inputs.append(self.values[node])
        with self.block.function("main"):
            with self.block.dataflow():
                for node in self.graph.nodes:
                    if isinstance(node.meta.get("val"), Tensor | tuple | list) and not self._waits(node):
                        self.compute(node)
                results = [self.value(n) for n in self.graph.output.args[0]]  # type: ignore[union-attr]
                out = self.block.emit_output(relax.Tuple(results))
            self.block.emit_func_output(out, params=inputs)
        return Program(self.block.get(), self.kernels, self.in_torch)

    def _waits(self, node: fx.Node) -> bool:
        """Nodes that are only computed when somebody reads them: parts of others, and what a kernel takes in."""
        if node in self.fused:
            return self.fused[node].end is not node
        return node.target in SPLITS or getattr(node.target, "__name__", "") == "getitem"

    def value(self, node: fx.Node) -> Any:
        """The value of a node in its own shape, computed here if it was not."""
        self.compute(node)
        if node not in self.values:
            self.values[node] = images.channels_first(self, node) if node in self.last else self.reshaped(self.flat[node], node.meta["val"].shape)
        return self.values[node]

    def compute(self, node: fx.Node) -> None:
        """Emit what gives a node's value, in one form or another, unless that was done."""
        if node in self.values or node in self.flat or node in self.last or node in self.done:
            return
        self.done.add(node)
        if self.graph.is_weight(node):
            found = self.weight(node.target, lambda: self.graph.weight(node))
        elif (fused := self.fused.get(node)) is not None:
            found = images.convolution(self, fused) if fused.product.target in CONVOLUTIONS else self._product(fused)
        elif getattr(node.target, "__name__", "") == "getitem":
            found = self._part(node)
        elif node.target in VIEWS:
            found = self._view(node, node.args[0])  # type: ignore[arg-type]
        elif self.why_not(node) is not None:
            found = self._in_torch(node)
        elif node.target in CONVERTERS:
            found = CONVERTERS[node.target](self, node, arguments(node))
        else:
            found = self._elementwise(node)
        if found is not None:
            self.values[node] = found

    def _view(self, node: fx.Node, source: fx.Node) -> Any:
        """Channels stay last where a view keeps them an axis."""
        self.compute(source)
        shape, before = node.meta["val"].shape, source.meta["val"].shape
        if source in self.last and len(shape) > 2 and same_shape(shape[:2], before[:2]):
            self.last[node] = self.last[source] if same_shape(shape, before) else self.reshaped(self.last[source], last_of(shape))
            return None
        return self.reshaped(self.value(source), shape)

    def _part(self, node: fx.Node) -> Any:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        whole = source.args[0]
        if source.target is aten.unbind.int:
            axis = arguments(source)["dim"] % len(whole.meta["val"].shape)  # type: ignore[union-attr]
            return self.te(node.meta["val"].shape, lambda x: lambda *i: x(*i[:axis], index, *i[axis:]), self.value(whole))  # type: ignore[arg-type]
        if source.target in SPLITS:
            _, axis, start = self.window(node)
            return self.sliced(self.value(whole), node, axis, start)  # type: ignore[arg-type]
        self.compute(source)
        if node in self.flat or node in self.values or source not in self.values:
            return None
        return self.values[source][index]

    def why_not(self, node: fx.Node) -> str | None:
        """Why a node has no converter here, or None."""
        if node.target in KERNELS and any(v.dtype is torch.float64 for v in tensors(node.meta["val"])):
            return f"{_name(node.target)} of float64"
        if node.target in PRODUCTS or node.target in NORMS:
            given = {name: a for name, a in arguments(node).items() if isinstance(a, fx.Node) and name not in ("x", "input")}
            if computed := [name for name, a in given.items() if not self.graph.is_weight(a)]:
                return f"{_name(node.target)} whose {', '.join(computed)} is computed"
        return why_not(node)

    # -- what converters use -----------------------------------------------------------------------------------------

    def size(self, value: Any) -> Any:
        """An int64 expression of a size that may be symbolic."""
        if isinstance(value, torch.SymInt):
            return self._expression(value.node.expr)
        if isinstance(value, fx.Node):
            return self.size(value.meta["val"])
        return tirx.const(int(value), "int64")

    def _expression(self, e: Any) -> Any:
        if isinstance(e, sympy.Symbol):
            return self.symbols.setdefault(e, tirx.Var(str(e), "int64"))
        if isinstance(e, sympy.Integer | int):
            return tirx.const(int(e), "int64")
        parts = [self._expression(a) for a in e.args]
        name = type(e).__name__
        if name in ("Add", "Mul", "Min", "Max"):
            join = {"Add": lambda a, b: a + b, "Mul": lambda a, b: a * b, "Min": tirx.min, "Max": tirx.max}[name]
            return functools.reduce(join, parts)
        if name in ("FloorDiv", "CleanDiv", "IntTrueDiv"):
            return tirx.floordiv(*parts)
        if name in ("Mod", "PythonMod"):
            return tirx.floormod(*parts)
        if name == "CeilDiv":
            return tirx.floordiv(parts[0] + parts[1] - 1, parts[1])
        if name == "Pow" and isinstance(e.args[1], sympy.Integer) and e.args[1] > 0:
            return functools.reduce(lambda a, b: a * b, [parts[0]] * int(e.args[1]))
        raise NotImplementedError(f"a size is {e}")

    def shape(self, sizes: Sequence[Any]) -> tuple:
        """The expressions of a shape."""
        return tuple(self.size(s) for s in sizes)

    def type(self, sizes: Sequence[Any], dtype: torch.dtype | str) -> Any:
        """The Relax type of a tensor."""
        return relax.TensorType(self.shape(sizes), dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch."))

    def weight(self, key: Any, make: Callable[[], Tensor]) -> Any:
        """A constant of the program; `make` gives its tensor once a key."""
        if key not in self.stored:
            # as parameters, all would be checked at every call
            self.stored[key] = relax.const(tvm.runtime.from_dlpack(aligned(make().detach())))
        return self.stored[key]

    def te(self, shape: Sequence[Any], compute: Callable[..., Any], *values: Any) -> Any:
        """A value computed point by point: `compute(*buffers)(*indices)`."""

        def function(*buffers: Any) -> Any:
            return te.compute(self.shape(shape), compute(*buffers))

        return self.block.emit_te(function, *values)

    def reshaped(self, value: Any, shape: Sequence[Any]) -> Any:
        """The same values in another shape, without a copy."""
        return self.block.emit(relax.op.reshape(value, relax.ShapeExpr(self.shape(shape))))

    def rows(self, node: fx.Node) -> Any:
        """A value as [rows, channels]."""
        self.compute(node)
        if node not in self.flat:
            shape = node.meta["val"].shape
            self.flat[node] = self.value(node) if len(shape) == 2 else self.reshaped(self.value(node), (count_of(shape), shape[-1]))
        return self.flat[node]

    def emit(self, label: str, what: Any, build: Callable[[str], Any], given: Sequence[Any], kept: Sequence[fx.Node], node: fx.Node, read: Read | None) -> None:
        """A call of one of our kernels, equal ones built once, that gives the rows of the nodes `kept` and the codes of `node` as `read` wants them."""
        types = [self.type((count_of(n.meta["val"].shape), n.meta["val"].shape[-1]), "float32") for n in kept]
        if read is not None:
            count, width = count_of(node.meta["val"].shape), int(node.meta["val"].shape[-1])
            types.append(self.type((count, Sink.width(width)), "uint8"))
            if read.step is None:
                types.append(self.type((count,), "float32"))
            else:
                grid = torch.tensor([1 / read.step, read.zero])
                given = [*given, self.weight(read, lambda: grid)]
        result = self.kernel(label, what, build, given, types)
        parts = [result] if len(types) == 1 else [result[i] for i in range(len(types))]
        self.flat.update(zip(kept, parts))
        if read is not None:
            self.codes[node, read] = tuple(parts[len(kept) :])

    def kernel(self, label: str, what: Any, build: Callable[[str], Any], arguments: Sequence[Any], types: Sequence[Any]) -> Any:
        """The same with the types of its results."""
        if what not in self.names:
            name = f"{label}_{len(self.names)}"
            self.names[what], self.kernels[name] = name, build(name)
        out = list(types) if len(types) > 1 else types[0]
        return self.block.emit(relax.call_dps_packed(self.names[what], list(arguments), out))

    def sliced(self, value: Any, node: fx.Node, axis: int, start: Any, step: int = 1) -> Any:
        """Part of a value along an axis; the node says how much."""

        def compute(x: Any) -> Any:
            return lambda *i: x(*i[:axis], start + i[axis] * step, *i[axis + 1 :])

        return self.te(node.meta["val"].shape, compute, value)

    def window(self, node: fx.Node) -> tuple[fx.Node, int, Any]:
        """(source, axis, first index) of a part of a split value; (node, -1, 0) of any other."""
        source = node.args[0] if node.args else None
        if getattr(node.target, "__name__", "") != "getitem" or not isinstance(source, fx.Node) or source.target not in SPLITS - {aten.unbind.int}:
            return node, -1, 0
        whole = source.args[0]
        assert isinstance(whole, fx.Node)
        axis = arguments(source)["dim"] % whole.meta["val"].dim()
        before = source.meta["val"][: node.args[1]]
        return whole, axis, self.size(sum(v.shape[axis] for v in before))

    # -- products ----------------------------------------------------------------------------------------------------

    def _fuse(self) -> None:
        """Which activation and which addition behind every product become part of it."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            if not self._takes_in(node):
                continue
            found, passed = Fused(node, node), [node]
            user = _only_user(node)
            if node.target in CONVOLUTIONS and user is not None and self.why_not(user) is None and (result := images.normalised(user)) is not None:
                found.norm = user
                passed.extend(dict.fromkeys([user, result]))
                user = _only_user(result)
            if user is not None and (activation := _activation(user)) is not None:
                found.activation = activation
                passed.append(user)
                user = _only_user(user)
            if user is not None and user not in self.fused and user.target is aten.add.Tensor and arguments(user)["alpha"] == 1 and not _by_channel(node):
                others = [a for a in user.args[:2] if a is not passed[-1]]
                # another product of the same sum has its own kernel: the later one takes the addition in
                if len(others) == 1 and isinstance(other := others[0], fx.Node) and _same(other, passed[-1]) and not self._later(other, passed[-1], order):
                    found.residual = other
                    passed.append(user)
                    user = _only_user(user)
                    if user is not None and (activation := _activation(user)) is not None:
                        found.after = activation
                        passed.append(user)
            found.end = passed[-1]
            self.fused.update(dict.fromkeys(passed, found))

    def _takes_in(self, node: fx.Node) -> bool:
        """Whether a node is a product with an epilogue."""
        if node.target in CONVOLUTIONS:
            return self.why_not(node) is None and images.by_kernel(self, node)
        return node.target in PRODUCTS and self.why_not(node) is None

    def _later(self, other: fx.Node, this: fx.Node, order: dict[fx.Node, int]) -> bool:
        return (other.target in PRODUCTS or other.target in CONVOLUTIONS) and order.get(other, -1) > order[this]

    def _product(self, fused: Fused) -> None:
        """Emit a product: its rows at `end`, or codes if only quantized products read it."""
        node, a = fused.product, arguments(fused.product)
        x, out_shape = a["x"] if "x" in a else a["input"], fused.end.meta["val"].shape
        width, out = x.meta["val"].shape[-1], out_shape[-1]
        plan = Plan.of(self.features, int(out))
        bias = a.get("b", a.get("bias"))
        read = self.read_by(fused.end)
        quantized = node.target in (ours.linear_token.default, ours.linear_int8_static.default)
        stepped, grouped = True, node.target is ours.linear_nbits.default and a["bits"] == 4 and a["group_size"] % 2 == 0
        if grouped and read is not None and read.step is None:
            read = None  # one pass over the row would be one over all weights
        if quantized:
            grid = self.reads(node)
            assert grid is not None
            stepped = grid.step is None
            weight, scale = self.graph.weight(a["w"]), self.graph.weight(a["scale"])
            given = [
                *self.codes_of(x, grid),
                self.weight((a["w"], "codes", plan), lambda: pack_codes(weight, plan)),
                self.weight((node, "offset"), lambda: pack_channels(-grid.zero * weight.int().sum(1).to(torch.int32), plan)),
                self.weight((node, "scale"), lambda: pack_channels(scale.float() * (grid.step or 1.0), plan)),
            ]
        elif grouped:
            given = [self.rows(x), *self._groups(node, a, plan)]
        else:
            given = [self.rows(x), self.weight((a.get("weight", a.get("w")), plan), lambda: pack(self._float_weight(node, a), plan))]
        if bias is not None:
            given.append(self.weight((bias, "bias", plan), lambda: pack_channels(self.graph.weight(bias), plan)))
        if fused.residual is not None:
            given.append(self.rows(fused.residual))
        sink = read.sink if read else None
        facts = int(width), int(out), quantized, bias is not None, fused.activation, fused.residual is not None, stepped, sink
        what = Grouped(*facts, fused.after, a["group_size"]) if grouped else Product(*facts, fused.after)
        self.emit("linear", (what, plan), lambda name: what.build(plan, name), given, [] if read else [fused.end], fused.end, read)

    def _groups(self, node: fx.Node, a: dict[str, Any], plan: Plan) -> list[Any]:
        """Weights of 4 bits, as they are stored."""
        w, scale, zero = (self.graph.weight(a[n]) if a[n] is not None else None for n in ("w", "scale", "zero_point"))
        assert w is not None and scale is not None
        codes = unpack(w, 4, a["group_size"]).flatten(1)[:, : a["x"].meta["val"].shape[-1]]
        zeros = torch.full_like(scale, 8) if zero is None else zero if zero.is_floating_point() else unpack(zero, 4, scale.shape[-1]).to(scale.dtype)
        packed = pack_groups(codes, scale.detach(), zeros.detach(), plan)
        return [self.weight((node, part, plan), lambda t=t: t) for part, t in zip(("w", "scale", "shift"), packed)]

    def _float_weight(self, node: fx.Node, a: dict[str, Any]) -> Tensor:
        if node.target is ours.linear_nbits.default:
            given = (self.graph.weight(a[n]) if a[n] is not None else None for n in ("w", "scale", "zero_point"))
            return group_values(*given, a["bits"], a["group_size"]).flatten(-2)[:, : a["x"].meta["val"].shape[-1]].float()  # type: ignore[arg-type]
        return self.graph.weight(a["weight"])

    def reads(self, user: fx.Node) -> Read | None:
        """How a node reads the value it quantizes, if it is a product of codes."""
        a = arguments(user) if user.target in PRODUCTS else {}
        if user.target is ours.linear_token.default:
            return Read(2 ** (a["bits"] - 1) - 1)
        if user.target is ours.linear_int8_static.default:
            return Read(step=float(self.graph.weight(a["x_scale"]).detach()), zero=int(self.graph.weight(a["x_zero_point"])))
        return None

    def read_by(self, node: fx.Node, only: bool = True) -> Read | None:
        """The one way in which a value's readers quantize it; None if there are several, or (`only`) if somebody reads the value itself."""
        found = {self.reads(u) if arguments(u).get("x") is node else None for u in node.users}
        if not only:
            found.discard(None)
        return found.pop() if len(found) == 1 else None

    def codes_of(self, node: fx.Node, read: Read) -> tuple[Any, ...]:
        """(codes,) or (codes, steps) of a value, by the kernel that made it or one of their own."""
        if (node, read) not in self.codes:
            self.compute(node)  # its kernel may give the codes
        if (node, read) not in self.codes:
            width = int(node.meta["val"].shape[-1])
            self.emit("quantize", (width, read.sink), lambda name: quantize(width, read.sink, self.lanes, name), [self.rows(node)], [], node, read)
        return self.codes[node, read]

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _elementwise(self, node: fx.Node) -> Any:
        function, operands = elementwise.of(node)
        shape = node.meta["val"].shape
        tensors_, given = [], []
        for operand in operands:
            if isinstance(operand, fx.Node) and isinstance(operand.meta["val"], Tensor):
                given.append(len(tensors_))
                tensors_.append(operand)
            else:
                given.append(self.size(operand) if isinstance(operand, fx.Node | torch.SymInt) else _Scalar(operand))

        for t in tensors_:
            self.compute(t)
        last = any(t in self.last and same_shape(t.meta["val"].shape, shape) for t in tensors_)
        ordered = [last and same_shape(t.meta["val"].shape, shape) for t in tensors_]

        def compute(*buffers: Any) -> Any:
            def value(which: int, i: Sequence[Any]) -> Any:
                index = self.broadcast(i, tensors_[which].meta["val"].shape, shape)
                return buffers[which](*(last_of(index) if ordered[which] else index))

            def point(*i: Any) -> Any:
                i = (i[0], i[-1], *i[1:-1]) if last else i
                return function(*(value(g, i) if isinstance(g, int) else g.value if isinstance(g, _Scalar) else g for g in given))

            return point

        values = (images.in_order(self, t) if o else self.value(t) for t, o in zip(tensors_, ordered))
        if not last:
            return self.te(shape, compute, *values)
        self.last[node] = self.te(last_of(shape), compute, *values)
        return None

    def broadcast(self, index: Sequence[Any], shape: Sequence[Any], out: Sequence[Any]) -> list[Any]:
        """The index into an operand of this shape at an index of the result."""
        kept = index[len(out) - len(shape) :]
        return [0 if is_one(s) and not is_one(o) else i for i, s, o in zip(kept, shape, out[len(out) - len(shape) :])]

    def _in_torch(self, node: fx.Node) -> Any:
        """A call of torch's own function on the same memory, for what has no converter."""
        outputs = list(tensors(node.meta["val"]))
        self.in_torch[node.name] = self.why_not(node) or _name(node.target)
        operands = [self.value(n) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        sizes = [self.size(n) for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
        arguments_ = [*operands, relax.ShapeExpr(sizes)] if sizes else operands
        types = [self.type(v.shape, v.dtype) for v in outputs]
        result = self.block.emit(relax.call_dps_packed(self.torch_op(node), arguments_, types if len(types) > 1 else types[0]))
        return result if isinstance(node.meta["val"], Tensor) or len(types) > 1 else [result]


@dataclass(frozen=True)
class _Scalar:
    value: Any


def aligned(x: Tensor) -> Tensor:
    """Dense and where TVM's vector loads may begin; torch's own tensors are."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a node's metadata."""
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def _name(target: Any) -> str:
    return str(target).removesuffix(".default")


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and list(users[0].all_input_nodes).count(node) == 1 else None


def _by_channel(node: fx.Node) -> bool:
    """Whether a product is a depthwise convolution, whose kernel adds nothing."""
    return node.target in CONVOLUTIONS and images.depthwise(arguments(node))


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target)  # type: ignore[arg-type]


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta["val"]
    return isinstance(x, Tensor) and x.dtype is y.dtype is torch.float32 and same_shape(x.shape, y.shape)
