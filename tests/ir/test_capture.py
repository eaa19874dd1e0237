"""Capture gives the original back: its outputs bit for bit, its signature, its structures, its weights by name."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.ir.errors import CaptureError, InputFileError, UsageError
from rewright.ir.graph import Graph


class Mixer(nn.Module):
    """Linear layers, a normalisation and a residual add over [batch, sequence, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None, *, double: bool = False) -> Tensor:
        y = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x)))) * self.scale
        y = y if bias is None else y + bias
        return y * 2 if double else y


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(0)
    return Mixer().eval()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 8)


# -- the call ---------------------------------------------------------------------------------------------------------


def test_a_captured_model_is_called_like_the_original(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    assert torch.equal(graph(x), mixer(x))
    assert torch.equal(graph.module(x=x), mixer(x=x))
    given, own = inspect.signature(mixer.forward), inspect.signature(graph.module.forward)
    assert [(p.name, p.kind, p.default) for p in own.parameters.values()] == [(p.name, p.kind, p.default) for p in given.parameters.values()]


def test_optional_tensors_given_at_capture_are_inputs(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,), {"bias": torch.ones(8)}, dynamic_shapes={"x": {0: "batch"}})
    assert graph.call.names == ("x", "bias")
    assert torch.equal(graph(x, bias=torch.full((8,), 3.0)), mixer(x, torch.full((8,), 3.0)))
    with pytest.raises(UsageError, match="'bias' is missing"):
        graph(x)


def test_constants_are_bound_and_another_value_is_refused(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,), {"double": True})
    assert torch.equal(graph(x, double=True), mixer(x, double=True))
    with pytest.raises(UsageError, match="'double' was captured as True; got False"):
        graph(x, double=False)


def test_an_argument_the_capture_did_not_have_is_refused(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    with pytest.raises(UsageError, match="'bias' was not part of the capture"):
        graph(x, torch.ones(8))
    assert torch.equal(graph(x, None, double=False), mixer(x))  # the defaults, spelt out


def test_a_flag_that_is_on_by_default_can_not_be_switched_off_unseen() -> None:
    class Switch(nn.Module):
        def forward(self, x: Tensor, double: bool = True, mask: Tensor | None = None) -> Tensor:
            return x * 2 if double else x

    graph = capture(Switch().eval(), (torch.ones(2, 2),))
    assert torch.equal(graph(torch.ones(2, 2), double=True, mask=False), torch.full((2, 2), 2.0))
    for off in (False, None):
        with pytest.raises(UsageError, match="'double' was not part of the capture"):
            graph(torch.ones(2, 2), double=off)


class Nested(nn.Module):
    """Takes and returns structures."""

    def forward(self, pair: tuple[Tensor, Tensor], table: dict[str, Tensor]) -> dict[str, Any]:
        a, b = pair
        return OrderedDict(total=a + b, parts=(a * table["k"], [b]), nothing=None, seven=7)


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    a, b, k = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4)
    graph = capture(Nested(), ((a, b), {"k": k}), dynamic_shapes={})
    found, expected = graph((a, b), {"k": k}), Nested()((a, b), {"k": k})
    assert type(found) is OrderedDict
    assert list(found) == list(expected)
    assert torch.equal(found["parts"][0], expected["parts"][0])
    assert isinstance(found["parts"][1], list)
    assert (found["nothing"], found["seven"]) == (None, 7)
    with pytest.raises(UsageError, match="'pair' was captured as the structure"):
        graph(a, {"k": k})


def test_a_model_output_class_comes_back() -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_bert(transformers)
    ids = torch.arange(6).reshape(2, 3)
    graph = capture(model, (), {"input_ids": ids})
    found, expected = graph(input_ids=ids, return_dict=True), model(input_ids=ids)
    assert type(found) is type(expected)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)


def tiny_bert(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16)
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "capture needs example inputs"),
        ((), {"bias": torch.ones(8)}, "the example inputs lack x; Mixer.forward takes x, bias, double"),
        ((), {"x": torch.ones(2, 8), "mask": torch.ones(2)}, "Mixer.forward takes no mask; it takes x, bias, double"),
        ((torch.ones(2, 8), None, None), {}, "3 positional arguments given, the model takes 2: x, bias"),
    ],
)
def test_wrong_example_inputs_are_answered_with_what_the_model_takes(mixer: Mixer, args: tuple, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        capture(mixer, args, kwargs)


# -- dynamic sizes ----------------------------------------------------------------------------------------------------


def test_named_dims_are_one_size_and_batch_one_works(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,), dynamic_shapes={"x": {0: "batch", 1: "sequence"}})
    assert {d.name: d.example for d in graph.dims.values()} == {"batch": 2, "sequence": 5}
    for shape in ((1, 1, 8), (1, 9, 8), (4, 2, 8)):
        other = torch.randn(shape)
        assert torch.equal(graph(other), mixer(other))


