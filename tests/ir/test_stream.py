"""Models that stay on disk: run, calibrated and rewritten weight by weight, equal to the same in memory."""

from __future__ import annotations

import functools
import json
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.errors import InputFileError, ResourceError, UsageError
from rewright.ir.graph import Graph
from rewright.ir.stream import stream_materialize, stream_run
from rewright.ir.walk import Visit, Walk
from rewright.ir.weights import WeightStore, digest, write_sharded, write_tensors
from rewright.passes.fusion.merge_linears import MergeLinears
from rewright.passes.pipeline import Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.statistics import Calibration, linear_inputs
from rewright.passes.statistics.keys import value_keys


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A tied embedding, a buffer that no checkpoint holds, blocks."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width), persistent=False)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
BATCHES = [(IDS,), (IDS.flip(1)[:1],), (IDS.repeat(2, 3),)]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    """The checkpoint: two shards with an index, the tied weight once, no buffer."""
    weights = {n: t for n, t in model.state_dict().items() if n != "head.weight"}
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, tmp_path / "model-1.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def store(model: Decoder, folder: Path) -> WeightStore:
    return WeightStore.open(folder, held={"scale": model.scale})  # type: ignore[dict-item]


@functools.cache
def _on_meta() -> Graph:
    with torch.device("meta"):
        return capture(Decoder().eval(), (torch.empty(2, 7, dtype=torch.long),))


def on_meta() -> Graph:
    return _on_meta().clone()


class Counting(WeightStore):
    """Counts what is read, and the bytes of it that are alive."""

    def __init__(self, store: WeightStore) -> None:
        self.held, self.entries = store.held, store.entries
        self.reads: dict[str, int] = {}
        self.alive = self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name).clone()
        self.reads[name] = self.reads.get(name, 0) + 1
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes


# -- running --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1 << 20, 400_000])
def test_a_streamed_run_gives_the_bits_of_the_model_in_memory(model: Decoder, store: WeightStore, limit: int | None) -> None:
    outputs = stream_run(on_meta(), store, BATCHES, memory_limit=limit)
    with torch.no_grad():
        assert all(torch.equal(out[0], model(*flat)) for out, flat in zip(outputs, BATCHES, strict=True))


def test_each_weight_is_read_once_and_let_go_after_its_last_use(store: WeightStore) -> None:
    graph = on_meta()
    counting = Counting(store)
    stream_run(graph, counting, [(IDS[:1],), (IDS[1:],), (IDS[:1].flip(1),)], memory_limit=150_000)
    tied = counting.reads.pop("embed.weight")
    assert tied == 2  # at both ends of the model
    assert set(counting.reads.values()) == {1}
    assert len(counting.reads) == 1 + 4 * 6  # scale and, of each block, norm's two, gate, up, down's two
    largest = 3 * 64 * 64 * 4
    assert counting.most < 3 * largest < sum(t.nbytes for t in store.values()) / 4 and counting.alive == 0


def test_a_walk_is_cut_where_few_bytes_are_alive_and_says_when_it_can_t_be() -> None:
    walk = Walk(on_meta(), BATCHES, outputs=True)
    live = walk.live_bytes()
    tokens = sum(flat[0].numel() for flat in BATCHES)
    parts = walk.parts(300_000)
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]] and parts[-1].stop == len(walk.nodes) and len(parts) > 3
    assert all(live[p.stop] == tokens * 64 * 4 for p in parts[:-1])  # the residual stream alone crosses
    assert live[0] == 0 and max(live) == tokens * (64 + 2 * 192) * 4  # beside it the two halves of the gate
    with pytest.raises(ResourceError, match=r"\(layers.0.gate\) the smallest part of the run needs 0.2 MiB, over the memory limit of 0.1 MiB"):
        walk.parts(60_000)


def test_a_visit_sees_values_of_the_same_batch_and_keeps_them_alive() -> None:
    graph = capture(Decoder().eval(), (IDS,))
    first, last = graph.nodes[0], graph.find(torch.ops.aten.add.Tensor)[-1]
    seen: list[tuple[int, torch.Size, torch.Size]] = []
    walk = Walk(graph, BATCHES, [Visit((last, first), lambda i, v: seen.append((i, v[0].shape, v[1].shape)))])
    walk.run(parts=walk.parts(40_000 * 8, weights=False))
    assert [i for i, *_ in seen] == [0, 1, 2] and all(a == b for _, a, b in seen)
    assert graph.nodes[-1] not in walk.nodes  # the head is not needed


# -- calibrating and rewriting --------------------------------------------------------------------------------------


def test_calibration_of_a_model_on_disk_equals_that_in_memory(model: Decoder, store: WeightStore) -> None:
    with torch.no_grad():
        full = Pipeline([], verify=False).run(capture(model, (IDS,))).graph
    meta = Pipeline([], verify=False).run(on_meta()).graph
    kinds = {"absmax", "gram"}
    counting = Counting(store)
    found = Calibration(BATCHES, counting, memory_limit=2 << 20).gather(meta, linear_inputs(meta, kinds))
    wanted = Calibration(BATCHES).gather(full, linear_inputs(full, kinds))
    assert len(found) == len(wanted) == 9
    for a, b in zip(found.values(), wanted.values(), strict=True):
        assert torch.equal(a.gram, b.gram) and torch.equal(a.absmax, b.absmax)
    assert set(counting.reads.values()) == {1}
    with pytest.raises(UsageError, match="no weights to run with"):
        Calibration(BATCHES).gather(meta, linear_inputs(meta, kinds))


