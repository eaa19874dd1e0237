"""Does a graph still mean the same: structure against its own metadata, numbers against another program, at several shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .cost import op_name
from .errors import PromiseBroken
from .graph import Graph
from .nodes import same_shape

Run = Callable[[tuple[Tensor, ...]], Sequence[Any]]
"""Flat inputs -> flat outputs."""


@dataclass(frozen=True)
class Drift:
    """How far outputs are from a reference, worst over outputs and inputs. NaN in the same place counts as equal."""

    bit_equal: bool = True
    max_error: float = 0.0
    """max |a - b|"""
    relative_error: float = 0.0
    """max |a - b| / max |a|"""
    cosine: float = 1.0
    """Mean over rows (last axis) of the cosine between outputs; the lowest over outputs."""
    agreement: float = 1.0
    """Share of rows with the same argmax over the last axis; the lowest over outputs."""
    inputs: int = 0

    def __and__(self, other: Drift) -> Drift:
        return Drift(
            self.bit_equal and other.bit_equal,
            max(self.max_error, other.max_error),
            max(self.relative_error, other.relative_error),
            min(self.cosine, other.cosine),
            min(self.agreement, other.agreement),
            self.inputs + other.inputs,
        )

    def as_dict(self) -> dict[str, Any]:
        """For records and JSON."""
        return asdict(self)


def tolerance(graph: Graph) -> float:
    """The largest relative error an exact pass may show: rounding grows like sqrt(depth) with the layers a value crosses."""
    dtypes = [t.dtype for t in graph.weights().values() if t.is_floating_point()]
    unit = max((torch.finfo(d).eps for d in dtypes), default=torch.finfo(torch.float32).eps)
    depth = max(1, sum(1 for n in graph.nodes if n.all_input_nodes and any(graph.is_weight(i) for i in n.all_input_nodes)))
    return 8 * unit * math.sqrt(depth)


def drift(reference: Sequence[Any], outputs: Sequence[Any], without: Container[int] = ()) -> Drift:
    """Compare flat outputs, but those of the numbers `without`. Raises PromiseBroken when number, shapes or dtypes differ."""
    if len(reference) != len(outputs):
        raise PromiseBroken(f"{len(outputs)} outputs where the original has {len(reference)}")
    total = Drift(inputs=1)
    for i, (a, b) in enumerate(zip(reference, outputs)):
        if i in without:
            continue
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b:
                raise PromiseBroken(f"output {i} is {b!r} where the original gives {a!r}")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise PromiseBroken(f"output {i} is {b.dtype}{list(b.shape)} where the original gives {a.dtype}{list(a.shape)}")
        total = total & _tensor_drift(a, b)
    return total


def _tensor_drift(a: Tensor, b: Tensor) -> Drift:
    if torch.equal(a, b) or a.numel() == 0:
        return Drift()
    a, b = a.detach().double(), b.detach().double()
    both_nan = a.isnan() & b.isnan()
    a, b = a.masked_fill(both_nan, 0), b.masked_fill(both_nan, 0)
    same = a == b  # infinities of one sign
    error = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = error.max().item()
    scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    rows_a, rows_b = (t.reshape(-1, t.shape[-1] if t.dim() else 1).nan_to_num() for t in (a, b))
    cosine = torch.nn.functional.cosine_similarity(rows_a, rows_b, dim=-1)
    cosine = torch.where((rows_a == rows_b).all(-1), 1.0, cosine)
    return Drift(
        worst == 0.0,
        worst,
        worst / scale if scale else (math.inf if worst else 0.0),
        cosine.mean().item(),
        (rows_a.argmax(-1) == rows_b.argmax(-1)).double().mean().item(),
    )


def compare(
    a: Run,
    b: Run,
    inputs: Sequence[tuple[Tensor, ...]],
    valid: Callable[[tuple[Tensor, ...]], Tensor | None] = lambda flat: None,
    without: Container[int] = (),
) -> Drift:
    """Drift of program `b` from program `a` over flat inputs; `valid(flat)` [batch, tokens] leaves out padding, `without` outputs by number."""
    total = Drift()
    for flat in inputs:
        mask = valid(flat)
        total = total & drift(_without_padding(a(flat), mask), _without_padding(b(flat), mask), without)
    return total


def _without_padding(outputs: Sequence[Any], mask: Tensor | None) -> Sequence[Any]:
    if mask is None:
        return outputs
    return [real_rows(o, mask) if isinstance(o, Tensor) else o for o in outputs]


def real_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """A value [batch, tokens, ...] without its padded tokens, [real, ...]; one without a token axis as it is. mask: of `padding_mask`."""
    return value[mask] if mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape else value


def padding_mask(graph: Graph) -> Callable[[tuple[Tensor, ...]], Tensor | None]:
    """Which tokens of an input are real, read off the matrix input called a mask; None for graphs without one.

    What a model computes at padded tokens is nobody's output: lossy passes are judged without it.
    """
    index = next((i for i, n in enumerate(graph.inputs) if is_mask(n)), None)
    return lambda flat: None if index is None else flat[index] != 0


def rounding_sensitivity(graph: Graph, inputs: Sequence[tuple[Tensor, ...]], seed: int = 0) -> Drift:
    """How far a graph moves from itself when every value is off by a few units in the last place.

    Next to nothing for float graphs. Quantized activations turn a last-place difference at a tie into a whole step, and the
    steps of later layers multiply it: two correct runs of MiniLM int8 differ by about as much as each from the original.
    """
    total = Drift()
    for i, flat in enumerate(inputs):
        noisy = _Noisy(graph.module, torch.Generator().manual_seed(seed + i))
        total = total & compare(graph.run, lambda f, noisy=noisy: noisy.run(*f, enable_io_processing=False), [flat], padding_mask(graph))
    return total


class _Noisy(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(module)
        self.generator = generator

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float32).to(value) - 0.5
        return value * (1 + noise * 4 * torch.finfo(value.dtype).eps)


def shorter_outputs(before: Graph, after: Graph) -> frozenset[int]:
    """The outputs of which `after` has fewer rows: equal in rank and dtype, and in all sizes but one that is known to be smaller.

    Only a pass that declares `shortens_outputs` may leave any (cached keys and values of dropped tokens): they can't be compared.
    """
    found = set()
    for i, (old, new) in enumerate(zip(_outputs(before), _outputs(after), strict=True)):
        a, b = (n.meta.get("val") if isinstance(n, fx.Node) else n for n in (old, new))
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.dim() == b.dim():
            other = [(x, y) for x, y in zip(a.shape, b.shape) if not same_shape([x], [y])]
            if len(other) == 1 and all(isinstance(n, int) for n in other[0]) and other[0][1] < other[0][0]:
                found.add(i)
    return frozenset(found)


def check_structure(graph: Graph, before: Graph | None = None, shortens_outputs: bool = False) -> None:
    """Raises PromiseBroken if the graph is malformed, its metadata is untrue, or its signature or dynamic dims differ from `before`.

    shortens_outputs: whether outputs may have fewer rows than before.
    """
    try:
        graph.fx.lint()
    except RuntimeError as error:
        raise PromiseBroken(f"malformed graph: {error}") from error
    for node in graph.fx.nodes:
        if node.op == "call_function" and not graph.is_inferred(node):
            _check_node(graph, node)
    if fixed := [f"{name} = {symbol}" for name, symbol in graph.symbols.items() if symbol.node.expr.is_number]:
        raise PromiseBroken(f"a dynamic dim was taken for its example's size: {', '.join(fixed)}")
    if before is not None:
        if graph.call is not before.call or [n.target for n in graph.inputs] != [n.target for n in before.inputs]:
            raise PromiseBroken("the signature changed")
        shorter = shorter_outputs(before, graph) if shortens_outputs else ()
        for i, (old, new) in enumerate(zip(_outputs(before), _outputs(graph), strict=True)):
            if i in shorter:
                continue
            a, b = (n.meta.get("val") if isinstance(n, fx.Node) else n for n in (old, new))
            if isinstance(a, Tensor) and (not isinstance(b, Tensor) or a.dtype != b.dtype or not same_shape(a.shape, b.shape)):
                raise PromiseBroken(f"output {i} was {a.dtype}{list(a.shape)} and is now {getattr(b, 'dtype', b)}{list(getattr(b, 'shape', []))}")
        tied = {id(t) for t in before.weights().values()}
        if len(tied) < len(before.weights()):
            _check_tied(graph, before)


def _check_node(graph: Graph, node: fx.Node) -> None:
    claimed = node.meta.get("val")
    try:
        graph.infer(node)
    except Exception as error:
        node.meta["val"] = claimed
        raise PromiseBroken(f"{node.name} ({node.meta.get('path') or 'no module'}) does not take its operands: {str(error).splitlines()[0]}") from error
    actual = node.meta["val"]
    if len(_flat(claimed)) != len(_flat(actual)):
        raise PromiseBroken(f"{node.name} ({node.meta.get('path') or 'no module'}) claims {len(_flat(claimed))} results and gives {len(_flat(actual))}")
    for a, b in zip(_flat(claimed), _flat(actual)):
        if a.dtype != b.dtype or not same_shape(a.shape, b.shape):
            raise PromiseBroken(f"{node.name} ({node.meta.get('path') or 'no module'}) claims {a.dtype}{list(a.shape)} and gives {b.dtype}{list(b.shape)}")


def _check_tied(graph: Graph, before: Graph) -> None:
    groups: dict[int, list[str]] = {}
    for name, tensor in before.weights().items():
        groups.setdefault(id(tensor), []).append(name)
    now = graph.weights()
    for names in groups.values():
        if len({id(now[n]) for n in names if n in now}) > 1:
            raise PromiseBroken(f"the tied weights {', '.join(names)} came apart")


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, list | tuple) else []


def _outputs(graph: Graph) -> tuple:
    return tuple(graph.output.args[0])  # type: ignore[arg-type]


def first_divergence(a: Graph, b: Graph, flat: tuple[Tensor, ...], limit: float) -> tuple[str, str, float] | None:
    """Where two versions of a program part: the first value both compute (rewrites keep the names of what they leave alone)
    whose relative error exceeds `limit`, as (node, module path, error); None if no common value does.

    The culprit stands between that value and the common ones before it: the path is that of the rewritten call there, or its own.
    """
    mine = _Trace(a.module)
    mine.run(*flat, enable_io_processing=False)
    other = _Trace(b.module)
    other.run(*flat, enable_io_processing=False)
    for name, value in mine.values.items():
        twin = other.values.get(name)
        if twin is None or twin.shape != value.shape or not value.is_floating_point():
            continue
        error = _tensor_drift(value, twin).relative_error
        if error > limit:
            node = next(_new_before(other.nodes[name], mine.values), mine.nodes[name])
            return name, node.meta.get("path", ""), error
    return None


def local_error(a: Graph, b: Graph, flat: tuple[Tensor, ...]) -> float:
    """The largest relative error of a value of `b` that `a` computes too, or of an output, each computed from `a`'s own values.

    What tells a wrong rewrite from a right one in a program that rounds: there a last-place difference turns a tie into a whole step,
    and later layers multiply it (`rounding_sensitivity`), so that the outputs of two correct versions lie far apart.
    """
    mine, guided = _Trace(a.module), _Guided(b.module)
    expected = mine.run(*flat, enable_io_processing=False)
    guided.given, guided.twins = mine.values, mine.nodes
    found = guided.run(*flat, enable_io_processing=False)
    return max([*guided.errors, drift(expected, found).relative_error])


STEPS = (
    "round", "linear_fp8", "linear_int8_dynamic", "linear_int8_static", "linear_token",
    "shift_linear", "shift_linear_ps", "shift_linear_q", "ternary_linear",
)  # fmt: skip
"""Ops that round activations."""


def has_steps(graph: Graph) -> bool:
    """Whether the program rounds activations, so that a last-place difference may become a step."""
    return any(op_name(n) in STEPS for n in graph.nodes)


def _new_before(node: fx.Node, known: Container[str]) -> Iterator[fx.Node]:
    """The calls a value is computed from, nearest first, as far back as the next ones of known names."""
    work, seen = [node], {node}
    for n in work:
        for operand in n.all_input_nodes:
            if operand.op == "call_function" and operand.name not in known and operand not in seen:
                seen.add(operand)
                work.append(operand)
                yield operand


class _Trace(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}
        self.nodes: dict[str, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.values[n.name], self.nodes[n.name] = value, n
        return value


class _Guided(fx.Interpreter):
    """Goes on with the given values in the place of its own, and keeps their errors. What a step reads is compared before it is rounded, also
    where another call makes it now."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.given: dict[str, Tensor] = {}
        self.twins: dict[str, fx.Node] = {}
        self.errors: list[float] = []

    def run_node(self, n: fx.Node) -> Any:
        if op_name(n) in STEPS and (twin := self.twins.get(n.name)) is not None:
            for mine, other in zip(n.args, twin.args):
                if isinstance(mine, fx.Node) and isinstance(other, fx.Node) and other.name in self.given:
                    self.env[mine] = self._guided(self.env[mine], self.given[other.name])
        with torch.no_grad():
            value = super().run_node(n)
        return self._guided(value, self.given.get(n.name))

    def _guided(self, value: Any, twin: Tensor | None) -> Any:
        if twin is None or not isinstance(value, Tensor) or value.shape != twin.shape or value.dtype != twin.dtype:
            return value
        if value.is_floating_point() and value is not twin:
            self.errors.append(_tensor_drift(twin, value).relative_error)
        return twin


