"""Calibration statistics against direct float64 computation, on an encoder with padded texts."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rewright.ir.capture import capture
from rewright.ir.errors import ResourceError, UsageError
from rewright.ir.graph import Graph
from rewright.passes.pipeline import Pipeline
from rewright.passes.rewrite import Context, GraphPass
from rewright.passes.statistics import Calibration, Moments, Request, linear_inputs, moments, moments_in_order
from rewright.passes.statistics.accumulators import Gram, Reservoir
from rewright.passes.statistics.own_loss import own_loss

_spec = importlib.util.spec_from_file_location("statistics_encoder", Path(__file__).parent / "encoder.py")
assert _spec is not None and _spec.loader is not None
_encoder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_encoder)

aten = torch.ops.aten
CHANNELS = ("min", "max", "absmax", "mean", "mean_abs", "mean_square")
FORWARD = frozenset({*CHANNELS, "token_absmax", "histogram", "gram", "rows"})
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
"""Blocks are summed in float32."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Pipeline([], verify=False).run(capture(_encoder.encoder(), (), _encoder.example())).graph


@pytest.fixture(scope="module")
def batches(graph: Graph) -> list[tuple[Tensor, ...]]:
    """Three batches of other sizes, each with right padding, left padding and a hole."""
    found = []
    for i, (texts, length) in enumerate([(3, 9), (2, 7), (5, 12)]):
        generator = torch.Generator().manual_seed(i)
        mask = torch.ones(texts, length, dtype=torch.long)
        mask[0, length - 2 :], mask[-1, :3], mask[-1, 5] = 0, 0, 0
        found.append(graph.flat_inputs((), {"input_ids": torch.randint(0, 100, (texts, length), generator=generator), "attention_mask": mask}))
    return found


def values_of(graph: Graph, batches: list[tuple[Tensor, ...]], name: str) -> list[Tensor]:
    """A node's value on every batch, by torch's own interpreter, in float64."""

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == name:
                seen.append(value.double())
            return value

    seen: list[Tensor] = []
    with torch.no_grad():
        for flat in batches:
            Look(graph.module).run(*flat, enable_io_processing=False)
    return seen


def real_rows(graph: Graph, batches: list[tuple[Tensor, ...]], name: str) -> Tensor:
    return torch.cat([value[flat[1] != 0] for value, flat in zip(values_of(graph, batches, name), batches)])


def test_every_channel_statistic_equals_its_definition_over_the_real_tokens(graph: Graph, batches: list) -> None:
    statistics = Calibration(batches).gather(graph, linear_inputs(graph, FORWARD))
    assert len(statistics) == 8
    for name, found in statistics.items():
        x = real_rows(graph, batches, name)
        wanted = {"min": x.amin(0), "max": x.amax(0), "absmax": x.abs().amax(0), "mean": x.mean(0), "mean_abs": x.abs().mean(0)}
        for kind, tensor in {**wanted, "mean_square": x.square().mean(0), "gram": x.T @ x / len(x)}.items():
            assert getattr(found, kind).dtype == torch.float64
            torch.testing.assert_close(getattr(found, kind), tensor, **CLOSE)
        assert found.count == len(x) == sum(int(flat[1].sum()) for flat in batches)


def test_present_ranges_count_padding_too(graph: Graph, batches: list) -> None:
    statistics = Calibration(batches).gather(graph, linear_inputs(graph, {"present_min", "present_max", "min"}))
    widened = 0
    for name, found in statistics.items():
        x = torch.cat([value.flatten(0, 1) for value in values_of(graph, batches, name)])
        torch.testing.assert_close(found.present_min, x.amin(0), rtol=0, atol=0)
        torch.testing.assert_close(found.present_max, x.amax(0), rtol=0, atol=0)
        widened += int((found.present_min < found.min).sum())
    assert widened > 0


def test_a_gram_wider_than_one_block_of_columns_with_few_and_with_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    gram, seen = Gram(600), []
    for i, rows in enumerate((5, 900, 700, 5000)):
        seen.append(torch.randn(rows, 600, generator=generator) + 1)
        gram.add(i, seen[-1])
    x = torch.cat(seen).double()
    found = gram.result()["gram"]
    torch.testing.assert_close(found, x.T @ x / len(x), **CLOSE)
    assert torch.equal(found, found.T)


