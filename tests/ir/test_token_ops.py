"""Token merging: what its ops mean by loops, what they conserve, whom they spare; proportional attention as attention over repeated keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rewright.ir import ops
from rewright.ir.ops import proportional

torch.set_num_threads(1)
OPS = torch.ops.rewright
F64 = torch.float64

Match = Callable[..., tuple[Tensor, Tensor, Tensor]]
MATCHES: dict[str, Match] = {
    "bipartite": lambda metric, r, prefix=0, sizes=None: OPS.token_match(metric, r, prefix, sizes),
    "energy": lambda metric, r, prefix=0, sizes=None: OPS.token_match_energy(metric, r, prefix, 0.3, sizes),
}
each_match = pytest.mark.parametrize("match", MATCHES.values(), ids=MATCHES.keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def padded(count: int, *tokens: int) -> Tensor:
    """Sizes of 1 to 3, and 0 from so many tokens on in each sample."""
    sizes = torch.randint(1, 4, (len(tokens), count)).float()
    for row, n in zip(sizes, tokens):
        row[n:] = 0
    return sizes


# -- meanings -----------------------------------------------------------------------------------------------------------


def bipartite_by_loops(metric: Tensor, r: int, prefix: int, sizes: Tensor) -> tuple[list[int], list[int], list[int]]:
    cosine = (metric @ metric.T / metric.norm(dim=1) / metric.norm(dim=1)[:, None]).tolist()
    candidates, targets = range(prefix, len(metric), 2), range(prefix + 1, len(metric), 2)
    partner = {i: max((j for j in targets if sizes[j]), key=lambda j, i=i: cosine[i][j]) for i in candidates}
    order = sorted(candidates, key=lambda i: -cosine[i][partner[i]] if sizes[i] else -9)
    keep = [*range(prefix), *sorted(order[r:]), *targets]
    return keep, order[:r], [keep.index(partner[i]) for i in order[:r]]


def energy_by_loops(metric: Tensor, r: int, prefix: int, sizes: Tensor) -> tuple[list[int], list[int], list[int]]:
    cosine = (metric @ metric.T / metric.norm(dim=1) / metric.norm(dim=1)[:, None]).tolist()
    body = range(prefix, len(metric))
    padding, real = [i for i in body if not sizes[i]], [i for i in body if sizes[i]]

    def energy(i: int) -> float:
        above = torch.tensor([cosine[i][j] for j in real], dtype=F64) - 0.3
        return float(torch.where(above >= 0, above, above.exp() - 1).mean())

    pairs = r - len(padding)
    merged = sorted(real, key=energy, reverse=True)[: 2 * pairs]
    source = padding + merged[::2]
    keep = [i for i in range(len(metric)) if i not in source]
    return keep, source, [keep.index(max(merged[1::2], key=lambda j, i=i: cosine[i][j])) for i in source]


@pytest.mark.parametrize(("match", "loops"), [(MATCHES["bipartite"], bipartite_by_loops), (MATCHES["energy"], energy_by_loops)], ids=MATCHES)
@pytest.mark.parametrize(("count", "r", "prefix", "real"), [(8, 2, 0, 8), (17, 4, 1, 17), (16, 6, 3, 16), (15, 5, 1, 12), (20, 4, 0, 18)])
def test_a_match_is_what_loops_find(match: Match, loops, count: int, r: int, prefix: int, real: int) -> None:
    metric, sizes = torch.randn(3, count, 6, dtype=F64) + 0.5, padded(count, real, count, count)
    found = match(metric, r, prefix, sizes)
    for sample in range(3):
        keep, source, slot = (t[sample].tolist() for t in found)
        expected = loops(metric[sample], r, prefix, sizes[sample])
        assert (keep, source) == expected[:2]
        assert [s for s, i in zip(slot, source) if sizes[sample, i]] == [s for s, i in zip(expected[2], source) if sizes[sample, i]]  # padding adds nothing
    if real == count:
        assert all(torch.equal(a, b) for a, b in zip(found, match(metric, r, prefix)))


def test_own_candidates_and_targets_are_matched_as_the_default_ones_are() -> None:
    metric = torch.randn(2, 14, 6)
    every_second = [torch.arange(1 + i, 14, 2) for i in (0, 1)]
    for a, b in zip(OPS.token_match(metric, 3, 1), OPS.token_match(metric, 3, 1, None, *every_second), strict=True):
        assert torch.equal(a, b)
    targets = torch.tensor([3, 7, 12])
    candidates = torch.tensor([i for i in range(1, 14) if i not in (3, 7, 12)])
    keep, source, slot = OPS.token_match(metric, 5, 1, None, candidates, targets)
    assert torch.equal(keep[:, -3:], targets.expand(2, -1))
    assert torch.isin(source, candidates).all()
    unit = torch.nn.functional.normalize(metric, dim=-1)
    best = targets[(unit[:, candidates] @ unit[:, targets].mT).argmax(-1)]
    assert torch.equal(keep.gather(1, slot), best.gather(1, torch.searchsorted(candidates, source)))


@pytest.mark.parametrize("mlerp", [False, True])
def test_a_merge_is_the_weighted_mean_of_the_members_that_stand_for_some(mlerp: bool) -> None:
    x, sizes = torch.randn(3, 12, 5, dtype=F64), torch.randint(0, 4, (3, 12)).float()
    sizes[0], slot = 0, torch.randint(0, 3, (3, 6))  # a sample of padding alone; several join one, none joins others
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    keep, source = order[:, 6:], order[:, :6]
    y, total = OPS.token_merge(x, keep, source, slot, sizes, mlerp)
    for b in range(3):
        for i in range(6):
            members = [keep[b, i], *source[b][slot[b] == i]]
            members = [m for m in members if sizes[b, m]] or members[:1]
            weights = torch.stack([sizes[b, m] for m in members]).double()
            mean = (torch.stack([x[b, m] for m in members]) * weights[:, None]).sum(0) / weights.sum() if weights.sum() else x[b, members[0]]
            mean = mean / mean.norm() * max(x[b, m].norm() for m in members) if mlerp else mean
            torch.testing.assert_close(y[b, i], mean, rtol=1e-12, atol=1e-12)
            assert total[b, i] == weights.sum()


def test_without_sizes_each_token_counts_once() -> None:
    x = torch.randn(2, 9, 4)
    match = OPS.token_match(x, 4)
    for a, b in zip(OPS.token_merge(x, *match), OPS.token_merge(x, *match, torch.ones(2, 9)), strict=True):
        assert torch.equal(a, b)


def test_taking_moves_whole_tokens_of_each_sample() -> None:
    x, index = torch.randn(3, 5, 2, 4), torch.randint(5, (3, 8))
    for values in (x, x[..., 0, 0]):
        assert torch.equal(OPS.token_take(values, index), torch.stack([v[i] for v, i in zip(values, index)]))


# -- what a merge conserves -----------------------------------------------------------------------------------------------


def merged_thrice(match: Match, x: Tensor, sizes: Tensor | None, prefix: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, their sizes and the places of the original ones after three merges, as a network makes them."""
    places = None
    for r in (5, 4, 2):
        found = match(x, r, prefix, sizes)
        x, sizes = OPS.token_merge(x, *found, sizes)
        places = OPS.token_places(*found, places)
    assert sizes is not None and places is not None
    return x, sizes, places


