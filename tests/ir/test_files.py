"""Outputs appear whole or not at all, whatever goes wrong; what was there before stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewright.ir.errors import ResourceError
from rewright.ir.files import check_writable, replacing


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_text("old", encoding="utf8")
    (tmp_path / "model.onnx.data").write_text("old data", encoding="utf8")
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_and_its_companions_are_replaced_together(old: Path) -> None:
    with replacing(old, "model.onnx.data") as temporary:
        temporary.write_text("new", encoding="utf8")
        temporary.with_name("model.onnx.data").write_text("new data", encoding="utf8")
        assert old.read_text(encoding="utf8") == "old"
    assert old.read_text(encoding="utf8") == "new"
    assert old.with_name("model.onnx.data").read_text(encoding="utf8") == "new data"
    assert names(old.parent) == ["model.onnx", "model.onnx.data"]


def test_a_folder_is_replaced_as_a_whole_and_missing_parents_are_made(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    for content in ("first", "second"):
        with replacing(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content, encoding="utf8")
    assert names(target) == ["second"]
    assert names(target.parent) == ["result"]


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(old: Path, failure: BaseException) -> None:
    def fails(path: Path) -> None:
        path.write_text("half", encoding="utf8")
        raise failure

    with pytest.raises(type(failure)), replacing(old) as temporary:
        fails(temporary)
    assert old.read_text(encoding="utf8") == "old"
    assert names(old.parent) == ["model.onnx", "model.onnx.data"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from rewright.ir.errors import ResourceError
from rewright.ir.files import replacing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(b"x" * 5000)
except ResourceError as error:
    print(error)
"""


def test_a_full_disk_is_said_in_one_sentence_and_leaves_the_old_file(old: Path) -> None:
    conftest = Path(__file__).parent.parent / "conftest.py"
    code = f"import runpy; runpy.run_path({str(conftest)!r})\n{FULL_DISK}"
    done = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"can't write {old}: the disk is full; free some space or choose another output path (nothing was changed)"
    assert old.read_text(encoding="utf8") == "old"
    assert names(old.parent) == ["model.onnx", "model.onnx.data"]


def test_a_failed_rename_of_a_folder_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").touch()
    replace = os.replace

    def fails_for_the_new_one(source: Path, to: Path) -> None:
        if Path(to) == target and Path(source).name != "previous":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fails_for_the_new_one)
    with pytest.raises(ResourceError, match="the disk is full"), replacing(target) as temporary:
        temporary.mkdir()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["result"]


def test_a_place_below_a_file_is_refused_early_and_late(old: Path) -> None:
    below = old / "x.onnx"
    with pytest.raises(ResourceError, match=r"model\.onnx is a file, not a folder; choose another output path"):
        check_writable(below)
    with pytest.raises(ResourceError, match="can't write"), replacing(below):
        pass
    assert old.read_text(encoding="utf8") == "old"


def test_a_folder_where_a_file_should_go_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ResourceError, match="it is a folder"):
        check_writable(tmp_path / "model.onnx")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="no permission to write"):
        check_writable(tmp_path / "x.onnx")


def test_a_good_place_is_accepted_and_nothing_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "x.onnx")
    assert names(tmp_path) == []
