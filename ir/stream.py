"""Models larger than memory: run one from its safetensors, and write a rewritten one weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .graph import Graph
from .walk import Flat, Walk, load_weight
from .weights import WeightStore, check_disk, write_sharded

PART_BYTES = 256 << 20
"""Weights held at a time by default: one layer of a 7 B model in 16 bits is 400 MB, of a 1 B model in 32 bits 180 MB."""


def stream_run(graph: Graph, weights: Mapping[str, Tensor], batches: Sequence[Flat], memory_limit: int | None = None) -> list[tuple]:
    """The flat outputs of every batch, each weight read once for all of them: what `graph.run` gives when it is filled, bit for bit.

    weights: a WeightStore, or any mapping, for a graph captured on the meta device; recipes of rewrites are applied on the way.
    memory_limit: bytes for the weights at hand and the values that pass from part to part; default: see `default_limit`.
    The outputs and what one batch computes within a part come on top.
    Raises InputFileError for a missing weight, ResourceError when the limit can't be kept.
    """
    walk = Walk(graph, batches, outputs=True)
    return walk.run(weights, walk.parts(default_limit(walk) if memory_limit is None else memory_limit))


def default_limit(walk: Walk) -> int:
    """PART_BYTES of weights, or the largest single one, beside the values alive at the widest point."""
    largest = max((sum(w.meta["val"].nbytes for w in n.all_input_nodes if w.op == "get_attr") for n in walk.nodes), default=0)
    return max(PART_BYTES, largest) + max(walk.live_bytes())


def stream_materialize(graph: Graph, weights: Mapping[str, Tensor], folder: Path | str, shard_bytes: int | None = 2 << 30) -> list[Path]:
    """Write all weights of a (rewritten) graph as safetensors shards, made one by one from `weights` by their recipes.

    At any time memory holds one new weight and the originals it is made of. A tied weight is written once, under the first
    name that is read. `WeightStore.open(folder)` reads the result. Returns the files.
    Raises InputFileError for a missing weight, ResourceError when the disk is full or could not hold them.
    """
    folder = Path(folder)
    names = {id(t): name for name, t in reversed(graph.weights().items())}  # the first name of each tensor
    order = sorted(names.values(), key=lambda name: _place(weights, origins(graph, name)))
    tensors = {name: graph.weight(name) for name in order}
    check_disk(folder, sum(t.nbytes for t in tensors.values()))
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return write_sharded(folder, layout, _made(graph, weights, order), shard_bytes)


def _made(graph: Graph, weights: Mapping[str, Tensor], order: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    needed = {name: origins(graph, name) for name in order}
    last = {origin: i for i, name in enumerate(order) for origin in needed[name]}
    read = _ReadOnce(weights)
    for i, name in enumerate(order):
        yield name, load_weight(graph, name, read)
        read.kept = {origin: t for origin, t in read.kept.items() if last.get(origin, -1) > i}


class _ReadOnce(Mapping[str, Tensor]):
    """Weights that several recipes share (codes and scales of one layer) stay at hand until the last of them is made."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.kept:
            self.kept[name] = self.weights[name]
        return self.kept[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def origins(graph: Graph, name: str) -> tuple[str, ...]:
    """The original weights a weight is made of, through all recipes."""
    recipe = graph.recipes.get(name)
    return (name,) if recipe is None else tuple(dict.fromkeys(o for s in recipe.sources for o in origins(graph, s)))


def _place(weights: Mapping[str, Tensor], origin: tuple[str, ...]) -> tuple[str, int, str]:
    """Where the first of them lies, so that files are read from front to back."""
    entry = weights.entries.get(origin[0]) if isinstance(weights, WeightStore) and origin else None
    return (str(entry.file), entry.begin, origin[0]) if entry is not None else ("", 0, origin[0] if origin else "")
