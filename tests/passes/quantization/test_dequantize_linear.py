"""Codes become weights of floats again: what they stand for exactly, in every layout, or a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rewright.ir.blocks.vocabulary import DEQUANTIZABLE
from rewright.ir.ops import linear_fp8, linear_int8_dynamic, linear_int8_static, linear_nbits, linear_token
from rewright.passes.pipeline import Pipeline
from rewright.passes.quantization.dequantize_linear import DequantizeLinear
from rewright.tools.optimize import capture, optimize

from ..encoder import encoder, example

MEANINGS = (linear_int8_dynamic, linear_int8_static, linear_token, linear_fp8, linear_nbits)


def cases() -> Iterator[tuple]:
    for module in MEANINGS:
        name = module.__name__.rpartition(".")[2]
        for i, case in enumerate(module.cases(torch.float32, "cpu")):
            yield pytest.param(getattr(torch.ops.rewright, name), case, id=f"{name}-{i}")


class Layer(nn.Module):
    """One call of an op with everything but x stored."""

    def __init__(self, op, case: tuple) -> None:
        super().__init__()
        self.op, self.rest = op, case[1:]
        for i, value in enumerate(self.rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"held_{i}", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *(getattr(self, f"held_{i}") if isinstance(v, Tensor) else v for i, v in enumerate(self.rest)))


def test_every_op_that_can_be_is_tried() -> None:
    assert {str(op).split(".")[1] for op in DEQUANTIZABLE} == {m.__name__.rpartition(".")[2] for m in MEANINGS}


@pytest.mark.parametrize(("op", "case"), list(cases()))
def test_the_floats_are_what_the_codes_stand_for(op, case: tuple) -> None:
    x = case[0]
    graph = capture(Layer(op, case), (x,), dynamic_shapes={})
    done = Pipeline([DequantizeLinear()], verify=False).run(graph)
    assert done.records[-1].applied == 1 and [n.target for n in done.graph.nodes] == [torch.ops.aten.linear.default]
    ((name, weight),) = [(n, w) for n, w in done.graph.weights().items() if w.dim() == 2]
    assert name.endswith("_float") and weight.dtype == x.dtype
    # one channel at a time, at the largest value its 8 bits have, nothing is rounded: what comes out is the column of the weights
    unit = torch.zeros(1, *x.shape[1:])
    column = x.shape[-1] // 2
    unit[..., column] = 1.0
    if op is torch.ops.rewright.linear_int8_static:
        unit *= float(case[1]) * (255 - int(case[2]) or -int(case[2]))
    bias = done.graph.run((torch.zeros_like(unit),))[0]
    wanted = op(unit, *case[1:]) - bias
    assert torch.allclose((done.graph.run((unit,))[0] - bias), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))


def test_codes_that_are_computed_are_left_in_a_sentence() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
            return torch.ops.rewright.linear_int8_dynamic(x, w, scale, None)

    graph = capture(Computed(), (torch.randn(3, 4), torch.ones(5, 4, dtype=torch.int8), torch.ones(5)), dynamic_shapes={})
    record = Pipeline([DequantizeLinear()], verify=False).run(graph).records[-1]
    assert [d.why for d in record.declined] == ["its codes are computed (w)"]


def test_a_layer_the_user_names_stays() -> None:
    graph = optimize(encoder(), example(), recipe=[*_quantize()], calibration=[example()] * 4).graph
    record = Pipeline([DequantizeLinear()], ignore=("layers.0",), verify=False).run(graph).records[-1]
    assert record.applied == 6 and {d.why for d in record.declined} == {"the user asked to leave layers.0 alone"}


def _quantize() -> list:
    from rewright.passes.quantization.quantize_linear import QuantizeLinear

    return [QuantizeLinear(min_weights=0)]
