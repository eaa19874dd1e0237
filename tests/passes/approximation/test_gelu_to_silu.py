"""GELU by a fitted SiLU: closer than the known constant, folded exactly as its formula says, refused where nothing is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewright.ir.cost import op_name
from rewright.passes.approximation.gelu_to_silu import fit
from rewright.passes.pipeline import Pipeline
from rewright.passes.recipe import make_pass
from rewright.passes.statistics import Calibration
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example


def _error(z: Tensor, a: Tensor | float, c: Tensor | float = 1.0, m: Tensor | float = 0.0) -> Tensor:
    return (c * z * torch.sigmoid(a * z) + m - nn.functional.gelu(z)).square().mean(0).sqrt()


def lively_encoder() -> nn.Module:
    """With hidden values wide enough for GELU and SiLU to differ."""
    model = encoder()
    with torch.no_grad():
        for layer in model.layers:
            layer.up.weight *= 3
            layer.norm1.bias.normal_(0, 0.3)
    return model


def test_the_fit_beats_the_known_constant_on_the_distribution_it_is_for() -> None:
    torch.manual_seed(0)
    w1, b1, weight, bias = torch.randn(16, 64) * 0.1, torch.randn(16), torch.rand(64) + 0.5, torch.randn(64) * 2
    n = torch.randn(20_000, 64)
    z = ((n * weight + bias) @ w1.T + b1).double()
    fitted, constant = _error(z, *fit(w1, b1, weight, bias)), _error(z, 1.702)
    assert (fitted <= constant * 1.01).all()
    assert fitted.mean() < 0.9 * constant.mean()
    ignoring_the_bias = _error(z, *fit(w1, b1, weight))
    assert fitted.mean() < ignoring_the_bias.mean()


def test_an_encoder_keeps_its_function_nearly_and_the_fold_is_the_formula() -> None:
    model = lively_encoder()
    graph = capture(model, (), example())
    outcome = Pipeline([make_pass("gelu-to-silu", {})]).run(graph, [as_flat(graph, example())])
    record = outcome.records[-1]
    assert (record.applied, record.undone) == (2, None)
    assert not [n for n in outcome.graph.nodes if op_name(n) == "gelu"]
    assert 0.999 < record.measured["cosine"] < 1
    layer = model.layers[0]
    a, c, m = (t.float() for t in fit(layer.up.weight, layer.up.bias, layer.norm1.weight, layer.norm1.bias))
    x = layer.norm1(torch.randn(5, 64))
    z = layer.up(x)
    want = layer.down(c * z * torch.sigmoid(a * z) + m)
    w = {
        name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1]: t
        for name, t in outcome.graph.weights().items()
        if name.startswith("layers.0") and "silu" in name
    }
    got = nn.functional.linear(nn.functional.silu(nn.functional.linear(x, w["up.weight_silu"], w["up.bias_silu"])), w["down.weight_silu"], w["down.bias_silu"])
    assert torch.allclose(got, want, atol=1e-5)


def test_refuses_an_input_of_unknown_distribution_and_a_gelu_others_read() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seen = nn.functional.gelu(self.up(self.norm(x)))
            return self.down(seen), seen, self.down(nn.functional.gelu(self.up(x)))

    graph = capture(Odd(), (torch.randn(3, 8),))
    record = Pipeline([make_pass("gelu-to-silu", {})]).run(graph, [(torch.randn(3, 8),)]).records[-1]
    assert record.applied == 0
    assert "read elsewhere too" in record.declined[0].why
    assert "its distribution is not known" in record.declined[1].why


def test_a_calibrated_fit_makes_up_in_the_second_layer_for_what_the_first_lost() -> None:
    model = lively_encoder()
    graph = capture(model, (), example())
    generator = torch.Generator().manual_seed(0)
    batches = [{**example(), "input_ids": torch.randint(0, 100, example()["input_ids"].shape, generator=generator)} for _ in range(40)]
    flats = [as_flat(graph, b) for b in batches]
    drift = {}
    for how in ("normal", "calibration"):
        outcome = Pipeline([make_pass("gelu-to-silu", {"fit": how})], calibration=Calibration(flats[:-2])).run(graph, flats[-2:])
        assert outcome.records[-1].applied == 2
        drift[how] = 1 - outcome.records[-1].measured["cosine"]
    assert drift["calibration"] < 0.5 * drift["normal"]
