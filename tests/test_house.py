"""The house rules of DESIGN 3 and 9, read off the source: arrows, optional imports, first lines, the lists that name everything."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("ir", "passes", "backends", "tools")
MAY_IMPORT = {"ir": {"ir"}, "passes": {"ir", "passes"}, "backends": {"ir", "backends"}, "tools": set(TOPS)}
OPTIONAL = {"triton": "backends/triton", "tvm": "backends/tvm", "tvm_ffi": "backends/tvm"}
SOURCES = sorted(p for top in TOPS for p in (ROOT / top).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of everything a file imports, by statement or `import_module`; our own modules as `rewright.…`."""
    found = []
    package = ("rewright", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
            found.append((node.lineno, node.args[0].value))
    return tuple(found)


def own_imports() -> Iterator[tuple[str, str, str]]:
    """(importing top folder, imported top folder, place) inside the package."""
    for path in SOURCES:
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] == "rewright" and len(parts) > 1 and parts[1] in TOPS:
                yield relative(path).split("/")[0], parts[1], f"{relative(path)}:{line}"


def test_imports_point_one_way() -> None:
    arrows = list(own_imports())
    assert len({(a, b) for a, b, _ in arrows}) >= 6, "the reader of imports found too few to be trusted"
    assert [place for a, b, place in arrows if b not in MAY_IMPORT[a]] == []


def test_triton_and_tvm_are_imported_only_under_their_own_folders() -> None:
    seen = [(relative(p), line, name.split(".")[0]) for p in SOURCES for line, name in imports(p) if name.split(".")[0] in OPTIONAL]
    assert "triton" in {name for *_, name in seen}, "the reader of imports found too few to be trusted"
    assert [f"{path}:{line} imports {name}" for path, line, name in seen if not path.startswith(OPTIONAL[name])] == []


def test_inside_the_package_imports_are_relative() -> None:
    absolute = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            absolute += [f"{relative(path)}:{node.lineno}" for name in names if name.split(".")[0] == "rewright"]  # type: ignore[attr-defined]
    assert absolute == []


def test_importing_rewright_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'numpy', 'typer', 'pydantic', 'triton', 'tvm'}"
    code = f"import sys, rewright; rewright.RecipeError; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", IMPORTABLE + code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


# the same as tests/conftest.py, for a fresh interpreter on a bare checkout
IMPORTABLE = f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'conftest.py')!r}); "


def test_every_public_name_resolves_and_is_known_to_type_checkers() -> None:
    import rewright

    for name in rewright.PUBLIC:
        assert getattr(rewright, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        rewright.optimise  # type: ignore[attr-defined]  # noqa: B018
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf8"))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    assert {a.asname for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names} == set(rewright.PUBLIC)


def test_the_package_list_names_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]["packages"]
    folders = {"rewright"} | {".".join(("rewright", *p.parent.relative_to(ROOT).parts)) for p in SOURCES}
    assert sorted(listed) == sorted(folders)
    assert [relative(p.parent) for p in SOURCES if not (p.parent / "__init__.py").exists()] == []


def test_data_files_are_packaged() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["setuptools"]["package-data"]
    globbed = {p for package, globs in data.items() for g in globs for p in (ROOT / package.removeprefix("rewright.").replace(".", "/")).glob(g)}
    there = {p for top in TOPS for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts}
    assert {relative(p) for p in globbed} == {relative(p) for p in there}


@pytest.mark.parametrize(
    "path", [p for f in ("ir", "passes", "backends", "tools", "tests", "examples") for p in sorted((ROOT / f).rglob("*.py"))], ids=relative
)
def test_the_first_line_says_what_the_file_is(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert not text.strip() or text.startswith(('"""', 'r"""', "#!"))
    assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_the_pass_table_tells_the_truth() -> None:
    from rewright.passes import PASSES, find_pass

    for name in PASSES:
        kind = find_pass(name)
        assert kind.name == name
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert kind.__doc__, f"{name} has no docstring"
    listed = {f"passes/{place.split(':')[0].replace('.', '/')}.py" for place in PASSES.values()}
    with_a_pass = {relative(p) for p in (ROOT / "passes").glob("*/*.py") if '\n    name = "' in p.read_text(encoding="utf8")}
    assert with_a_pass == listed


def test_the_kernel_table_names_files_that_exist() -> None:
    table = import_module("rewright.backends.table")
    for kernel in table.KERNELS:
        assert (ROOT / "backends" / kernel.backend / f"{kernel.op}.py").exists()
        assert (ROOT / "ir" / "ops" / f"{kernel.op}.py").exists()
