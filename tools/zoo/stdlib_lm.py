"""zoo:stdlib-lm: a Llama-architecture decoder trained on the source of the Python standard library."""

from __future__ import annotations

import math
import sysconfig
import zlib
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..score import Run, Score, ratio
from . import DATA, Batch, Split, ZooModel, drawn, offline

WEIGHTS, TOKENIZER, TOKENS = DATA / "stdlib_lm.safetensors", DATA / "stdlib_lm_tokenizer.json", DATA / "stdlib_lm_tokens.safetensors"
CONTEXT = 256  # tokens of a training window
VOCABULARY = 4096
END = "<|endoftext|>"  # stands before every file; id 0


def untrained() -> nn.Module:
    """The architecture: 6 layers of width 256, 4 heads of 64 over 2 key-value heads, SwiGLU of 768, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def trained() -> nn.Module:
    """The model with the weights that ship (bfloat16 values, held as float32), in eval mode: a new one every time."""
    with offline():
        model = untrained()
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()}, strict=False)
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def tokens(split: Split) -> tuple[Tensor, Tensor]:
    """Windows of tokens [windows, CONTEXT + 1] and the number of the file each comes from."""
    data = load_file(TOKENS)
    return data[f"{split}.tokens"].long(), data[f"{split}.files"]


def load() -> ZooModel:
    """The model with 16 calibration batches of 4 windows of training modules, judged by `judge`."""
    ids = tokens("calibration")[0][:, :-1]
    batches = [{"input_ids": x} for x in ids.split(4)]
    return ZooModel("stdlib-lm", trained(), {"input_ids": ids[:2, :16]}, batches, judge, 64, _training_batch, _validation)


def judge(run: Run, most: int | None = None, split: Split = "held_out") -> list[Score]:
    """Perplexity on windows of held-out modules, its paired ratio to the original's, next-token accuracy and agreement.

    `most` counts windows. Intervals are over files: windows of one file are alike. Agreement: share of places where the
    likeliest next token is the original's.
    """
    ids, files = (x[:most] for x in tokens(split))
    loss, answers = _next_tokens(run, ids)
    original_loss, original_answers = (x[:most] for x in _original_next_tokens(split))
    on = f"{ids[:, 1:].numel():,} tokens of {len(files.unique())} {split.replace('_', '-')} modules"
    count = torch.full((len(ids),), ids.shape[1] - 1)

    def share(name: str, hits: Tensor) -> Score:
        return ratio(name, hits.sum(1), count, on, files)

    return [
        ratio("perplexity", loss, count, on, files, math.exp, better=False),
        ratio("perplexity ratio", loss - original_loss, count, on, files, math.exp, better=False),
        share("next-token accuracy", answers == ids[:, 1:]),
        share("agreement", answers == original_answers),
    ]


def _next_tokens(run: Run, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each window in nats [windows], and the likeliest tokens [windows, CONTEXT]."""
    losses, answers = [], []
    with torch.no_grad():
        for part in ids.split(8):
            logits = run({"input_ids": part[:, :-1]}).float()
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().sum(1))
            answers.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(answers)


@cache
def _original_next_tokens(split: Split) -> tuple[Tensor, Tensor]:
    model = trained()
    return _next_tokens(lambda batch: model(**batch).logits, tokens(split)[0])


# -- training data ------------------------------------------------------------------------------------------------------


def training_windows(stream: Tensor, step: int, seed: int = 0, batch: int = 8) -> Tensor:
    """That step's windows [batch, CONTEXT + 1] of a stream of tokens; every epoch cuts it at other places."""
    a_epoch = (len(stream) - 2 * CONTEXT) // CONTEXT // batch  # steps
    epoch, i = divmod(step, a_epoch)
    generator = drawn(10**6 + epoch, seed)
    offset = int(torch.randint(CONTEXT, (1,), generator=generator))
    places = torch.randperm(a_epoch * batch, generator=generator)[i * batch : (i + 1) * batch]
    return torch.stack([stream[offset + p * CONTEXT :][: CONTEXT + 1] for p in places.tolist()]).long()


def encoded(paths: list[str]) -> list[Tensor]:
    """The tokens of source files, each behind an END."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    return [torch.tensor([0, *e.ids], dtype=torch.int16) for e in tokenizer.encode_batch([read(p) for p in paths])]


def _training_batch(step: int, seed: int = 0) -> Batch:
    return {"input_ids": training_windows(_training_stream(), step, seed)[:, :-1]}


@cache
def _training_stream() -> Tensor:
    """The modules to train on as tokens: reading them takes half a minute."""
    return torch.cat(encoded(training_modules()[0]))


def _validation() -> list[Batch]:
    """32 windows, 4 a batch."""
    ids, _ = windows(encoded(training_modules()[1]), 32)
    return [{"input_ids": x} for x in ids[:, :-1].long().split(4)]


def training_modules() -> tuple[list[str], list[str]]:
    """Paths of the training modules, relative to the library: (to train further on, to choose weights by meanwhile)."""
    paths, _ = corpus()
    return [p for p in paths if _side(p) != 6], [p for p in paths if _side(p) == 6]


# -- making the data ---------------------------------------------------------------------------------------------------


def corpus() -> tuple[list[str], list[str]]:
    """Paths of the standard library's sources, relative to it: (training, held out).

    A module and its tests fall on the same side: the side is a hash of the module's name. Tables and generated files are left out.
    """
    root = library()
    training, held_out = [], []
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if not path.startswith(("site-packages/", "encodings/", "pydoc_data/", "html/entities", "lib2to3/tests/data/", "test/bad")):
            (held_out if _side(path) == 5 else training).append(path)
    return training, held_out


def _side(path: str) -> int:
    return zlib.crc32(_module(path).encode()) % 32


def library() -> Path:
    """The folder of the standard library of the Python that runs."""
    return Path(sysconfig.get_paths()["stdlib"])


def read(path: str) -> str:
    """A source file's text; "" when it is not UTF-8 (some tests are so on purpose)."""
    try:
        return (library() / path).read_text(encoding="utf8")
    except UnicodeDecodeError:
        return ""


def _module(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    name = parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1]
    return name.removeprefix("test_")


def windows(encoded: list[Tensor], count: int, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """About `count` windows spread evenly over the files, each inside one file: [windows, context + 1] and their files' numbers."""
    whole = [(i, start) for i, ids in enumerate(encoded) for start in range(0, len(ids) - context, context)]
    chosen = [whole[i] for i in torch.linspace(0, len(whole) - 1, min(count, len(whole))).round().long().tolist()]
    return torch.stack([encoded[i][s : s + context + 1] for i, s in chosen]), torch.tensor([i for i, _ in chosen])