def test_an_example_of_batch_one_stays_dynamic(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x[:1],))
    assert "batch" in graph.dims
    assert torch.equal(graph(x), mixer(x))


def test_without_dynamic_shapes_batch_and_the_sequence_of_ids_vary() -> None:
    graph = capture(nn.Embedding(10, 4), (torch.zeros(2, 3, dtype=torch.long),))
    assert set(graph.dims) == {"batch", "sequence"}


def test_a_view_of_a_larger_tensor_serves_as_example() -> None:
    class Positions(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids + torch.arange(ids.shape[1])

    whole = torch.zeros(8, 9, dtype=torch.long)
    graph = capture(Positions().eval(), (whole[:, :-1][:2, :4],))
    assert torch.equal(graph(whole), Positions()(whole))


def test_inputs_of_another_first_size_are_not_taken_for_the_batch() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return x * weights.sum()

    x, weights = torch.randn(4, 16), torch.randn(7)
    graph = capture(Scaled().eval(), (x, weights))
    assert {d.name: d.example for d in graph.dims.values()} == {"batch": 4, "weights_batch": 7}
    assert torch.equal(graph(x[:3], weights[:5]), x[:3] * weights[:5].sum())


def test_a_size_the_model_fixes_is_static_and_noted() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3, 4)

    graph = capture(Fixed().eval(), (torch.ones(3, 4),))
    assert graph.dims == {}
    assert graph.notes == ["x axis 0 (batch) is static: the model fixes it to 3"]


def test_dynamic_shapes_of_an_unknown_input_are_refused(mixer: Mixer, x: Tensor) -> None:
    with pytest.raises(UsageError, match=r"dynamic_shapes names y, which the example inputs don't have \(x\)"):
        capture(mixer, (x,), dynamic_shapes={"y": {0: "batch"}})


# -- modes and refusals -----------------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_captured_in_eval_mode_and_left_as_it_was(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    graph = capture(model, (x,))
    assert model.training
    assert graph.notes == ["the model was in training mode; it was captured in eval mode (dropout off, batch norm by running statistics)"]
    assert torch.equal(graph(x), model.eval()(x))


def test_an_uncapturable_model_is_told_its_own_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x  # the culprit

    with pytest.raises(
        CaptureError, match=r"Branches can't be captured at .*test_capture.py:\d+ `return x \* 2 if x.sum\(\) > 0 else x  # the culprit`.*torch.where"
    ):
        capture(Branches(), (torch.ones(2, 2),))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"capture takes an nn.Module, .*; got int"):
        capture(3, (torch.ones(1),))  # type: ignore[arg-type]


# -- exported programs ------------------------------------------------------------------------------------------------


def test_an_exported_program_and_its_file_give_the_same_graph(mixer: Mixer, x: Tensor, tmp_path: Path) -> None:
    exported = torch.export.export(mixer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}, strict=False)
    torch.export.save(exported, tmp_path / "mixer.pt2")
    for graph in (capture(exported), capture(tmp_path / "mixer.pt2")):
        assert list(graph.dims) == ["batch"]
        assert torch.equal(graph(x[:1]), mixer(x[:1]))


