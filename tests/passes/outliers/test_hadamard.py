"""Orthogonal matrices: of every size, quick to apply, the same each time, and said in words where they are blocks."""

from __future__ import annotations

import pytest
import torch

from rewright.ir.errors import UsageError
from rewright.passes.outliers.hadamard import Rotation, hadamard


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 28, 36, 44, 52, 60, 76, 84, 100, 108, 140])
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(size: int) -> None:
    h = hadamard(size)
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(h.abs(), torch.ones_like(h))


def test_a_size_without_construction_is_named() -> None:
    with pytest.raises(UsageError, match="no Hadamard matrix of size 92 by Sylvester's or Paley's construction"):
        hadamard(92)


@pytest.mark.parametrize("width", [1, 2, 6, 12, 48, 64, 90, 128, 344, 384, 768])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_a_rotation_is_orthogonal(width: int, kind: str) -> None:
    q = Rotation(width, kind).matrix()
    assert float(torch.linalg.matrix_norm(q @ q.T - torch.eye(width), 2)) <= 1e-12


@pytest.mark.parametrize("width", [12, 64, 128, 344, 768, 1280])
def test_a_hadamard_rotation_spreads_each_channel_evenly(width: int) -> None:
    one = torch.zeros(1, width)
    one[0, width // 3] = width**0.5
    assert torch.allclose(Rotation(width).turn(one).abs(), torch.ones(1, width, dtype=torch.float64))


def test_where_there_is_no_hadamard_matrix_it_is_blocks_and_says_so() -> None:
    rotation = Rotation(92)
    assert rotation.block == 4
    assert rotation.remark == "no Hadamard matrix of size 92 can be constructed; Q is block-diagonal with blocks of 4"
    q = rotation.matrix()
    assert bool((q[:4, 4:] == 0).all())
    assert bool((q[:4, :4] != 0).all())
    assert Rotation(96).remark is None
    assert Rotation(92, "random").remark is None


def test_the_seed_decides() -> None:
    for kind in ("hadamard", "random"):
        assert torch.equal(Rotation(24, kind, 1).matrix(), Rotation(24, kind, 1).matrix())
        assert not torch.equal(Rotation(24, kind, 1).matrix(), Rotation(24, kind, 2).matrix())


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_turning_is_the_product_with_the_matrix_in_pieces_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.passes.outliers.hadamard._PIECE", 96 * 3)
    rotation, x = Rotation(96, kind), torch.randn(5, 4, 96, dtype=torch.float64)
    assert torch.allclose(rotation.turn(x), x @ rotation.matrix(), atol=1e-13)
    assert rotation.turn(torch.empty(2, 96, device="meta")).shape == (2, 96)


def test_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="no rotation 'givens'; there are hadamard and random"):
        Rotation(8, "givens")
