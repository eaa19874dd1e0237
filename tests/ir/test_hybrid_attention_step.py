"""Decoding with a ring and sums, token by token, is causal hybrid_attention of the whole text."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from rewright.backends.onnx.export import export
from rewright.backends.onnx.session import Session
from rewright.ir.capture import capture
from rewright.ir.cost import node_costs
from rewright.ir.ops.hybrid_attention_step import after, empty

torch.set_num_threads(1)
OPS = torch.ops.rewright
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
"""Of float64: the same sums in another order."""


def tensors(n: int, h: int = 4, hk: int = 2, b: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, fq, fk, gamma. Features that are 0 for one query, so that eps is all it has of the far."""
    torch.manual_seed(n)
    q, k, v, fq, fk = (torch.randn(b, heads, n, width, dtype=dtype) for heads, width in ((h, 6), (hk, 6), (hk, 5), (h, 7), (hk, 7)))
    fq, fk = fq.abs(), fk.abs()
    fq[0, 0, n - 1] = 0
    return q, k, v, fq, fk, torch.rand(h, dtype=dtype) + 0.1


def decoded(given: tuple[Tensor, ...], state: tuple[Tensor, ...], start: int, mask: Tensor | None = None, scale: float | None = None):
    """Steps from token `start` to the end: what they give, [b, h, n - start, dv], and the last state."""
    *tokens, gamma = given
    found = []
    for i in range(start, tokens[0].shape[2]):
        of = slice(i, i + 1)
        o, *state = OPS.hybrid_attention_step(*(t[:, :, of] for t in tokens), gamma, *state, None if mask is None else mask[:, i], scale)
        found.append(o)
    return torch.cat(found, 2), tuple(state)


def start_of(given: tuple[Tensor, ...], window: int, n: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    _, k, v, _, fk, _ = (t[:, :, :n] if t.dim() == 4 else t for t in given)
    return after(k, v, fk, window, None if mask is None else mask[:, :n])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("h", "hk"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("n", "window"), [(29, 4), (32, 4), (21, 1), (30, 8), (16, 8), (7, 16), (45, 3)])
def test_token_by_token_it_is_the_whole_text_at_once(n: int, window: int, h: int, hk: int, masked: bool) -> None:
    """From a window longer than the text to a ring that turns over ten times."""
    given = tensors(n, h, hk)
    mask = torch.rand(2, n) < 0.6 if masked else None
    found, state = decoded(given, empty(2, hk, window, 6, 7, 5, torch.float64), 0, mask, 0.7)
    torch.testing.assert_close(found, OPS.hybrid_attention(*given, mask, window, True, 0.7), **DOUBLE)
    assert all(x.shape[2] == 2 * window for x in state[:2]) and state[-1].tolist() == [n, n]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 9, 12, 17, 31])
@pytest.mark.parametrize("masked", [False, True])
def test_it_goes_on_after_a_prefix(n: int, masked: bool) -> None:
    given = tensors(32)
    mask = torch.rand(2, 32) < 0.6 if masked else None
    found, _ = decoded(given, start_of(given, 4, n, mask), n, mask)
    torch.testing.assert_close(found, OPS.hybrid_attention(*given, mask, 4, True)[:, :, n:], **DOUBLE)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 9, 12, 17])
@pytest.mark.parametrize("window", [1, 4])
def test_a_prefix_leaves_the_state_that_its_steps_leave(n: int, window: int) -> None:
    """All of what counts: of a ring the slots that are given."""
    given = tensors(n)
    mask = torch.rand(2, n) < 0.7
    stepped, made = decoded(given, empty(2, 2, window, 6, 7, 5, torch.float64), 0, mask)[1], start_of(given, window, n, mask)
    seen = made[2][:, None, :, None]
    assert torch.equal(stepped[2], made[2]) and torch.equal(stepped[5], made[5])
    for a, b in zip(stepped[:2], made[:2]):
        assert torch.equal(a * seen, b * seen)
    for a, b in zip(stepped[3:5], made[3:5]):
        torch.testing.assert_close(a, b, **DOUBLE)


def test_texts_of_a_batch_may_be_at_different_positions() -> None:
    """The first has 9 tokens behind it, the second 6: a block begins for one of them at a time."""
    given = tensors(20)
    *tokens, gamma = given
    texts = [(*(t[i : i + 1] for t in tokens), gamma) for i in range(2)]
    apart = [decoded(text, empty(1, 2, 4, 6, 7, 5, torch.float64), 0)[0] for text in texts]
    starts = (9, 6)
    prefixes = [start_of(text, 4, start) for text, start in zip(texts, starts)]
    state = tuple(torch.cat(parts) for parts in zip(*prefixes))
    for i in range(11):
        now = [torch.cat([t[row : row + 1, :, start + i : start + i + 1] for row, start in enumerate(starts)]) for t in tokens]
        o, *state = OPS.hybrid_attention_step(*now, gamma, *state)
        for row, start in enumerate(starts):
            torch.testing.assert_close(o[row, :, 0], apart[row][0, :, start + i], **DOUBLE)
    assert state[-1].tolist() == [20, 17]


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_within_two_windows_it_is_softmax_attention(share: float) -> None:
    """Whatever the near weigh against the far, of which there is nothing."""
    given = (*tensors(16)[:5], torch.full((4,), share, dtype=torch.float64))
    found, _ = decoded(given, empty(2, 2, 8, 6, 7, 5, torch.float64), 0)
    torch.testing.assert_close(found, OPS.attention(*given[:3], None, True), **DOUBLE)