def test_a_rewritten_model_is_written_weight_by_weight(model: Decoder, store: WeightStore, tmp_path: Path) -> None:
    passes = [MergeLinears(), QuantizeLinear()]
    with torch.no_grad():
        full = Pipeline(passes, verify=False).run(capture(model, (IDS,))).graph
    meta = Pipeline(passes, verify=False).run(on_meta()).graph
    assert any(n.endswith("_int8") for n in meta.weights()) and meta.on_meta
    counting = Counting(store)
    files = stream_materialize(meta, counting, tmp_path / "out", shard_bytes=80_000)
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 90_000
    written = {n: t for f in files for n, t in load_file(f).items()}
    assert written.keys() == meta.weights().keys()
    assert all(torch.equal(t, full.weight(n)) for n, t in written.items())
    assert counting.alive == 0 and counting.most < sum(t.nbytes for t in store.values()) / 3
    again = WeightStore.open(tmp_path / "out")
    outputs = stream_run(_without_recipes(meta), again, BATCHES)
    straight = stream_run(meta, store, BATCHES)  # recipes on the way
    for out, same, flat in zip(outputs, straight, BATCHES, strict=True):
        assert torch.equal(out[0], full.run(flat)[0]) and torch.equal(out[0], same[0])


def _without_recipes(graph: Graph) -> Graph:
    twin = graph.clone()
    twin.recipes.clear()
    return twin


def test_a_weight_is_found_by_the_name_the_checkpoint_has_for_it(store: WeightStore, model: Decoder) -> None:
    """The embedding and the head are one weight: the graph reads it by one name, the file holds it by the other."""
    graph = on_meta()
    assert "embed.weight" not in graph.weights() and "head.weight" not in store
    graph.materialize(store)
    assert torch.equal(graph.weight("head.weight"), model.embed.weight) and not graph.on_meta


def test_two_weights_of_a_graph_that_are_one_stay_one_when_it_is_filled(store: WeightStore) -> None:
    graph = on_meta()
    norm = graph.find(torch.ops.aten.layer_norm.default)[0]
    other = graph.add_constant("copy", torch.empty(64, device="meta"))
    graph.module._parameters["copy"] = graph.module.get_parameter("layers.0.norm.bias")
    norm.update_arg(2, other)
    norm.update_arg(3, other)
    graph.materialize({**store, "copy": torch.ones(64)})
    assert graph.weight("copy") is graph.weight("layers.0.norm.bias")


def test_a_weight_that_a_graph_reads_by_two_names_is_written_once(store: WeightStore, tmp_path: Path) -> None:
    graph = on_meta()
    other = graph.add_constant("copy", torch.empty(64, device="meta"))
    graph.module._parameters["copy"] = graph.module.get_parameter("layers.0.norm.bias")
    graph.find(torch.ops.aten.layer_norm.default)[0].update_arg(2, other)
    names = list(graph.weights())
    first, second = sorted(("copy", "layers.0.norm.bias"), key=names.index)
    stream_materialize(graph, {**store, "copy": store["layers.0.norm.bias"]}, tmp_path / "out")
    assert WeightStore.open(tmp_path / "out").keys() == set(names) - {second} and first in names


def test_the_key_of_a_value_sees_through_recipes(store: WeightStore) -> None:
    plain, quantized, same = (Pipeline(p, verify=False).run(on_meta()).graph for p in ([], [QuantizeLinear()], [QuantizeLinear(min_weights=1 << 30)]))
    keys = [value_keys(g, [out], store)[out] for g in (plain, quantized, same) for out in g.output.all_input_nodes]
    assert keys[0] == keys[2] != keys[1]


def test_the_key_of_a_value_follows_the_weights_of_the_store(store: WeightStore, folder: Path) -> None:
    graph = on_meta()
    (out,) = graph.output.all_input_nodes
    other = {"scale": store["scale"], "layers.0.norm.weight": store["layers.0.norm.weight"] + 1}
    stores = (store, WeightStore.open(folder, held={"scale": store["scale"]}), WeightStore.open(folder, held=other), {**store}, {**store, **other})
    keys = [value_keys(graph, [out], weights)[out] for weights in stores]
    assert keys[0] == keys[1] != keys[2] and keys[3] != keys[4]


# -- the store ------------------------------------------------------------------------------------------------------


