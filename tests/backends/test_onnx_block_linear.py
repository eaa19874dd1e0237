"""Block-structured linears in onnxruntime: the same numbers at every size, one product a block, constants folded, no dense matrix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewright.backends.onnx import block_dense_linear, block_shuffle_linear
from rewright.backends.onnx.export import FORMS, export
from rewright.backends.onnx.session import Session
from rewright.ir.capture import capture
from rewright.ir.graph import Graph
from rewright.passes.factorization.block_structured import BlockStructured
from rewright.passes.pipeline import Pipeline

torch.set_num_threads(1)
OPS = torch.ops.rewright

# inputs, outputs, blocks of inputs, of outputs (0: block_dense_linear), middle values a block of inputs, bias
STRUCTURES = [
    (48, 64, 4, 4, 8, True),
    (48, 64, 4, 4, 10, False),  # l does not divide q
    (45, 62, 6, 4, 2, True),  # padded; some pairs of blocks have no rank
    (64, 24, 2, 4, 6, True),
    (48, 64, 4, 0, 10, True),
    (13, 7, 4, 0, 3, False),  # padded
]


class Structured(nn.Module):
    def __init__(self, inputs: int, outputs: int, ins: int, outs: int, q: int, bias: bool) -> None:
        super().__init__()
        self.op = OPS.block_shuffle_linear if outs else OPS.block_dense_linear
        self.first = nn.Parameter(torch.randn(ins, q, -(-inputs // ins)))
        self.second = nn.Parameter(torch.randn(outs, -(-outputs // outs), ins * q // outs) if outs else torch.randn(outputs, ins * q))
        self.b = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.first, self.second, self.b)


class Several(nn.Module):
    """Every structure on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(Structured(*s) for s in STRUCTURES)

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.each, (a, b, c, d, e, f)))


def inputs(rows: int) -> tuple[Tensor, ...]:
    """Rows of tokens, and of texts of three tokens."""
    return tuple(torch.randn(rows, *([3] if i % 2 else []), structure[0]) for i, structure in enumerate(STRUCTURES))


def test_onnxruntime_computes_what_torch_does_at_every_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = capture(Several().eval(), inputs(5))
    export(graph, tmp_path / "m.onnx")
    session = Session(tmp_path / "m.onnx")
    for rows in (5, 1, 33):
        given = inputs(rows)
        for found, expected in zip(session(given), graph.run(given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def structured(structure: tuple, *shape: int) -> Graph:
    torch.manual_seed(0)
    return capture(Structured(*structure).eval(), (torch.randn(*shape, structure[0]),))


def nodes(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


def test_a_shuffle_is_one_product_a_block_and_no_transpose(tmp_path: Path) -> None:
    export(structured((256, 512, 4, 2, 64, False), 2, 5), tmp_path / "m.onnx")
    assert nodes(tmp_path / "m.onnx") == {"Split": 5, "MatMul": 6, "Concat": 3, "Unsqueeze": 2, "Reshape": 1}


def test_block_dense_is_one_product_a_block_and_one_more(tmp_path: Path) -> None:
    export(structured((256, 512, 4, 0, 32, True), 2, 5), tmp_path / "m.onnx")
    assert nodes(tmp_path / "m.onnx") == {"Split": 1, "MatMul": 5, "Concat": 1, "Add": 1}


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(192, 768), nn.Linear(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def test_both_profiles_have_the_same_form_of_standard_operators() -> None:
    for form in (block_dense_linear, block_shuffle_linear):
        assert form.ort is form.pure
        assert set(FORMS[form.__name__.rpartition(".")[2]]) == {"ort", "pure"}


@pytest.mark.parametrize("kind", ["block-dense", "block-shuffle"])
def test_a_rewritten_layers_file_holds_its_factors_and_nothing_twice(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 192)
    graph = capture(FFN().eval(), (x,))
    after = Pipeline([BlockStructured(kind, 0.5, project="frobenius", refits=0)]).run(graph).graph  # type: ignore[arg-type]
    exported = export(after, tmp_path / "m.onnx", [(x,)])
    floats = sum(t.nbytes for t in after.weights().values())
    assert floats < 0.51 * graph.weight_bytes()
    assert floats <= exported.bytes < floats + 20_000
    assert exported.parity is not None
    assert exported.parity.relative_error < 1e-5