def test_what_padding_holds_does_not_matter() -> None:
    given = tensors(20)
    mask = torch.rand(2, 20) < 0.6
    q, k, v, fq, fk, gamma = given
    other = tuple(torch.where(mask[:, None, :, None], t, 50.0) for t in (k, v, fk))
    first, second = (decoded((q, k, v, fq, fk, gamma), empty(2, 2, 4, 6, 7, 5, torch.float64), 0, mask)[0] for k, v, fk in ((k, v, fk), other))
    assert torch.equal(first, second)


def test_a_text_of_padding_alone_gives_zeros() -> None:
    given = tensors(9)
    found, _ = decoded(given, empty(2, 2, 2, 6, 7, 5, torch.float64), 0, torch.zeros(2, 9, dtype=torch.bool))
    assert torch.equal(found, torch.zeros_like(found))


def test_in_half_precision_the_ring_is_half_and_the_sums_are_float32() -> None:
    """600 keys with features of 4 add up to more than float16 counts exactly; the whole text at once is the reference."""
    q, k, v, fq, fk, gamma = (t.half() for t in tensors(600, 2, 2, 1))
    given = (q, k, v, 4 * fq, 4 * fk, gamma)
    state = empty(1, 2, 4, 6, 7, 5, torch.float16)
    assert [x.dtype for x in state] == [torch.float16, torch.float16, torch.bool, torch.float32, torch.float32, torch.int64]
    found, state = decoded(given, state, 0)
    assert [x.dtype for x in state] == [torch.float16, torch.float16, torch.bool, torch.float32, torch.float32, torch.int64]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, OPS.hybrid_attention(*given, None, 4, True), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.rand(2, 4, 2, 6)}, "a step is of one token, got 2 queries and 1 keys"),
        ({"q": torch.rand(2, 3, 1, 6)}, "3 query heads can't share 2 key heads"),
        ({"fk": torch.rand(2, 2, 1, 8)}, "are not those of queries"),
        ({"keys": torch.rand(2, 2, 7, 6)}, r"twice the window's slots, at least 2.*got keys \[2, 2, 7, 6\]"),
        ({"state": torch.rand(2, 2, 3, 7, 5)}, r"\[2, 2, 3, 8, 5\].*got.*state \[2, 2, 3, 7, 5\].*empty"),
    ],
)
def test_says_what_does_not_fit(change: dict, words: str) -> None:
    names = ("q", "k", "v", "fq", "fk", "gamma", "keys", "values", "given", "state", "sums", "position")
    given = dict(zip(names, (*tensors(1, dtype=torch.float32), *empty(2, 2, 4, 6, 7, 5)))) | change
    with pytest.raises(ValueError, match=words):
        OPS.hybrid_attention_step(**given)


class Step(nn.Module):
    """One token more."""

    def forward(self, tokens: tuple[Tensor, ...], gamma: Tensor, state: tuple[Tensor, ...], real: Tensor) -> tuple[Tensor, ...]:
        return OPS.hybrid_attention_step(*tokens, gamma, *state, real)


def floats(n: int) -> tuple[tuple[Tensor, ...], Tensor]:
    *tokens, gamma = tensors(n, dtype=torch.float32)
    return tuple(tokens), gamma


def test_costs_are_those_of_a_window_and_a_state_however_long_the_text() -> None:
    """2 texts: the ring's 32 keys for 4 heads, a token into the sums of 2 heads, the far and its denominator out of them for 4."""
    tokens, gamma = floats(1)
    graph = capture(Step(), (tokens, gamma, empty(2, 2, 16, 6, 7, 5), torch.ones(2, dtype=torch.bool)))
    (found,) = [c for c in node_costs(graph) if c.op == "hybrid_attention_step"]
    assert found.cost.flops == 2 * (2 * 32 * (6 + 5) * 4 + 2 * 8 * 5 * (4 + 2) + 2 * 8 * 4)
    ring, sums = 2 * 2 * 32 * (6 + 5) * 4, 2 * 2 * 3 * 8 * (5 + 1) * 4
    assert 2 * (ring + sums) < found.cost.bytes < 2.2 * (ring + sums)


def test_decoding_in_onnxruntime_continues_what_torch_began(tmp_path: Path) -> None:
    """A prefix of 6 tokens in torch, 20 in onnxruntime: two texts at different places, padding among them, a ring that turns over."""
    (tokens, gamma), mask = floats(26), torch.rand(2, 26) < 0.7
    expected = OPS.hybrid_attention(*tokens, gamma, mask, 4, True)
    state = start_of((*tokens, gamma), 4, 6, mask)
    now = tuple(t[:, :, 6:7] for t in tokens)
    batch = {0: Dim("batch", min=1, max=64)}
    dims = {"tokens": batch, "state": batch, "real": batch}
    export(capture(Step(), (now, gamma, state, mask[:, 6]), dynamic_shapes=dims), tmp_path / "m.onnx")
    kinds = {(n.domain, n.op_type) for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {"Loop", "Scan", "If"} & {kind for _, kind in kinds} and {domain for domain, _ in kinds} <= {"", "ai.onnx"}
    session = Session(tmp_path / "m.onnx")
    for i in range(6, 26):
        o, *state = session((*(t[:, :, i : i + 1] for t in tokens), gamma, *state, mask[:, i]))
        torch.testing.assert_close(o, expected[:, :, i : i + 1], rtol=1e-4, atol=2e-5)
    assert state[-1].tolist() == [26, 26]
    one = tuple(t[:1, :, :1] for t in tokens)
    found = session((*one, gamma, *empty(1, 2, 4, 6, 7, 5), torch.ones(1, dtype=torch.bool)))[0]
    torch.testing.assert_close(found, one[2].repeat_interleave(2, 1), rtol=1e-5, atol=1e-6)  # the first token sees itself