@each_match
def test_sums_of_sizes_and_of_sizes_times_tokens_stay(match: Match) -> None:
    x, sizes = torch.randn(2, 19, 6, dtype=F64), torch.randint(4, (2, 19)).float()
    y, after, _ = merged_thrice(match, x, sizes)
    assert torch.equal(after.sum(1), sizes.sum(1))
    torch.testing.assert_close((y * after[..., None]).sum(1), (x * sizes[..., None]).sum(1), rtol=1e-12, atol=1e-12)


@each_match
def test_places_count_the_sizes_and_give_back_the_groups(match: Match) -> None:
    x = torch.randn(3, 20, 6, dtype=F64)
    y, sizes, places = merged_thrice(match, x, None)
    assert places.shape == (3, 20)
    assert torch.equal(torch.nn.functional.one_hot(places, y.shape[1]).sum(1).float(), sizes)
    back = OPS.token_take(y, places)
    together = (places[:, :, None] == places[:, None]).double()
    torch.testing.assert_close(back, together @ x / together.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_groups_of_equal_tokens_lose_nothing() -> None:
    x = torch.randn(2, 8, 6).repeat_interleave(2, 1)
    y, sizes = OPS.token_merge(x, *OPS.token_match(x, 8))
    assert torch.equal(y, x[:, ::2])
    assert (sizes == 2).all()


# -- whom it spares -------------------------------------------------------------------------------------------------------


@each_match
def test_prefixes_and_tokens_that_none_joins_stay_bit_for_bit(match: Match) -> None:
    for n in range(60):
        count, prefix = 4 + n % 13, n % 4
        body = count - prefix
        r = 1 + n % (body // 2) if body > 1 else 1
        if body < 2:
            continue
        x, sizes = torch.randn(2, count, 5), torch.randint(1, 9, (2, count)).float()
        keep, source, slot = match(x, r, prefix, sizes)
        assert torch.equal(torch.cat([keep, source], 1).sort(1).values, torch.arange(count).expand(2, -1)), "each token stays or goes"
        assert torch.equal(keep[:, :prefix], torch.arange(prefix).expand(2, -1))
        assert (slot >= prefix).all() and (slot < count - r).all()
        for values in (x, x.bfloat16()):
            y, after = OPS.token_merge(values, keep, source, slot, sizes)
            alone = after == sizes.gather(1, keep)
            assert alone[:, :prefix].all()
            assert torch.equal(y[alone], OPS.token_take(values, keep)[alone])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_odd_and_even_numbers_of_tokens_and_all_candidates_going(count: int) -> None:
    x = torch.randn(2, count, 5)
    for prefix in (0, 1):
        with_prefix = torch.cat([torch.randn(2, prefix, 5), x], 1)
        candidates = (count + 1) // 2
        keep, source, slot = OPS.token_match(with_prefix, candidates, prefix)
        assert torch.equal(source.sort(1).values, torch.arange(prefix, prefix + count, 2).expand(2, -1))
        assert torch.equal(keep, torch.tensor([*range(prefix), *range(prefix + 1, prefix + count, 2)]).expand(2, -1))
        assert (slot >= prefix).all()
        half = count // 2
        keep, source, _ = OPS.token_match_energy(with_prefix, half, prefix)
        assert (keep.shape, source.shape) == ((2, prefix + count - half), (2, half))


@each_match
@pytest.mark.parametrize(("count", "prefix"), [(12, 0), (13, 0), (12, 1)])
def test_padding_goes_first_and_changes_nothing_for_the_others(match: Match, count: int, prefix: int) -> None:
    x, sizes = torch.randn(2, count, 6), torch.randint(1, 4, (2, count)).float()
    y, after = OPS.token_merge(x, *match(x, 2, prefix, sizes), sizes)
    longer, zeros = torch.cat([x, torch.randn(2, 6, 6)], 1), torch.cat([sizes, torch.zeros(2, 6)], 1)
    r = 2 + (3 if match is MATCHES["bipartite"] else 6)  # half of the padding are targets, which stay
    found = match(longer, r, prefix, zeros)
    z, behind = OPS.token_merge(longer, *found, zeros)
    for b in range(2):
        real = behind[b] > 0
        torch.testing.assert_close(z[b, real], y[b], rtol=1e-6, atol=1e-6)
        assert torch.equal(behind[b, real], after[b])


@each_match
def test_more_padding_than_can_go_leaves_the_others_alone(match: Match) -> None:
    x, sizes = torch.randn(2, 16, 6), torch.ones(2, 16)
    sizes[:, 4:] = 0
    keep, source, slot = match(x, 3, 1, sizes)
    assert (source >= 4).all()
    y, after = OPS.token_merge(x, keep, source, slot, sizes)
    real = after > 0
    assert torch.equal(y[real], OPS.token_take(x, keep)[real])
    assert real.sum() == 2 * 4


@each_match
def test_samples_do_not_touch_each_other(match: Match) -> None:
    x, turn = torch.randn(5, 17, 8), torch.tensor([3, 0, 4, 1, 2])
    for a, b in zip(merged_thrice(match, x[turn], None), merged_thrice(match, x, None), strict=True):
        assert torch.equal(a, b[turn])
    for a, b in zip(merged_thrice(match, x[3:4], None), merged_thrice(match, x, None), strict=True):
        torch.testing.assert_close(a, b[3:4])


@each_match
def test_twenty_runs_are_the_same_bit_for_bit(match: Match) -> None:
    x = torch.randn(3, 40, 16).repeat_interleave(2, 1)
    first = merged_thrice(match, x, None)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(merged_thrice(match, x, None), first))


# -- ties, zeros and dtypes -------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_lower_index_counts_first() -> None:
    x = torch.ones(1, 10, 4)
    keep, source, slot = OPS.token_match(x, 3, 1)
    assert (keep.tolist(), source.tolist(), slot.tolist()) == ([[0, 7, 9, 2, 4, 6, 8]], [[1, 3, 5]], [[3, 3, 3]])
    keep, source, slot = OPS.token_match_energy(x, 3, 1)
    assert (keep.tolist(), source.tolist(), slot.tolist()) == ([[0, 2, 4, 6, 7, 8, 9]], [[1, 3, 5]], [[1, 1, 1]])


@each_match
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_zeros_have_no_direction_and_make_no_nan(match: Match, dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 6, dtype=dtype)
    x[0] = 0
    x[1, 3:8] = 0
    found = match(x, 4, 1)
    y, _ = OPS.token_merge(x, *found, None, True)
    assert y.isfinite().all()
    nearest = OPS.token_match(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.1, 1.0], [0.0, 0.0]]]), 1)
    assert nearest[1].tolist() == [[2]], "a row of zeros is like none"


