"""A batch norm in eval mode disappears into the layer in front of it: every kind of layer, with and without its parts, or a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.capture import capture
from rewright.passes.fusion.fold_batch_norm import FoldBatchNorm
from rewright.passes.pipeline import Pipeline


def trained(norm: nn.Module) -> nn.Module:
    """With statistics that matter, among them a variance next to nothing, where eps counts."""
    generator = torch.Generator().manual_seed(0)
    for name in ("running_mean", "weight", "bias"):
        if getattr(norm, name) is not None:
            getattr(norm, name).data = torch.randn(8, generator=generator)
    norm.running_var = torch.rand(8, generator=generator) + 0.1  # type: ignore[assignment]
    norm.running_var[0] = 1e-5
    return norm


LAYERS = {
    "conv2d": lambda bias: (nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "depthwise": lambda bias: (nn.Conv2d(8, 8, 3, groups=8, stride=2, bias=bias), nn.BatchNorm2d(8, eps=1e-3), (2, 8, 9, 9)),
    "conv1d": lambda bias: (nn.Conv1d(4, 8, 3, padding=1, bias=bias), nn.BatchNorm1d(8), (2, 4, 9)),
    "linear": lambda bias: (nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), (5, 4)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_norm_goes_into_the_layer_in_front(layer: str, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    front, norm, shape = LAYERS[layer](bias)
    if not affine:
        norm = type(norm)(8, eps=norm.eps, affine=False)
    model, x = nn.Sequential(front, trained(norm), nn.ReLU()).eval(), torch.randn(shape)
    done = Pipeline([FoldBatchNorm()]).run(capture(model, (x,)), [(x,)])
    record = done.records[-1]
    assert (record.matched, record.applied, record.undone) == (1, 1, None)
    assert [n.target for n in done.graph.nodes if "norm" in str(n.target)] == [] and len(done.graph.weights()) == 2
    with torch.no_grad():
        wanted = model(x)
    assert torch.allclose(done.graph.run((x,))[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


class Two(nn.Module):
    """A convolution whose output, or whose weight, something else reads too."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.conv, self.norm = what, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        more = {"output": lambda: y, "weight": lambda: self.conv(x * 2)}[self.what]()
        return self.norm(y) + more


@pytest.mark.parametrize(("what", "sentence"), [("output", "conv is also read by add"), ("weight", "its weight conv.weight is also read by conv2d")])
def test_what_others_read_stays(what: str, sentence: str) -> None:
    x = torch.randn(2, 8, 5, 5)
    record = Pipeline([FoldBatchNorm()]).run(capture(Two(what).eval(), (x,)), [(x,)]).records[-1]
    assert (record.matched, record.applied) == (1, 0) and record.declined[0].why.startswith(sentence)


def test_a_linear_layer_of_tokens_has_its_channels_elsewhere() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval(), torch.randn(3, 8, 4)
    record = Pipeline([FoldBatchNorm()]).run(capture(model, (x,)), [(x,)]).records[-1]
    assert [d.why for d in record.declined] == ["it normalises axis 1 of 3, and the channels of 0 are the last"]
