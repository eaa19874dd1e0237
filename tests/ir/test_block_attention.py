"""Block-sparse attention: dense with every block listed, what loops over pairs compute otherwise; patterns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewright.ir import ops
from rewright.ir.block_patterns import density, heaviest, kept, window

torch.set_num_threads(1)
ours = torch.ops.rewright


def pairs(blocks: Tensor, block: int, heads: int, tokens: int, dense: int = 0) -> Tensor:
    """bool [heads, queries, keys]: what a pattern shows, pair by pair."""
    shown = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for h in range(heads):
        for i in range(tokens):
            row = blocks[h if len(blocks) > 1 else 0, i // block].tolist()
            for j in range(tokens):
                shown[h, i, j] = j // block in row or i < dense
    return shown


@pytest.mark.parametrize("case", range(3))
def test_it_is_dense_attention_over_the_listed_pairs(case: int) -> None:
    q, k, v, blocks, block, mask, causal, scale, dense = list(ops.block_attention.cases(torch.float64, "cpu"))[case]
    shown = pairs(blocks, block, q.shape[1], q.shape[2], dense)
    want = ours.attention(q, k, v, mask, causal, None, scale, None, torch.where(shown, 0.0, -torch.inf).double()[None])
    found = ours.block_attention(q, k, v, blocks, block, mask, causal, scale, dense)
    visible = shown.tril() if causal else shown
    sees = (visible[None] & (mask[:, None, None, :] if mask is not None else True)).any(-1).expand(q.shape[:3])
    assert sees.float().mean() > 0.9
    torch.testing.assert_close(found[sees], want[sees], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [64, 61])
def test_with_every_block_listed_it_is_dense_attention(causal: bool, tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 4, tokens, 16)
    every = torch.arange(4).expand(1, 4, 4)
    torch.testing.assert_close(ours.block_attention(q, k, v, every, 16, None, causal), ours.attention(q, k, v, None, causal), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_blocks_of_one_token_is_window_attention(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 19, 8, dtype=torch.float64)
    found = ours.block_attention(q, k, v, window(19, 4, causal), 1, None, causal)
    torch.testing.assert_close(found, ours.attention(q, k, v, None, causal, 5))


def test_a_pattern_serves_every_shorter_input() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    for tokens in (40, 33, 16, 7):
        short = [x[:, :, :tokens] for x in (q, k, v)]
        want = ours.block_attention(*short, window(-(-tokens // 8), 1), 8)
        torch.testing.assert_close(ours.block_attention(*short, window(64, 1), 8), want)


def test_what_padding_holds_does_not_matter() -> None:
    q, k, v = torch.randn(3, 2, 2, 24, 8)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 13:] = False
    found = []
    for other in (0.0, 100.0):
        k[1, :, 13:], v[1, :, 13:] = other, other
        found.append(ours.block_attention(q, k, v, window(3, 2), 8, mask)[1, :, :13])
    assert torch.equal(*found)


def test_dropped_mass_bounds_the_error() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 3, 32, 8, dtype=torch.float64) * 2
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    blocks = window(4, 0, sinks=1)
    shown = pairs(blocks, 8, 3, 32)
    dropped = (weights * ~shown).sum(-1)
    error = (ours.block_attention(q, k, v, blocks, 8) - ours.attention(q, k, v)).norm(dim=-1)
    largest = v.norm(dim=-1).max()
    assert (error <= 2 * dropped * largest + 1e-12).all()
    assert (error > 0.1 * dropped * largest).any()


def logsumexp(q: Tensor, k: Tensor, shown: Tensor, scale: float) -> Tensor:
    """[B, H, N, 1]: of the scores of the keys a query is shown; -inf where there are none."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    return torch.where(shown, scores, -torch.inf).logsumexp(-1, keepdim=True)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_disjoint_patterns_merge_by_their_log_sums(causal: bool, masked: bool, parts: int) -> None:
    """sigmoid(l1 - l2) o1 + sigmoid(l2 - l1) o2, part after part: some queries see keys in one part alone, in another none."""
    torch.manual_seed(0)
    tokens, block, count, scale = 45, 8, 6, 0.6
    q, k, v = (torch.randn(2, heads, tokens, width, dtype=torch.float64) for heads, width in ((4, 8), (2, 8), (2, 5)))
    mask = torch.rand(2, tokens) < 0.4 if masked else None
    every = torch.rand(4, count, count).argsort(-1)  # [heads, query blocks, key blocks], no two heads alike
    every[..., -1] = torch.where(torch.rand(4, count) < 0.5, every[..., -1], -1)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else torch.ones(tokens, tokens, dtype=torch.bool)
    visible = visible & (mask[:, None, None] if mask is not None else True)

    def part(blocks: Tensor) -> tuple[Tensor, Tensor]:
        o = ours.block_attention(q, k, v, blocks.contiguous(), block, mask, causal, scale)
        return o, logsumexp(q, k, visible & pairs(blocks, block, 4, tokens), scale)

    found = [part(blocks) for blocks in every.split(count // parts, -1)]
    assert not causal or all(torch.isneginf(lse).any() for _, lse in found)
    o, lse = found[0]
    for other, other_lse in found[1:]:
        both = torch.logaddexp(lse, other_lse)
        difference = torch.where(torch.isneginf(both), 0.0, lse - other_lse)  # no part so far shows the query anything
        o, lse = difference.sigmoid() * o + (-difference).sigmoid() * other, both
    sees = ~torch.isneginf(lse).squeeze(-1)
    assert sees.float().mean() > 0.9
    torch.testing.assert_close(o[sees], ours.block_attention(q, k, v, every, block, mask, causal, scale)[sees], rtol=1e-12, atol=1e-12)


# -- patterns ---------------------------------------------------------------------------------------------------------


def rows(blocks: Tensor, head: int = 0) -> list[set[int]]:
    return [{int(b) for b in row if b >= 0} for row in blocks[head]]


def test_windows() -> None:
    assert rows(window(4, 0)) == [{0}, {1}, {2}, {3}]
    assert rows(window(4, 1)) == [{0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3}]
    assert rows(window(4, 1, causal=True)) == [{0}, {0, 1}, {1, 2}, {2, 3}]
    assert rows(window(4, 0, sinks=2)) == [{0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 3}]
    assert rows(window(4, 0, causal=True, sinks=2)) == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}]
    assert window(4, 1).shape == (1, 4, 3)


@pytest.mark.parametrize("causal", [False, True])
def test_every_row_lists_a_block_once_itself_among_them(causal: bool) -> None:
    for blocks in (window(7, 2, causal, 2), heaviest(torch.rand(3, 7, 7), 4, 1, causal)):
        for head in range(len(blocks)):
            for i, row in enumerate(blocks[head]):
                listed = row[row >= 0].tolist()
                assert len(listed) == len(set(listed)) and i in listed and 0 in listed
                assert not causal or max(listed) <= i


def test_the_heaviest_blocks_are_those_with_the_most_mass() -> None:
    mass = torch.tensor([[[0.1, 0.2, 0.7], [0.0, 0.1, 0.9], [0.6, 0.3, 0.1]]])
    assert rows(heaviest(mass, 2)) == [{0, 2}, {1, 2}, {0, 2}]
    assert rows(heaviest(mass, 2, sinks=1)) == [{0, 2}, {0, 1}, {0, 2}]
    torch.testing.assert_close(kept(mass, heaviest(mass, 2)), torch.tensor([[0.8, 1.0, 0.7]]))


def test_density_counts_unused_slots() -> None:
    assert density(window(8, 1)) == 3 / 8
    assert density(window(8, 0), causal=True) == 8 / 36