def test_a_metrics_length_does_not_count() -> None:
    metric, lengths = torch.randn(2, 16, 8), torch.rand(2, 16, 1) * 20 + 0.01
    for match in MATCHES.values():
        assert all(torch.equal(a, b) for a, b in zip(match(metric, 5), match(metric * lengths, 5)))


@each_match
def test_half_precision_is_compared_and_summed_in_float32_and_float64_stays(match: Match) -> None:
    x, sizes = torch.randn(2, 21, 16, dtype=torch.bfloat16), torch.full((2, 21), 300.0)
    found = match(x, 6, 1, sizes)
    assert all(torch.equal(a, b) for a, b in zip(found, match(x.float(), 6, 1, sizes)))
    y, after = OPS.token_merge(x, *found, sizes)
    wide, counts = OPS.token_merge(x.float(), *found, sizes)
    assert torch.equal(y, wide.bfloat16())
    assert torch.equal(after, counts) and after.dtype == torch.float32
    assert OPS.token_merge(x.double(), *found, sizes)[0].dtype == F64


# -- proportional attention ---------------------------------------------------------------------------------------------------


def by_bias(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    return OPS.attention(q, k, v, scale=scale, sizes=sizes)


def packed(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None) -> Tensor:
    heads = q.shape[1], k.shape[1]
    joined = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    return OPS.multi_head_attention(*joined, *heads, scale=scale, sizes=sizes).unflatten(-1, (heads[0], -1)).transpose(1, 2)


FORMS = [by_bias, packed, proportional.value_weighted, proportional.augmented]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_key_of_size_n_is_n_equal_keys_and_one_of_size_0_none(form, scale: float | None, kv_heads: int) -> None:
    q, k, v = torch.randn(3, 4, 7, 6, dtype=F64), torch.randn(3, kv_heads, 9, 6, dtype=F64), torch.randn(3, kv_heads, 9, 5, dtype=F64)
    sizes = torch.randint(4, (3, 9))
    assert sizes.min() == 0 and sizes.max() == 3 and (sizes.sum(1) > 0).all()
    y = form(q, k, v, sizes.float(), scale)
    for b in range(3):
        keys, values = (t[b : b + 1].repeat_interleave(sizes[b], 2) for t in (k, v))
        torch.testing.assert_close(y[b : b + 1], OPS.attention(q[b : b + 1], keys, values, scale=scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_each_form_keeps_its_dtype(form, dtype: torch.dtype, error: float) -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 16).to(dtype)
    sizes = torch.randint(4, (2, 9)).float()
    y = form(q, k, v, sizes)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), by_bias(q.double(), k.double(), v.double(), sizes), rtol=error, atol=error)


def test_sizes_join_masks_and_biases() -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 16, dtype=F64)
    sizes, seen = torch.randint(1, 4, (2, 9)).float(), torch.ones(2, 9, dtype=torch.bool)
    seen[:, 6:] = False
    bias = torch.randn(1, 2, 9, 9, dtype=F64)
    hidden = OPS.attention(q, k, v, bias=bias, sizes=sizes * seen)
    torch.testing.assert_close(OPS.attention(q, k, v, seen, bias=bias, sizes=sizes), hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(OPS.attention(q, k, v, bias=bias + sizes.double().log()[:, None, None], key_mask=seen), hidden, rtol=1e-12, atol=1e-12)


def test_every_op_of_token_merging_is_listed() -> None:
    assert {n for n in ops.OPS if n.startswith("token_")} == {"token_match", "token_match_energy", "token_merge", "token_places", "token_take"}
