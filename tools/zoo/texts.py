"""Real text to judge embeddings by: docstrings of the standard library, some with the source of the function they describe.

They ship frozen (docstrings.json.gz, from Python 3.11.7), so that every Python gives the same numbers;
`python -m rewright.tools.zoo.texts` makes the file again from the Python that runs it.
"""

from __future__ import annotations

import ast
import gzip
import json
from functools import cache

import torch

from ...ir.files import replacing
from . import DATA
from .stdlib_lm import library

TEXTS = DATA / "docstrings.json.gz"
PAIRS = 512
MODULES = """
argparse ast asyncio/base_events asyncio/streams base64 bisect calendar cmd codecs collections/__init__ concurrent/futures/_base configparser
contextlib copy csv dataclasses datetime decimal difflib dis doctest email/message email/utils enum fileinput fractions ftplib functools getopt
gettext glob gzip hashlib heapq html/parser http/client http/cookiejar imaplib importlib/util inspect io ipaddress json/__init__ json/decoder
linecache locale logging/__init__ logging/handlers mailbox mimetypes multiprocessing/pool numbers operator os pathlib pdb pickle pickletools platform
plistlib poplib posixpath pprint profile pstats pydoc queue random re/__init__ sched selectors shelve shlex shutil smtplib socket socketserver
sqlite3/dump ssl statistics string subprocess sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize trace traceback turtle types
typing unittest/case unittest/mock urllib/parse urllib/request uuid warnings wave weakref xml/dom/minidom xmlrpc/client zipfile
""".split()  # noqa: SIM905


@cache
def _frozen() -> dict[str, list]:
    return json.loads(gzip.decompress(TEXTS.read_bytes()))


def docstrings() -> list[str]:
    """Docstrings of functions and classes, 40 to 600 characters, no text twice, in a fixed mixed order."""
    return _frozen()["docstrings"]


def described_functions() -> list[tuple[str, str]]:
    """(docstring, source of its function without it): 512 pairs, the docstrings none of the first 640 of `docstrings`."""
    return [(text, source) for text, source in _frozen()["pairs"]]


def collect() -> dict[str, list]:
    """Both sets from the standard library of the Python that runs."""
    root = library()
    found: dict[str, str] = {}
    for module in MODULES:
        path = next((p for p in (root / f"{module}.py", root / module / "__init__.py") if p.exists()), None)
        if path is None:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if 40 <= len(text) <= 600:
                    found[text] = _undocumented(node) if isinstance(node, ast.FunctionDef) else ""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [list(found)[i] for i in order]
    pairs = [(text, found[text]) for text in texts[640:] if found[text]]
    return {"docstrings": texts, "pairs": pairs[:PAIRS]}


def _undocumented(function: ast.FunctionDef) -> str:
    """The function's source without docstring and comments, at most 800 characters; "" when little is left."""
    function.body = function.body[1:] or [ast.Pass()]
    source = ast.unparse(function)
    return source[:800] if len(source) >= 80 else ""


if __name__ == "__main__":
    with replacing(TEXTS) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(collect()).encode(), mtime=0))
