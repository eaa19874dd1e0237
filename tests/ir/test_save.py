"""A saved graph comes back as it was, bit for bit; a file that is damaged, unsafe or foreign is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.encoding import decode, encode, find_target, identifier, weight_name
from rewright.ir.errors import InputFileError, UsageError
from rewright.ir.graph import Graph
from rewright.ir.save import load_graph, save_graph
from rewright.ir.show import show


class Model(nn.Module):
    """Tied weights, a transient buffer, a column-major weight, sizes in arguments, infinities, several results of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.mix = nn.Linear(8, 8)
        self.mix.weight = nn.Parameter(torch.randn(8, 8).t())
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, ids: Tensor, flip: bool = False) -> dict[str, Any]:
        n = ids.shape[1]
        hidden = self.mix(self.embed(ids)) + self.shift
        future = torch.full((n, n), float("-inf"), dtype=torch.float32).triu(1)
        values, where = (hidden @ hidden.transpose(1, 2) + future).softmax(-1).max(-1)
        return {"logits": self.head(hidden), "best": (values.to(torch.float64), where), "n": n}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(scope="module")
def captured(ids: Tensor) -> Graph:
    torch.manual_seed(0)
    return capture(Model().eval(), (ids,))


@pytest.fixture
def graph(captured: Graph) -> Graph:
    return captured.clone()


@pytest.fixture
def saved(graph: Graph, tmp_path: Path) -> Path:
    save_graph(graph, tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "graph.json").read_text(encoding="utf8"))
    change(data)
    (folder / "graph.json").write_text(json.dumps(data), encoding="utf8")


def test_a_loaded_graph_computes_the_same_bits_at_every_size(graph: Graph, saved: Path, ids: Tensor) -> None:
    loaded = load_graph(saved)
    for other in (ids, ids[:1], ids[:, :3], ids.repeat(2, 3)):
        a, b = graph(other), loaded(other)
        assert list(a) == list(b)
        assert torch.equal(a["logits"], b["logits"])
        assert all(torch.equal(x, y) for x, y in zip(a["best"], b["best"], strict=True))
        assert a["n"] == b["n"] == other.shape[1]


def test_a_loaded_graph_reads_the_same(graph: Graph, saved: Path) -> None:
    graph.notes.append("a remark")
    graph.canonical = True
    save_graph(graph, saved)
    loaded = load_graph(saved)
    assert show(loaded) == show(graph)
    assert loaded.dims == graph.dims
    assert (loaded.notes, loaded.canonical) == (["a remark"], True)
    assert loaded.call == graph.call
    assert [n.meta["path"] for n in loaded.nodes] == [n.meta["path"] for n in graph.nodes]


def test_weights_keep_names_layout_kind_and_ties(graph: Graph, saved: Path) -> None:
    graph.module.mix.bias = nn.Parameter(torch.ones(8), requires_grad=False)
    tied = graph.add_constant("copy", torch.ones(8))
    graph.module.register_parameter("copy", graph.module.get_parameter("mix.bias"))
    mix = graph.find(torch.ops.aten.linear.default)[0]
    mix.update_arg(2, tied)
    graph.find(torch.ops.aten.add.Tensor)[0].update_arg(1, graph.fx.find_nodes(op="get_attr", target="mix.bias")[0])
    save_graph(graph, saved)
    loaded = load_graph(saved)
    assert loaded.weights().keys() == graph.weights().keys()
    assert loaded.weight("copy") is loaded.weight("mix.bias")
    assert [loaded.weight(n).requires_grad for n in ("mix.bias", "mix.weight")] == [False, True]
    assert loaded.weight("mix.weight").stride() == (1, 8)
    assert set(loaded.module.state_dict()) == set(graph.module.state_dict())


def test_a_transient_buffer_stays_out_of_the_state_dict(saved: Path) -> None:
    loaded = load_graph(saved)
    assert "shift" in loaded.weights()
    assert "shift" not in loaded.module.state_dict()