def test_float64_sums_lose_nothing_over_many_batches(graph: Graph, batches: list) -> None:
    """In float32, thousands of equal batches drift by far more than one."""
    name = linear_inputs(graph, {"mean"})[0].value
    once, often = (Calibration(batches[:1] * n).gather(graph, [Request(name, frozenset({"gram"}))])[name] for n in (1, 3000))
    torch.testing.assert_close(often.gram, once.gram, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(often.mean_abs, once.mean_abs, rtol=1e-12, atol=1e-12)


def test_linears_that_share_their_input_share_its_statistics(graph: Graph, batches: list) -> None:
    statistics = Calibration(batches).gather(graph, linear_inputs(graph, {"absmax"}))
    q, k, v = graph.find(aten.linear.default)[:3]
    assert q.args[0] is k.args[0] is v.args[0]
    assert statistics[q.args[0]].absmax is statistics[v.args[0]].absmax
    assert len(statistics) == 8 < len(graph.find(aten.linear.default)) == 12


def test_excluded_positions_count_from_the_first_real_token(graph: Graph, batches: list) -> None:
    name = linear_inputs(graph, {"mean"})[1].value
    found = Calibration(batches, exclude_positions=(0, 2)).gather(graph, [Request(name, frozenset({"mean", "gram"}))])[name]
    rows = []
    for value, flat in zip(values_of(graph, batches, name), batches):
        for text, mask in zip(value, flat[1]):
            real = text[mask != 0]
            rows += [real[i] for i in range(len(real)) if i not in (0, 2)]
    x = torch.stack(rows)
    assert found.count == len(x)
    torch.testing.assert_close(found.mean, x.mean(0), **CLOSE)
    torch.testing.assert_close(found.gram, x.T @ x / len(x), **CLOSE)


def test_heads_and_flattened_tokens_are_masked_too(graph: Graph, batches: list) -> None:
    """[batch, heads, tokens, channels]: the token axis is found by its size."""
    name = graph.find(torch.ops.rewright.attention.default)[0].args[0].name  # type: ignore[union-attr]
    found = Calibration(batches).gather(graph, [Request(name, frozenset({"mean_square"}))])[name]
    x = torch.cat([value.permute(0, 2, 1, 3)[flat[1] != 0].reshape(-1, 16) for value, flat in zip(values_of(graph, batches, name), batches)])
    torch.testing.assert_close(found.mean_square, x.square().mean(0), **CLOSE)
    statistics = Calibration(batches).gather(graph, [Request(name, frozenset({"mean_square"}), axis=1)])
    by_head = torch.cat([value.permute(0, 2, 1, 3)[flat[1] != 0] for value, flat in zip(values_of(graph, batches, name), batches)])
    torch.testing.assert_close(statistics.of(name, axis=1).mean_square, by_head.square().mean((0, 2)), **CLOSE)


def test_the_histogram_counts_every_element_and_gives_ranges(graph: Graph, batches: list) -> None:
    name = linear_inputs(graph, {"mean"})[3].value
    x = real_rows(graph, batches, name)
    for order in (batches, batches[::-1]):
        histogram = Calibration(order).gather(graph, [Request(name, frozenset({"histogram"}))])[name].histogram
        assert histogram.limit / 2 < x.abs().max() <= histogram.limit
        assert torch.equal(histogram.counts.double(), torch.histogram(x, histogram.edges)[0])
        ordered = x.abs().flatten().sort().values
        for percent in (50, 90, 99.9):
            wanted = ordered[math.ceil(percent / 100 * len(ordered)) - 1].item()
            assert abs(histogram.percentile(percent) - wanted) <= x.abs().max() / 512

    def error(limit: float) -> float:
        step = limit / 7
        return (((x / step).round().clamp(-7, 7) * step - x) ** 2).mean().item()

    best = min(error(x.abs().max().item() * i / 200) for i in range(1, 201))
    assert error(histogram.mse_limit(4)) < 1.02 * best < 0.9 * error(x.abs().max().item())


def test_the_histogram_widens_when_larger_values_come() -> None:
    from rewright.passes.statistics.accumulators import Histogram

    histogram, seen = Histogram(1), []
    for i, scale in enumerate((0.0, 1e-3, 5.0, 1.0, 3e4)):
        seen.append(torch.randn(50, 4, generator=torch.Generator().manual_seed(i)) * scale)
        histogram.add(i, seen[-1])
    found = histogram.result()
    edges = torch.linspace(-float(found["limit"]), float(found["limit"]), 2049, dtype=torch.float64)
    assert torch.equal(found["counts"].double(), torch.histogram(torch.cat(seen).double(), edges)[0])


def test_token_quantiles_hold_to_a_256th(graph: Graph, batches: list) -> None:
    name = linear_inputs(graph, {"mean"})[2].value
    found = Calibration(batches).gather(graph, [Request(name, frozenset({"token_absmax"}))])[name].token_absmax
    absmax = real_rows(graph, batches, name).abs().amax(1).sort().values
    assert int(found.counts.sum()) == len(absmax)
    for q in (0.1, 0.5, 0.99, 1.0):
        wanted = absmax[math.ceil(q * len(absmax)) - 1].item()
        assert abs(found.quantile(q) - wanted) <= wanted / 256


def test_the_reservoir_holds_real_rows_equal_for_equal_seeds_and_evenly_drawn(graph: Graph, batches: list) -> None:
    names = [r.value for r in linear_inputs(graph, {"rows"})[:2]]
    requests = [Request(n, frozenset({"rows"})) for n in names]
    a, again, other = (Calibration(batches, seed=seed, reservoir=10).gather(graph, requests) for seed in (1, 1, 2))
    assert torch.equal(a[names[0]].rows, again[names[0]].rows) and not torch.equal(a[names[0]].rows, other[names[0]].rows)
    assert torch.equal(a[names[0]].row_index, a[names[1]].row_index)  # the same tokens everywhere
    per_batch = [value[flat[1] != 0] for value, flat in zip(values_of(graph, batches, names[0]), batches)]
    wanted = torch.stack([per_batch[batch][row] for batch, row in a[names[0]].row_index.tolist()])
    assert torch.equal(a[names[0]].rows.double(), wanted) and len(wanted) == 10
    everything = Calibration(batches).gather(graph, requests)[names[0]].rows
    assert torch.equal(everything.double(), torch.cat(per_batch))


def test_the_reservoir_is_uniform() -> None:
    drawn = torch.zeros(60)
    for seed in range(400):
        reservoir = Reservoir(1, 6, seed)
        for batch in range(3):
            reservoir.add(batch, torch.arange(20 * batch, 20 * batch + 20)[:, None].float())
        drawn[reservoir.result()["rows"].long().squeeze(1)] += 1
    assert drawn.sum() == 2400
    assert (drawn.view(3, 20).sum(1) - 800).abs().max() < 92  # four standard deviations
    assert ((drawn - 40).square() / 40).sum() < 100  # chi-squared of 59 degrees of freedom: 100 is one in a thousand


def test_block_influence_is_one_minus_the_mean_cosine(graph: Graph, batches: list) -> None:
    start, end = (n.name for n in graph.find(aten.layer_norm.default)[1:4:2])
    found = Calibration(batches).gather(graph, [Request(end, frozenset({"influence"}), block_input=start)])[end]
    a, b = real_rows(graph, batches, start), real_rows(graph, batches, end)
    assert found.influence == pytest.approx(1 - torch.cosine_similarity(a, b).mean().item(), rel=1e-6)
    with pytest.raises(UsageError, match="needs block_input"):
        Request(end, frozenset({"influence"}))


def test_one_value_has_one_influence_beside_its_other_statistics(graph: Graph, batches: list) -> None:
    first, second, end = (n.name for n in graph.find(aten.layer_norm.default)[:3])
    from_first, from_second = (Request(end, frozenset({"influence"}), block_input=start) for start in (first, second))
    alone = Calibration(batches).gather(graph, [from_second])[end].influence
    found = Calibration(batches).gather(graph, [Request(end, frozenset({"mean"})), from_second, from_second])[end]
    assert found.influence == alone and len(found.mean) == 64
    with pytest.raises(UsageError, match=f"the influence of {end} was asked for from {first} and from {second}; gather them one after the other"):
        Calibration(batches).gather(graph, [from_first, from_second])


def test_gradients_are_squared_sample_by_sample(graph: Graph, batches: list) -> None:
    linear = graph.find(aten.linear.default)[4]
    weight, activation = linear.args[1].name, linear.args[0].name  # type: ignore[union-attr]

    def loss(outputs: tuple, flat: tuple) -> Tensor:
        return (outputs[0] * flat[1][..., None]).square().sum() * outputs[0][0, 0, 0]

    requests = [Request(weight, frozenset({"gradient"})), Request(activation, frozenset({"gradient", "gradient_gram"}))]
    found = Calibration(batches, loss=loss).gather(graph, requests)
    twin = capture(_encoder.encoder(), (), _encoder.example())
    parameter = twin.module.get_parameter(str(linear.args[1].target))  # type: ignore[union-attr]
    squares = []
    for flat in batches:
        for i in range(len(flat[0])):
            one = tuple(t[i : i + 1] for t in flat)
            [gradient] = torch.autograd.grad(loss((twin.module(*one),), one), parameter)
            squares.append(gradient.double().square())
    mean = torch.stack(squares).mean(0)
    rows, columns = found[weight].gradient_square
    torch.testing.assert_close(rows, mean.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(columns, mean.mean(0), rtol=1e-5, atol=1e-5)
    gram = found[activation].gradient_gram
    torch.testing.assert_close(gram.diagonal(), found[activation].gradient_square[1], rtol=1e-5, atol=1e-5)


def test_without_a_loss_gradients_are_of_the_models_own_likelihood() -> None:
    """For logits z = W x the Fisher of W is E[x^2] times the variance of the softmax: p (1 - p)."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(4000, 3)
    graph = Pipeline([], verify=False).run(capture(model, (x,))).graph
    weight = next(n for n in graph.fx.nodes if n.op == "get_attr" and n.meta["val"].dim() == 2)
    request = Request(weight.name, frozenset({"gradient"}))
    calibration = Calibration([(x,)])
    rows, columns = calibration.gather(graph, [request])[weight].gradient_square
    p = model(x).softmax(-1).detach().double()
    want = (p * (1 - p)).T @ x.double().square() / len(x)
    torch.testing.assert_close(rows, want.mean(1), rtol=0.1, atol=0)
    torch.testing.assert_close(columns, want.mean(0), rtol=0.1, atol=0)
    again = Calibration([(x,)]).gather(graph, [request])[weight].gradient_square
    assert torch.equal(rows, again[0])
    assert not torch.equal(rows, Calibration([(x,)], seed=1).gather(graph, [request])[weight].gradient_square[0])


def test_the_own_likelihood_of_other_outputs_is_a_unit_normal_and_padding_counts_for_nothing(graph: Graph, batches: list) -> None:
    loss = own_loss(graph)
    flat = tuple(t[:1] for t in batches[0])
    output = graph.run(flat)[0].requires_grad_()
    [gradient] = torch.autograd.grad(loss((output,), flat), output)
    real = flat[1][0] != 0
    assert not real.all() and (gradient[0][~real] == 0).all()
    assert 0.85 < gradient[0][real].square().mean() < 1.15  # the drawn noise itself


def test_the_first_inputs_are_whole_batches_until_there_are_enough(batches: list) -> None:
    """Of 3, 2 and 5 texts."""
    calibration = Calibration(batches)
    assert [len(calibration.first(samples)) for samples in (1, 3, 4, 5, 6, 99)] == [1, 1, 2, 2, 3, 3]
    assert calibration.first(4)[1] is calibration.batches[1]


# -- moments of layers rewritten one by one -----------------------------------------------------------------------------


def _up_projections(graph: Graph) -> list[fx.Node]:
    return [n for n in graph.find(aten.linear.default) if n.meta["val"].shape[-1] == 128]


def _with_rows_dropped(graph: Graph, linear: fx.Node) -> None:
    """An edit: the up projection by one of the same shape that ignores half its inputs."""
    w: Any = linear.args[1]
    new = graph.add_weight(f"{w.target}_edited", lambda w: torch.cat([w[:, :32] * 1.5, torch.zeros_like(w[:, 32:])], 1), str(w.target), like=linear)
    linear.args = (linear.args[0], new, *linear.args[2:])


@pytest.mark.parametrize("order", ["oneshot", "sequential", "asymmetric"])
def test_moments_in_order_are_of_the_program_with_the_layers_before_it_rewritten(order: Any, graph: Graph, batches: list) -> None:
    edited, calibration = graph.draft(), Calibration(batches)
    places = [(act.name, up.args[0].name, up.name) for up in _up_projections(edited) for act in up.users]  # type: ignore[union-attr]
    statistics = calibration.gather(graph, [Request(value, frozenset({"gram"})) for value, _, _ in places])
    source = moments_in_order(edited, order, statistics, calibration)
    for value, start, up in places:
        nodes = {n.name: n for n in edited.fx.nodes}
        found = source(nodes[value], nodes[start])
        edited.recompile()
        x, x0 = real_rows(graph if order == "oneshot" else edited, batches, value), real_rows(graph, batches, value)
        torch.testing.assert_close(found.gram, x.T @ x / len(x), **CLOSE)
        torch.testing.assert_close(found.mean, x.mean(0), **CLOSE)
        if order == "asymmetric":
            torch.testing.assert_close(found.cross, x0.T @ x / len(x), **CLOSE)
            torch.testing.assert_close(found.mean_original, x0.mean(0), **CLOSE)
        else:
            assert found.cross is None
        _with_rows_dropped(edited, nodes[up])  # what lay behind `start` was only looked at
    assert torch.allclose(x, x0) == (order == "oneshot")  # of the last layer


def test_following_an_edited_program_holds_only_what_calls_to_come_will_read(graph: Graph, batches: list) -> None:
    edited, calibration = graph.draft(), Calibration(batches)
    follower = moments._Follower(edited, calibration)
    for up in _up_projections(edited):
        act = next(iter(up.users))
        list(follower.rows(act.name, up.args[0].name))  # type: ignore[union-attr]
        held = {n for n in follower.held[0] if n.op == "call_function"}
        assert up.args[0] in held and act not in held
        assert all(any(user not in follower.done for user in n.users) for n in held)


@pytest.mark.parametrize("affine", [False, True])
def test_the_target_of_asymmetric_moments_splits_the_error_exactly(affine: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(500, 12, generator=generator, dtype=torch.float64) + 0.7
    x = x0 @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)).double() + 0.3
    w, b, other = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (5,), (5, 12)))
    m = Moments(x.T @ x / 500, x.mean(0), x0.T @ x / 500, x0.mean(0))
    new, offset = m.target(w, b, affine=affine, ridge=0)
    wanted = x0 @ w.T + b
    if affine:
        shift = wanted.mean(0) - x.mean(0) @ other.T
        assert torch.allclose(offset, wanted.mean(0) - x.mean(0) @ new.T)
    else:
        shift, wanted = torch.zeros(5), wanted - b
        assert torch.equal(offset, b)
        offset = torch.zeros(5)
    whole = (wanted - x @ other.T - shift).square().sum()
    parts = (wanted - x @ new.T - offset).square().sum() + (x @ (new - other).T + offset - shift).square().sum()
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=0)
    damped, _ = m.target(w, b, affine=affine, ridge=1e9)
    torch.testing.assert_close(damped, w, rtol=1e-6, atol=1e-6)  # a ridge pulls to the layer as it was


def test_moments_need_calibration_data_and_say_so(graph: Graph) -> None:
    with pytest.raises(UsageError, match="need calibration data"):
        moments_in_order(graph, "asymmetric", None, None)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_under_a_memory_limit_the_run_is_cut_and_gives_the_same_bits(graph: Graph, batches: list, tmp_path: Path) -> None:
    kinds = {"mean", "gram", "histogram"}
    whole = Calibration(batches).gather(graph, linear_inputs(graph, kinds))
    seen: list[int] = []
    limited = Calibration(batches, memory_limit=3 << 19, cache=tmp_path, progress=lambda what, done, total: seen.append(total))
    found = limited.gather(graph, linear_inputs(graph, kinds))
    assert limited.runs == 1 and seen[-1] >= 3  # one run, each layer once, in parts
    for name in whole:
        assert torch.equal(found[name].gram, whole[name].gram) and torch.equal(found[name].histogram.counts, whole[name].histogram.counts)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 * 8


def test_accumulators_and_waiting_values_stay_within_the_limit(graph: Graph, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = [0], [0]
    real_init, real_result = Gram.__init__, Gram.result

    def init(self: Gram, width: int) -> None:
        real_init(self, width)
        held[0] += self.sum.nbytes
        most[0] = max(most[0], held[0])

    def result(self: Gram) -> dict[str, Tensor]:
        held[0] -= self.sum.nbytes
        return real_result(self)

    monkeypatch.setattr(Gram, "__init__", init)
    monkeypatch.setattr(Gram, "result", result)
    Calibration(batches).gather(graph, linear_inputs(graph, {"gram"}))
    assert most[0] == (6 * 64**2 + 2 * 128**2) * 8
    most[0] = 0
    Calibration(batches, memory_limit=1 << 20).gather(graph, linear_inputs(graph, {"gram"}))
    assert 0 < most[0] < 300_000 and held[0] == 0


def test_where_the_waiting_values_are_too_large_groups_of_values_run_from_the_start(graph: Graph) -> None:
    many = [tuple(t.repeat(40, 5) for t in graph.flat_inputs((), _encoder.example()))] * 4
    requests = linear_inputs(graph, {"gram"})
    whole = Calibration(many).gather(graph, requests)
    limited = Calibration(many, memory_limit=1 << 20)  # the hidden state alone is 5.5 MB
    found = limited.gather(graph, requests)
    assert limited.runs > 1
    assert all(torch.equal(found[n].gram, whole[n].gram) for n in whole)


def test_a_limit_that_can_t_be_kept_is_refused_with_the_bytes_it_takes(graph: Graph, batches: list) -> None:
    with pytest.raises(ResourceError, match=r"at \w+ \(.*\) the smallest part of the run needs 0.[1-9] MiB, over the memory limit of 0.0 MiB"):
        Calibration(batches, memory_limit=10_000).gather(graph, linear_inputs(graph, {"gram"}))


# -- what is known --------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_what_is_in_the_cache(graph: Graph, batches: list, tmp_path: Path) -> None:
    requests = linear_inputs(graph, {"gram"})

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    limit = 1 << 20
    with pytest.raises(KeyboardInterrupt):
        Calibration(batches, memory_limit=limit, cache=tmp_path, progress=interrupt).gather(graph, requests)
    there = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    assert 0 < len(there) < 16
    found = Calibration(batches, memory_limit=limit, cache=tmp_path).gather(graph, requests)
    assert all(f.stat().st_mtime_ns == t for f, t in there.items()) and len(list(tmp_path.iterdir())) == 16
    whole = Calibration(batches).gather(graph, requests)
    assert all(torch.equal(found[n].gram, whole[n].gram) for n in whole)
    third = Calibration(batches, cache=tmp_path)
    third.gather(graph, requests)
    assert third.runs == 0


def test_other_data_seeds_positions_or_weights_are_other_statistics(graph: Graph, batches: list, tmp_path: Path) -> None:
    requests = [Request(linear_inputs(graph, {"rows"})[1].value, frozenset({"rows"}))]

    def runs(g: Graph, **options: Any) -> int:
        calibration = Calibration(**{"batches": batches, "cache": tmp_path, **options})
        calibration.gather(g, requests)
        return calibration.runs

    assert runs(graph) == 1
    assert runs(graph) == 0
    assert runs(graph, batches=batches[:2]) == runs(graph, batches=batches[::-1]) == runs(graph, seed=1) == runs(graph, exclude_positions=(0,)) == 1
    other = graph.clone()
    other.module.embed.weight = nn.Parameter(other.module.embed.weight + 1)  # type: ignore[union-attr, operator]
    assert runs(other) == 1


@dataclass(frozen=True)
class Scale(GraphPass):
    """Doubles the input of one linear, and notes what it was told."""

    at: int = 6
    told: list = dataclasses.field(default_factory=list, compare=False)
    name = "scale"
    exact = False
    requires = frozenset({"absmax"})

    def run(self, graph: Graph, context: Context) -> Graph:
        assert context.statistics is not None and context.calibration is not None
        self.told.append({n: s.absmax for n, s in context.statistics.items()})
        linear = graph.find(aten.linear.default)[self.at]
        doubled = graph.insert(aten.mul.Tensor, linear.args[0], 2.0, before=linear)
        linear.replace_input_with(linear.args[0], doubled)  # type: ignore[arg-type]
        context.apply(linear)
        return graph


def test_the_pipeline_gathers_once_and_again_only_what_a_pass_changed(graph: Graph, batches: list) -> None:
    seen: list[int] = []
    calibration = Calibration(batches)
    real = calibration._run

    def run(g: Graph, missing: list) -> None:
        seen.append(len(missing))
        real(g, missing)

    calibration._run = run  # type: ignore[method-assign]
    first, second = Scale(at=6), Scale(at=9)
    outcome = Pipeline([first, second], calibration=calibration).run(graph, batches[:1])
    assert [r.undone for r in outcome.records if r.name == "scale"] == [None, None]
    [before], [after] = first.told, second.told
    assert seen == [8, 4]  # all; then the doubled value and the three that depend on it
    same = [n for n in after if n in before and torch.equal(before[n], after[n])]
    assert len(same) == 5 and len(after) == 9  # q alone reads the doubled value, so k and v's input stays
    doubled = next(n for n in after if n not in before)
    untouched = outcome.graph.find(aten.linear.default)[7].args[0].name  # type: ignore[union-attr]
    torch.testing.assert_close(after[doubled], 2 * before[untouched])


def test_a_pass_that_needs_statistics_asks_for_calibration_data(graph: Graph, batches: list) -> None:
    with pytest.raises(UsageError, match=r"scale needs statistics \(absmax\) and there is no calibration data"):
        Pipeline([Scale()]).run(graph, batches[:1])


# -- refusals -------------------------------------------------------------------------------------------------------


def test_refusals_say_what_is_wrong(graph: Graph, batches: list) -> None:
    name = linear_inputs(graph, {"mean"})[0].value
    with pytest.raises(UsageError, match="no statistic named 'grm'. Did you mean 'gram'"):
        Request(name, frozenset({"grm"}))
    with pytest.raises(UsageError, match="the graph has no value of that name"):
        Calibration(batches).gather(graph, [Request("nowhere", frozenset({"mean"}))])
    with pytest.raises(UsageError, match=r"input_ids is torch.int64.*floating-point"):
        Calibration(batches).gather(graph, [Request("input_ids", frozenset({"mean"}))])
    with pytest.raises(UsageError, match="at least one batch"):
        Calibration([])
    found = Calibration(batches).gather(graph, [Request(name, frozenset({"mean"}))])
    with pytest.raises(UsageError, match="gram of .* was not requested; there is channels"):
        _ = found[name].gram
    with pytest.raises(KeyError, match="no statistics of nowhere"):
        _ = found["nowhere"]
    blank = [(batches[0][0], torch.zeros_like(batches[0][1]))]
    with pytest.raises(UsageError, match="no row of .* counted"):
        Calibration(blank).gather(graph, [Request(name, frozenset({"mean"}))])


@pytest.mark.parametrize("kind", ["mean", "gram", "histogram", "token_absmax", "rows"])
def test_values_that_are_not_finite_are_named(kind: str) -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x * 1000)

    graph = capture(Overflow(), (torch.randn(4, 8),))
    with pytest.raises(UsageError, match="exp is infinite or NaN"):
        Calibration([(torch.randn(4, 8),)]).gather(graph, [Request("exp", frozenset({kind}))])


def test_bfloat16_values_are_summed_as_they_are() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(700, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    graph = capture(Double(), (x,))
    found = Calibration([(x,)]).gather(graph, [Request("mul", frozenset({"gram", "mean", "histogram"}))])["mul"]
    y = x.double() * 2
    torch.testing.assert_close(found.gram, y.T @ y / 700, **CLOSE)
    torch.testing.assert_close(found.mean, y.mean(0), **CLOSE)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