def test_a_file_that_is_missing_or_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no file"):
        capture(tmp_path / "nowhere.pt2")
    (tmp_path / "text.pt2").write_text("not an archive", encoding="utf8")
    with pytest.raises(InputFileError, match="is not a torch.export archive"):
        capture(tmp_path / "text.pt2")


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_the_originals_own_under_their_names(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    assert set(graph.module.state_dict()) == set(mixer.state_dict())  # `scale` is not persistent there, nor here
    assert graph.weights()["up.weight"].data_ptr() == mixer.up.weight.data_ptr()
    assert graph.weights()["scale"].data_ptr() == mixer.scale.data_ptr()


def test_every_call_knows_the_module_it_came_from(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    linears = graph.find(torch.ops.aten.linear.default)
    assert [n.meta["path"] for n in linears] == ["up", "down"]


def test_a_clone_shares_weights_and_nothing_else(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    twin = graph.clone()
    assert twin.weights()["up.weight"] is graph.weights()["up.weight"]
    assert set(twin.module.state_dict()) == set(graph.module.state_dict())
    gelu = twin.find(torch.ops.aten.gelu.default)[0]
    gelu.replace_all_uses_with(gelu.args[0])  # type: ignore[arg-type]
    assert twin.clean() == 1
    assert not torch.equal(twin(x), mixer(x))
    assert torch.equal(graph(x), mixer(x))


def test_a_deep_copy_of_the_module_is_independent(mixer: Mixer, x: Tensor) -> None:
    graph = capture(mixer, (x,))
    twin = copy.deepcopy(graph.module)
    with torch.no_grad():
        graph.module.get_parameter("up.weight").zero_()
    assert not torch.equal(twin(x=x), graph(x))
    assert twin.get_parameter("up.weight").abs().sum() > 0


def test_gradients_equal_the_originals(mixer: Mixer, x: Tensor) -> None:
    original = copy.deepcopy(mixer)
    graph = capture(mixer, (x,))
    original(x).square().sum().backward()
    graph(x).square().sum().backward()
    for name, parameter in original.named_parameters():
        assert torch.equal(graph.module.get_parameter(name).grad, parameter.grad), name


def test_a_model_without_weights_is_captured_on_meta_and_filled_later(mixer: Mixer, x: Tensor) -> None:
    with torch.device("meta"):
        empty = Mixer().eval()
    graph = capture(empty, (torch.empty(2, 5, 8, device="meta"),))
    assert graph.on_meta
    graph.add_weight("up.half", torch.Tensor.half, "up.weight")
    halved = graph.add_weight("up.double", _double, "up.weight")
    linear = graph.find(torch.ops.aten.linear.default)[0]
    linear.update_arg(1, halved)
    graph.clean()
    graph.materialize({**mixer.state_dict(), "scale": mixer.scale})
    assert not graph.on_meta
    with torch.no_grad():
        mixer.up.weight.mul_(2)
    assert torch.equal(graph(x), mixer(x))


def _double(weight: Tensor) -> Tensor:
    return weight * 2


def test_filling_needs_every_weight(mixer: Mixer) -> None:
    with torch.device("meta"):
        graph = capture(Mixer().eval(), (torch.empty(2, 5, 8),))
    with pytest.raises(KeyError, match="scale"):
        graph.materialize(mixer.state_dict())


def test_torch_compile_takes_the_module(mixer: Mixer, x: Tensor) -> None:
    graph: Graph = capture(mixer, (x,))
    compiled = torch.compile(graph.module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), mixer(x))


# -- what architectures brought up ------------------------------------------------------------------------------------


class TwoTexts(nn.Module):
    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return source.float().mean(1, keepdim=True) + target.float()


def test_texts_of_two_lengths_get_two_dims() -> None:
    graph = capture(TwoTexts(), (torch.ones(2, 7, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)))
    assert list(graph.dims) == ["batch", "sequence", "target_sequence"]
    assert graph(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)).shape == (1, 9)


def test_one_name_for_two_sizes_is_refused() -> None:
    sizes = {"source": {1: "length"}, "target": {1: "length"}}
    with pytest.raises(UsageError, match="axis 1 of target is called 'length' and has size 4, another axis of that name 7"):
        capture(TwoTexts(), (torch.ones(2, 7, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)), dynamic_shapes=sizes)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 4, dtype=torch.float64)
        y[:, :2] = self.weight[:2] * x  # broadcast
        y[:, 2:].copy_(self.weight[2:])  # and another dtype
        return y


def test_gradients_flow_through_in_place_copies() -> None:
    model, x = InPlace(), torch.randn(3, 2)
    graph = capture(model, x)
    assert not graph.find(torch.ops.aten.copy.default)
    for rows in (3, 1):
        assert torch.equal(graph(x[:rows]), model(x[:rows]))
    expected, found = (torch.autograd.grad(m(x).square().sum(), m.weight)[0] for m in (model, graph.module))
    assert torch.equal(expected, found)


class Keywords(nn.Module):
    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return x * kwargs["scale"] + kwargs["shift"]


def test_arguments_taken_as_kwargs_may_be_dynamic() -> None:
    model = Keywords()
    given = {"x": torch.randn(3, 2), "scale": torch.randn(3, 1), "shift": torch.randn(3, 2)}
    graph = capture(model, (), given)
    assert "forward" not in vars(model)
    one = {k: v[:1] for k, v in given.items()}
    assert torch.equal(graph(**one), model(**one))


class Paired(nn.Module):
    def forward(self, a: Tensor, pair: tuple[Tensor, Tensor], flag: bool = True) -> dict[str, Tensor]:
        return {"difference": a - pair[0] if flag else a, "product": a * pair[1]}


def test_torch_export_takes_the_module_with_its_nested_inputs_and_gives_its_output_class() -> None:
    inputs = {"a": torch.randn(3, 2), "pair": (torch.randn(3, 2), torch.randn(3, 2)), "flag": True}
    module = capture(Paired(), (), inputs).module
    again = torch.export.export(module, (), inputs, strict=False).module()
    expected, found = module(**inputs), again(**inputs)
    assert list(found) == ["difference", "product"]
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_capturing_a_captured_module_again_binds_keywords_by_name_in_any_order() -> None:
    inputs = {"source": torch.full((2, 3), 5), "target": torch.full((2, 3), 7)}
    module = capture(TwoTexts(), (), inputs).module
    again = capture(module, (), dict(reversed(inputs.items())))
    other = {"target": torch.arange(4)[None], "source": torch.arange(4)[None] ** 2}
    assert torch.equal(again(**other), module(**other))