def test_a_loaded_graph_trains(saved: Path, ids: Tensor) -> None:
    loaded = load_graph(saved)
    loaded(ids)["logits"].sum().backward()
    assert loaded.module.get_parameter("mix.weight").grad is not None


def test_a_graph_without_weights_is_saved_without_them_and_filled_later(ids: Tensor, tmp_path: Path) -> None:
    real = Model().eval()
    with torch.device("meta"):
        save_graph(capture(Model().eval(), (ids.to("meta"),)), tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()
    loaded = load_graph(tmp_path)
    assert loaded.on_meta
    loaded.materialize({**real.state_dict(), "shift": real.shift})
    assert torch.allclose(loaded(ids)["logits"], real(ids)["logits"], atol=1e-6)


def test_a_model_output_class_comes_back_or_a_dict_stands_for_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16)
    model, ids = transformers.BertModel(config).eval(), torch.arange(6).reshape(2, 3)
    save_graph(capture(model, (), {"input_ids": ids}), tmp_path)
    expected = model(input_ids=ids)
    loaded = load_graph(tmp_path)
    assert type(loaded(input_ids=ids)) is type(expected)

    edit(tmp_path, lambda data: data["call"]["output"].update({"class": "transformers.modeling_outputs.NoSuchOutput"}))
    loaded = load_graph(tmp_path)
    assert loaded.notes == ["transformers.modeling_outputs.NoSuchOutput is not available here: a plain dict stands for it"]
    assert torch.equal(loaded(input_ids=ids)["last_hidden_state"], expected.last_hidden_state)


def test_an_output_class_of_another_package_is_not_imported(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "spy_module.py").write_text("raise SystemExit('imported')", encoding="utf8")
    monkeypatch.syspath_prepend(saved)
    edit(saved, lambda data: data["call"].update(output={"kind": "class", "class": "spy_module.Spy", "context": None, "children": [data["call"]["output"]]}))
    assert load_graph(saved).notes == ["spy_module.Spy is not available here: a plain tuple stands for it"]


@pytest.mark.parametrize(
    "value",
    [
        1,
        -0.0,
        1.5,
        float("inf"),
        float("-inf"),
        True,
        None,
        "text",
        2 + 3j,
        [1, [2]],
        (1, (None,)),
        slice(1, None),
        torch.int8,
        torch.strided,
        torch.channels_last,
        torch.device("cuda:1"),
    ],
    ids=repr,
)
def test_every_kind_of_argument_survives_json(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)), {})
    assert repr(back) == repr(value)
    assert type(back) is type(value)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "aten.linear",
        "aten.nothing.default",
        "aten.__class__.__init__",
        "profiler._record_function_enter_new.default",
        "rewright_kernels.x.default",
        "",
        "getattr",
    ],
)
def test_a_call_outside_the_allow_list_is_refused(saved: Path, target: str) -> None:
    edit(saved, lambda data: data["nodes"][-1].update(call=target))
    with pytest.raises(InputFileError, match="the graph calls"):
        load_graph(saved)


def test_an_op_that_writes_files_or_memory_is_refused() -> None:
    for target in ("aten.from_file.default", "aten.add_.Tensor"):
        with pytest.raises(InputFileError, match="unsafe"):
            find_target(target)


CODE = "x=__import__('os').abort()"


@pytest.mark.parametrize("name", [CODE, "x: f()", "x, y", "1x", "", "class", "a.b", None])
def test_a_name_that_is_put_into_code_must_be_an_identifier(name: Any) -> None:
    with pytest.raises(InputFileError, match="not usable as a name"):
        identifier(name)