def example_inputs(graph: Graph, base: tuple[Tensor, ...], seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """`base`, then the same inputs at batch 1 and at two other sizes, made by repeating, cutting and shuffling its values.

    Only dynamic dims change. Values stay within what the base holds, so token ids stay legal and masks stay masks. Sizes
    the graph itself can't take (an image smaller than a convolution's kernel, or no multiple of its patch) are left out, with a note.
    """
    yield base
    if not graph.dims:
        return
    generator = torch.Generator().manual_seed(seed)
    now = {}
    for node, tensor in zip(graph.inputs, base):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                now[size.node.expr] = tensor.shape[axis]
    by_name = {name: symbol.node.expr for name, symbol in graph.symbols.items()}
    for choose in (
        lambda d, n: 1 if d.name == "batch" else max(d.low, n - 1),
        lambda d, n: n + 1 if d.name == "batch" else n + 3,
        lambda d, n: 3 if d.name == "batch" else max(d.low, 2),
    ):
        sizes = {by_name[d.name]: min(choose(d, now[by_name[d.name]]), d.high or 1 << 30) for d in graph.dims.values() if by_name[d.name] in now}
        flat = tuple(_resize(tensor, node, sizes, generator) for node, tensor in zip(graph.inputs, base))
        if graph.on_meta or all(sizes[d] == n for d, n in now.items() if d != by_name.get("batch")) or _runs(graph, flat):
            yield flat


def _runs(graph: Graph, flat: tuple[Tensor, ...]) -> bool:
    try:
        graph.run(flat)
    except RuntimeError as error:
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(graph.call.names, flat))
        note = f"it does not run on {sizes} ({str(error).splitlines()[0]}): not verified at such sizes"
        if note not in graph.notes:
            graph.notes.append(note)
        return False
    return True


def _resize(tensor: Tensor, node: fx.Node, sizes: dict[Any, int], generator: torch.Generator) -> Tensor:
    for axis, size in enumerate(node.meta["val"].shape):
        if isinstance(size, torch.SymInt) and size.node.expr in sizes and tensor.shape[axis]:  # nothing can be repeated of an empty one
            tensor = tensor.index_select(axis, torch.arange(sizes[size.node.expr]) % tensor.shape[axis])
    if tensor.is_floating_point() and tensor.numel():
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.dtype)
        tensor = tensor + noise * tensor.std().nan_to_num() * 0.1 if tensor.numel() > 1 else tensor
    elif is_mask(node) and (blank := (tensor == 0).all(1)).any():
        tensor = tensor.clone()
        tensor[blank, 0] = 1  # a text of padding alone has no defined output
    return tensor


def is_mask(node: fx.Node) -> bool:
    """Whether an input says which tokens are real: an integer or bool matrix called a mask."""
    return "mask" in str(node.target) and node.meta["val"].dim() == 2 and not node.meta["val"].is_floating_point()
