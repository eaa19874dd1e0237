"""A wheel built from a clean copy works in an environment of its own, from any folder, with nothing downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.onnx*")  # a left-over build/ resurrects deleted modules


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "copy", cwd=folder)
    return next(folder.glob("rewright-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a virtual environment that holds the wheel alone and borrows the packages we depend on."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    bin = folder / "venv" / "bin"
    run(sys.executable, "-m", "pip", "--python", bin / "python", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf8")
    return bin


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    tops = (p for top in ("ir", "passes", "backends", "tools") for p in (ROOT / top).rglob("*"))
    expected = {p.relative_to(ROOT).as_posix() for p in tops if p.is_file() and "__pycache__" not in p.parts}
    assert names == {f"rewright/{n}" for n in expected | {"__init__.py", "__main__.py"}}


def test_the_command_answers_from_any_folder(environment: Path, tmp_path: Path) -> None:
    assert "optimize" in run(environment / "rewright", "--help", cwd=tmp_path)
    assert "optimize" in run(environment / "python", "-m", "rewright", "--help", cwd=tmp_path)
    assert "encoder-int8" in run(environment / "rewright", "recipes", cwd=tmp_path)


EVERY_MODULE = """
import importlib, importlib.util, pathlib, sys
import rewright
root = pathlib.Path(rewright.__file__).parent
assert root.is_relative_to(sys.prefix), root
names = [".".join(("rewright", *p.relative_to(root).with_suffix("").parts)).removesuffix(".__init__") for p in sorted(root.rglob("*.py"))]
plain = [n for n in names if not n.startswith(("rewright.backends.triton.", "rewright.backends.tvm."))]
for name in plain:
    importlib.import_module(name)
assert "tvm" not in sys.modules, "tvm is loaded before it is asked for"
for name in names:
    if name in plain or importlib.util.find_spec(name.split(".")[2]):
        importlib.import_module(name)
print(len(names))
"""


def test_every_module_of_the_wheel_imports_and_none_loads_tvm_unasked(environment: Path, tmp_path: Path) -> None:
    assert int(run(environment / "python", "-c", EVERY_MODULE, cwd=tmp_path)) > 50