@pytest.mark.parametrize("name", ['a")' + CODE, "a'", "a\\", "a\nb", "a..b", "", None])
def test_a_weight_name_must_be_safe_between_quotes(name: Any) -> None:
    with pytest.raises(InputFileError, match="not usable as the name of a weight"):
        weight_name(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["inputs"][0].update(input=CODE),
        lambda data: data["nodes"][-1].update(name=CODE),
        lambda data: data["nodes"][-1].update(kwargs={CODE: 1}),
        lambda data: data["call"].update(names=[CODE]),
        lambda data: data["call"]["parameters"][0].update(name=CODE),
        lambda data: data["call"]["parameters"][1].update(default={"node": CODE}),
        lambda data: data["weights"].update({'a")' + CODE: data["weights"]["shift"]}),
    ],
    ids=["input", "node", "keyword", "flat name", "parameter", "default", "weight"],
)
def test_no_name_in_a_file_reaches_the_generated_code_as_code(saved: Path, change: Callable) -> None:
    edit(saved, change)
    with pytest.raises(InputFileError):
        load_graph(saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(version=2), "has format version 2, this rewright reads 1"),
        (lambda data: data.update(format="x"), "is not a graph that rewright saved"),
        (lambda data: data.pop("call"), "graph.json is damaged: KeyError: 'call'"),
        (lambda data: data["nodes"].reverse(), "damaged"),
        (lambda data: data["nodes"].append(data["nodes"][0]), "two nodes are named"),
        (lambda data: data["weights"].pop("mix.bias"), "reads the weight 'mix.bias', which is not listed"),
        (lambda data: data["weights"]["mix.bias"].update(shape=[9]), r"has mix.bias as torch.float32\[8\], the graph wants torch.float32\[9\]"),
        (lambda data: data["weights"].update(extra=data["weights"]["mix.bias"]), "lacks the weight extra"),
        (lambda data: data["nodes"][-1].update(args=[{"surprise": 1}]), "unknown kind of argument 'surprise'"),
        (lambda data: data["inputs"][0].update(dtype="save"), "has no dtype 'save'"),
        (lambda data: data["inputs"][0].update(shape=["batch"]), "damaged"),
    ],
)
def test_a_damaged_description_is_refused_with_what_is_wrong(saved: Path, change: Callable, said: str) -> None:
    edit(saved, change)
    with pytest.raises(InputFileError, match=said) as refused:
        load_graph(saved)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"graph"', "[" * 100_000, "\udcff"], ids=["empty", "cut", "list", "text", "deep", "not utf8"])
def test_a_description_that_is_no_json_object_is_refused(saved: Path, text: str) -> None:
    (saved / "graph.json").write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(InputFileError, match=r"graph\.json"):
        load_graph(saved)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"holds no saved graph: there is no graph\.json"):
        load_graph(tmp_path)


def test_missing_or_cut_weights_are_refused(saved: Path) -> None:
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputFileError, match="damaged or cut short"):
        load_graph(saved)
    path.unlink()
    with pytest.raises(InputFileError, match=r"there is no weights\.safetensors"):
        load_graph(saved)


def test_a_foreign_op_is_refused_when_saving(graph: Graph, tmp_path: Path) -> None:
    graph.insert(torch.ops.profiler._record_function_enter_new.default, "x", before=graph.output)
    with pytest.raises(UsageError, match="can't be saved: only ops of aten, prims, rewright"):
        save_graph(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_deep_graph_is_saved_and_loaded_without_recursion(tmp_path: Path) -> None:
    graph = capture(nn.Identity().eval(), (torch.ones(2),))
    value: Any = graph.inputs[0]
    for _ in range(3000):
        value = graph.insert(torch.ops.aten.neg.default, value, before=graph.output)
    graph.output.update_arg(0, (value,))
    graph.recompile()
    save_graph(graph, tmp_path)
    assert len(load_graph(tmp_path).nodes) == 3000


def test_loaded_weights_are_aligned_so_that_kernels_round_as_they_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(5, 33), nn.GELU(), nn.Linear(33, 7)), torch.randn(2, 5))
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    assert all(t.data_ptr() % 64 == 0 for t in loaded.weights().values())
    for batch in (1, 2, 3, 17):
        x = torch.randn(batch, 5)
        assert torch.equal(loaded(x), graph(x))