def test_a_store_reads_every_dtype_and_shape_as_safetensors_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)
    tensors = {f"t.{i}": (torch.randn(3, 5, generator=generator) * 9).to(d) for i, d in enumerate(dtypes)} | {
        "empty": torch.empty(0, 4),
        "one": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    ours = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write_tensors(tmp_path / "b.safetensors", ours, tensors.items())
    for file in ("a.safetensors", "b.safetensors"):
        store = WeightStore.open(tmp_path / file)
        assert store.keys() == tensors.keys() == load_file(tmp_path / file).keys()
        assert all(torch.equal(store[n], t) and store[n].dtype == t.dtype and store[n].shape == t.shape for n, t in tensors.items())
        assert all(torch.equal(load_file(tmp_path / file)[n], t) for n, t in tensors.items())
    store["t.0"].zero_()
    assert torch.equal(store["t.0"], tensors["t.0"])  # fresh memory each time


def test_what_is_held_wins_over_files_and_digests_follow_the_values(folder: Path) -> None:
    other = torch.ones(64)
    store = WeightStore.open(folder, held={"layers.0.norm.weight": other})
    assert store["layers.0.norm.weight"] is other
    before = store.digest("layers.0.norm.weight")
    other[3] = 2
    assert store.digest("layers.0.norm.weight") != before
    assert digest(torch.ones(4)) == digest(torch.ones(4)) != digest(torch.ones(2, 2))
    file = store.digest("embed.weight")
    save_file({"embed.weight": torch.zeros(50, 64)}, folder / "late.safetensors")
    assert WeightStore.open(folder / "late.safetensors").digest("embed.weight") != file


def _damaged_index(name: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": name}}))

    return damage


def _header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model-1.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def _first(header: dict) -> dict:
    return next(v for k, v in header.items() if k != "__metadata__")


DAMAGES = {
    "a path out of the folder": (_damaged_index("../model-1.safetensors"), "must be a plain file name"),
    "an absolute path": (_damaged_index("/etc/passwd"), "must be a plain file name"),
    "a windows path": (_damaged_index("..\\model-1.safetensors"), "must be a plain file name"),
    "no name": (_damaged_index(3), "must be a plain file name"),
    "a missing shard": (lambda f: (f / "model-2.safetensors").unlink(), "model-2.safetensors is missing"),
    "a cut file": (lambda f: (f / "model-1.safetensors").write_bytes((f / "model-1.safetensors").read_bytes()[:-9]), "damaged"),
    "a huge header": (lambda f: (f / "model-1.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "a header of"),
    "no json": (lambda f: (f / "model-1.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), "damaged"),
    "overlapping tensors": (_header(lambda h: _first(h).update(data_offsets=[x + 4 for x in _first(h)["data_offsets"]])), "overlap or leave holes"),
    "a wrong shape": (_header(lambda h: _first(h).update(shape=[1 << 40])), "in bytes"),
    "an unknown dtype": (_header(lambda h: _first(h).update(dtype="F3")), "unknown dtype 'F3'"),
    "an unsafe name": (_header(lambda h: h.update({"a'b": h.pop(next(k for k in h if k != "__metadata__"))})), "not usable as the name"),
    "a weight twice": (lambda f: (f / "model-1.safetensors").write_bytes((f / "model-2.safetensors").read_bytes()), "is in both"),
    "two indexes": (lambda f: (f / "other.safetensors.index.json").write_text("{}"), "holds 2 indexes"),
    "an index without names": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not a safetensors index"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unsafe_checkpoint_is_refused_in_one_sentence(folder: Path, damage: str) -> None:
    spoil, sentence = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputFileError, match=sentence):
        WeightStore.open(folder)


def test_a_file_that_is_cut_after_it_was_opened_is_said_when_it_is_read(folder: Path) -> None:
    store = WeightStore.open(folder)
    last = max((e for e in store.entries.values() if e.file.name == "model-1.safetensors"), key=lambda e: e.begin)
    last.file.write_bytes(last.file.read_bytes()[:-9])
    name = next(n for n, e in store.entries.items() if e is last)
    with pytest.raises(InputFileError, match=f"model-1.safetensors ended within {name}; it was cut short"):
        _ = store[name]


def test_a_folder_without_weights_and_a_missing_or_misshapen_weight_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputFileError, match="holds no .safetensors file"):
        WeightStore.open(tmp_path / "nothing")
    with pytest.raises(InputFileError, match=r"the graph reads scale, which is not among .*WeightStore.open\(folder, held="):
        stream_run(on_meta(), WeightStore.open(folder), BATCHES)
    with pytest.raises(InputFileError, match=r"scale is torch.float64\[64\], the graph was captured with torch.float32\[64\]"):
        stream_run(on_meta(), WeightStore.open(folder, held={"scale": torch.ones(64, dtype=torch.float64)}), BATCHES)


def test_an_unfinished_write_leaves_no_file_and_no_index(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (4,)), "b": (torch.float32, (4,))}

    def stops() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sharded(tmp_path, layout, stops(), shard_bytes=16)
    assert [f.name for f in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]  # whole, and no index yet
    with pytest.raises(UsageError, match="came as"):
        write_tensors(tmp_path / "c.safetensors", layout, [("a", torch.ones(5))])
    with pytest.raises(UsageError, match="b was laid out and never came"):
        write_tensors(tmp_path / "c.safetensors", layout, [("a", torch.ones(4))])
    assert not (tmp_path / "c.safetensors").exists()
