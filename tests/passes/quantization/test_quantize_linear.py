"""W8A8 linears: codes and scales, what is refused, gradients through the rounding, the layers left out over a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.ops.linear_int8_dynamic import linear_int8_dynamic, quantized_dynamic
from rewright.passes.pipeline import Budget, Pipeline
from rewright.passes.quantization.quantize_linear import QuantizeLinear, channel_codes, channel_scales
from rewright.tools.models import as_flat
from rewright.tools.optimize import capture

from ..encoder import encoder, example


def quantize(module: nn.Module, inputs: dict | tuple, **options):
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    graph = capture(module, args, kwargs)
    budget, ignore = options.pop("budget", Budget()), options.pop("ignore", ())
    return Pipeline([QuantizeLinear(**options)], budget=budget, ignore=ignore).run(graph, [as_flat(graph, inputs)])


def test_codes_are_symmetric_and_reach_the_full_range() -> None:
    w = torch.randn(7, 33)
    codes = channel_codes(w)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).tolist() == [127] * 7
    assert torch.allclose(codes * channel_scales(w)[:, None], w, atol=float(channel_scales(w).max()) / 2 + 1e-6)
    assert channel_scales(torch.zeros(2, 3)).tolist() == [1, 1]


def test_signal_to_noise_of_gaussian_weights_is_that_of_the_table() -> None:
    torch.manual_seed(0)
    w = torch.randn(512, 1024)
    noise = w - channel_codes(w) * channel_scales(w)[:, None]
    assert abs(10 * torch.log10(w.square().mean() / noise.square().mean()).item() - 42.1) < 0.3  # specs/quant_shiftadd.md 1


@pytest.mark.parametrize("x", [torch.tensor([0.0, 0.3, 5.0]), torch.tensor([-4.0, -0.1]), torch.tensor([-1.0, 0.0, 3.0]), torch.zeros(3)])
def test_dynamic_quantization_agrees_with_the_onnx_formula(x: Tensor) -> None:
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    want = [(min(255, max(0, round(v / step) + zero)) - zero) * step for v in x.tolist()]
    assert torch.allclose(quantized_dynamic(x), torch.tensor(want), atol=1e-6)
    assert quantized_dynamic(torch.cat([x, torch.zeros(1)]))[-1] == 0


def test_gradients_pass_straight_through_the_rounding() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    w = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    scale = torch.rand(4, requires_grad=True)
    torch.ops.rewright.linear_int8_dynamic(x, w, scale, None).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (w * scale.detach()[:, None]).sum(0).expand(5, 8), atol=1e-5)
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0


def test_every_linear_of_an_encoder_is_quantized_and_fine_tunes() -> None:
    outcome = quantize(encoder(), example())
    assert outcome.records[-1].applied == 12
    assert outcome.graph.weight_bytes() < 0.45 * outcome.original.weight_bytes()
    assert outcome.total is not None
    assert 0.999 < outcome.total.cosine < 1
    outcome.graph.module(**example()).sum().backward()
    assert all(p.grad is not None for p in outcome.graph.module.parameters())


def test_refuses_small_tied_and_half_precision_layers_in_words() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.small = nn.Embedding(100, 64), nn.Linear(64, 8)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            return nn.functional.linear(x, self.embed.weight), self.small(x)

    outcome = quantize(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    sentences = [d.why for d in outcome.records[-1].declined]
    assert sentences == ["its weight embed.weight is also read by embedding", "its 512 weights are fewer than min_weights = 4096"]
    half = quantize(nn.Linear(64, 64).half(), (torch.randn(2, 64).half(),))
    assert "torch.float16" in half.records[-1].declined[0].why


def test_ignored_modules_stay_as_they_are() -> None:
    outcome = quantize(encoder(), example(), ignore=("layers.0",))
    assert all(layer.startswith("layers.1") for layer in outcome.records[-1].layers)
    assert {d.why for d in outcome.records[-1].declined} == {"the user asked to leave layers.0 alone"}


def test_over_budget_the_most_harmful_layers_are_left_out() -> None:
    model = encoder()
    with torch.no_grad():
        model.layers[0].up.bias[0] += 50  # one hidden channel takes the whole shared range, and nothing reads it
        model.layers[0].down.weight[:, 0] = 0
    free = quantize(model, example())
    assert free.total is not None
    outcome = quantize(model, example(), budget=Budget(min_cosine=1 - (1 - free.total.cosine) / 3))
    record = outcome.records[-1]
    assert record.undone is None
    assert 0 < record.applied < 12
    assert "layers.0.down" not in record.layers
    assert any("left out" in d.why for d in record.declined)


def test_an_impossible_budget_undoes_the_pass_and_says_so() -> None:
    outcome = quantize(encoder(layers=1), example(), budget=Budget(min_cosine=1.0))
    assert outcome.records[-1].undone is not None
    assert "no subset" in outcome.records[-1].undone
    assert outcome.total is not None
    assert outcome.total.bit_equal


def test_the_op_is_its_meaning() -> None:
    x, w, scale = torch.randn(3, 8), torch.randint(-127, 128, (4, 8), dtype=torch.int8), torch.rand(4)
    assert torch.equal(torch.ops.rewright.linear_int8_dynamic(x, w, scale, None), linear_int8_dynamic(x, w, scale, None))
