"""block_attention in onnxruntime: the same for any batch and length, its scores touched by two products and a softmax alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rewright.backends.onnx.block_attention import pure
from rewright.backends.onnx.export import Profile, export
from rewright.backends.onnx.session import Session
from rewright.ir import ops
from rewright.ir.block_patterns import heaviest, window
from rewright.ir.capture import capture

torch.set_num_threads(1)
ours = torch.ops.rewright
BATCH, TOKENS = Dim("batch", min=1, max=64), Dim("tokens", min=2, max=72)


class Sparse(nn.Module):
    """block_attention with its pattern as a constant, for up to 72 tokens in blocks of 8: 4 query heads, 2 key heads."""

    def __init__(self, blocks: Tensor, causal: bool = False, dense: int = 0, masked: bool = True) -> None:
        super().__init__()
        self.causal, self.dense, self.masked, self.blocks = causal, dense, masked, nn.Buffer(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t, heads in zip(x.split([64, 32, 16], -1), (4, 2, 2)))
        return ours.block_attention(q, k, v, self.blocks, 8, mask > 0 if self.masked else None, self.causal, 0.4, self.dense)


def inputs(b: int, n: int) -> tuple[Tensor, Tensor]:
    """With padding; every query sees a key of its own block."""
    mask = (torch.rand(b, n) < 0.7).long()
    mask[:, ::8] = 1
    return torch.randn(b, n, 64 + 32 + 16), mask


def written(model: nn.Module, path: Path, profile: Profile = "ort") -> Session:
    dims = {"x": {0: BATCH, 1: TOKENS}, "mask": {0: BATCH, 1: TOKENS}}
    export(capture(model, inputs(2, 45), dynamic_shapes=dims), path, [inputs(2, 45)], profile, max_error=1e-5)
    return Session(path)


def calibrated(causal: bool = False) -> Tensor:
    """As the pass makes it: a pattern a head, one row more than there are blocks."""
    return torch.nn.functional.pad(heaviest(torch.rand(4, 9, 9), 3, 1, causal), (0, 0, 0, 1), value=-1)


PATTERNS = {
    "a pattern a head": Sparse(calibrated()),
    "without a mask": Sparse(calibrated(), masked=False),
    "causal": Sparse(calibrated(True), True),
    "a window with a global token": Sparse(torch.nn.functional.pad(window(9, 1, sinks=1), (0, 0, 0, 1), value=-1), dense=1),
    "a causal window with global tokens": Sparse(torch.nn.functional.pad(window(9, 1, True, 1), (0, 0, 0, 1), value=-1), True, 2),
}


@pytest.mark.parametrize("profile", ["ort", pytest.param("pure", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "a causal window with global tokens" else pytest.mark.slow) for n in PATTERNS])
def test_one_file_serves_any_batch_and_length(name: str, profile: Profile, tmp_path: Path) -> None:
    session = written(PATTERNS[name], tmp_path / "m.onnx", profile)
    for b, n in [(1, 72), (3, 8), (2, 64), (1, 41), (2, 3)]:
        given = inputs(b, n)
        torch.testing.assert_close(session(given)[0], PATTERNS[name](*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", range(3))
def test_the_form_is_what_the_op_means(case: int, dtype: torch.dtype) -> None:
    """Where a query sees a key; else both are finite."""
    torch.manual_seed(case)
    given = list(ops.block_attention.cases(dtype, "cpu"))[case]
    found, want = pure(*given), ours.block_attention(*given)
    q, k, v, blocks, block, mask, *rest = given
    counted = ours.block_attention(q, k, torch.ones_like(v), blocks, block, mask, *rest)
    sees = (counted - 1).abs().amax(-1) < 1e-2
    assert found.isfinite().all() and found.dtype == dtype and sees.float().mean() > 0.9
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(found[sees], want[sees], rtol=tolerance, atol=tolerance)


def test_large_scores_of_padding_stay_hidden() -> None:
    q, k, v, blocks, block, mask, *rest = list(ops.block_attention.cases(torch.float32, "cpu"))[1]
    there = mask[:, None, :, None]
    small, large = (pure(q, torch.where(there, k, x), torch.where(there, v, x), blocks, block, mask, *rest) for x in (0.0, 1e4))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)


def test_scores_are_never_masked(tmp_path: Path) -> None:
    """Two products, a softmax; what `where` there is works on lists of blocks."""

    class Fixed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return ours.block_attention(q, k, v, window(8, 1), 8, mask > 0)

    export(capture(Fixed(), (*torch.randn(3, 2, 4, 64, 16), inputs(2, 64)[1])), tmp_path / "m.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx"))
    scores = [n.op_type for n in model.graph.node for out in n.output if _width(model, out) == 3 * 8]
    assert Counter(scores) <= Counter(["MatMul", "Softmax", "Transpose", "Reshape", "Reshape"]), scores
    assert Counter(n.op_type for n in model.graph.node)["IsNaN"] == 0


def _width(model: onnx.ModelProto, name: str) -> int:
    shape = next((v.type.tensor_type.shape.dim for v in model.graph.value_info if v.name == name), ())
    return shape[-1].dim_value if len(shape) else 0
