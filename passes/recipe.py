"""Recipes: flat TOML in, checked passes out, and back. Nothing in a recipe runs code."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from ..ir.errors import RecipeError, near
from . import PASSES, find_pass
from .pipeline import Budget, options_of
from .rewrite import Pass

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """What to do to a model: passes in order, the target they are for, the budget lossy ones must hold."""

    passes: tuple[Pass, ...]
    target: str = "cpu"
    budget: Budget = Budget()
    require_match: frozenset[str] = frozenset()
    ignore: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Dynamic dims that are fixed before the first pass, by name."""
    tidy: bool = False
    """Whether an .onnx file that is written is tidied (backends.onnx.tidy); with no passes, an .onnx model's own nodes are, as they are."""
    source: str = "passes given on the command line or in Python"

    @property
    def only_tidies(self) -> bool:
        """Whether all there is to do to an .onnx file is to tidy its nodes, for which it need not be imported."""
        return self.tidy and not self.passes and not self.sizes

    def to_toml(self) -> str:
        """The resolved recipe: every option spelt out, accepted back by `Recipe.load`."""
        lines = [f"# resolved from: {' '.join(self.source.split())}", f"target = {_toml(self.target)}", f"ignore = {_toml(list(self.ignore))}"]
        if self.tidy:
            lines.append("tidy = true")
        if self.sizes:
            lines += ["", "[sizes]", *(f"{json.dumps(k)} = {v}" for k, v in self.sizes.items())]
        if budget := {k: v for k, v in dataclasses.asdict(self.budget).items() if v is not None}:
            lines += ["", "[verify]", *(f"{k} = {_toml(v)}" for k, v in budget.items())]
        for step in self.passes:
            lines += ["", "[[pass]]", f"name = {_toml(step.name)}"]
            lines += [f"{k} = {_toml(v)}" for k, v in options_of(step).items() if v is not None]
            lines.append(f"require_match = {_toml(step.name in self.require_match)}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def load(name_or_path: str | Path) -> Recipe:
        """A shipped recipe by name, or a TOML file. Raises RecipeError with the place and the nearest known name."""
        path = Path(name_or_path)
        if path.suffix != ".toml":
            path = SHIPPED / f"{name_or_path}.toml"
            if not path.exists():
                known = shipped()
                said = f"no recipe named {str(name_or_path)!r}.{near(str(name_or_path), known)}"
                raise RecipeError(f"{said} `rewright recipes` lists all {len(known)}; a file must end in .toml")
        try:
            text = path.read_text(encoding="utf8")
        except OSError as error:
            raise RecipeError(f"the recipe {path} can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"the recipe {path} is not a UTF-8 text file") from error
        return Recipe.parse(text, str(name_or_path))

    @staticmethod
    def parse(text: str, source: str = "text") -> Recipe:
        """A recipe from TOML text."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe {source} is not valid TOML: {error}") from error
        _known_keys(data, ("target", "ignore", "tidy", "sizes", "verify", "pass"), source)
        entries = data.get("pass", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise RecipeError(f"{source}: passes are written as [[pass]] tables with a name")
        verify = data.get("verify", {})
        _known_keys(verify, tuple(f.name for f in dataclasses.fields(Budget)), f"{source}: [verify]")
        passes, required = [], set()
        for i, entry in enumerate(entries):
            where = f"{source}: pass[{i}]"
            entry = dict(entry)
            if not isinstance(name := entry.pop("name", None), str):
                raise RecipeError(f"{where} has no name; `rewright passes` lists all {len(PASSES)}")
            if _checked(bool, entry.pop("require_match", True), f"{where}.require_match"):
                required.add(name)
            passes.append(make_pass(name, entry, f"{where} ({name})"))
        target = _checked(str, data.get("target", "cpu"), f"{source}: target")
        ignore = _checked(tuple[str, ...], data.get("ignore", []), f"{source}: ignore")
        tidy = _checked(bool, data.get("tidy", False), f"{source}: tidy")
        sizes = _checked(dict[str, pydantic.PositiveInt], data.get("sizes", {}), f"{source}: sizes")
        return Recipe(tuple(passes), target, _checked(Budget, verify, f"{source}: verify"), frozenset(required), ignore, sizes, tidy, source)


def from_command_line(recipe: str | None, passes: list[str], settings: list[str], sizes: Sequence[str] = ()) -> Recipe:
    """`-r NAME`, `-p PASS:option=value,...` (in front of the recipe's), `--set pass.option=value` and `--size dim=size` as one recipe. Raises RecipeError."""
    if recipe is None and not passes:
        raise RecipeError("give a recipe (-r NAME, `rewright recipes` lists them) or passes (-p NAME, `rewright passes` lists them)")
    base = Recipe(()) if recipe is None else Recipe.load(recipe)
    first = tuple(pass_from_text(p) for p in passes)
    base = dataclasses.replace(base, passes=(*first, *base.passes), require_match=base.require_match | {p.name for p in first})
    for setting in settings:
        place, _, value = setting.partition("=")
        name, _, option = place.rpartition(".")
        if name not in {p.name for p in base.passes}:
            raise RecipeError(
                f"--set {setting}: the recipe has no pass {name!r};{near(name, [p.name for p in base.passes])} it has {', '.join(p.name for p in base.passes)}"
            )
        base = dataclasses.replace(
            base, passes=tuple(make_pass(name, {**options_of(p), option: _value(value)}, f"--set {setting}") if p.name == name else p for p in base.passes)
        )
    for size in sizes:
        name, _, number = size.rpartition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise RecipeError(f"--size {size!r} is not DIM=SIZE, such as sequence=128 (`rewright inspect MODEL` lists the dynamic dims)")
        base = dataclasses.replace(base, sizes={**base.sizes, name: int(number)})
    return base


def pass_from_text(text: str) -> Pass:
    """A pass as the command line has it: "NAME" or "NAME:option=value,..."."""
    name, _, options = text.partition(":")
    pairs = [o.partition("=") for o in options.split(",") if o]
    if bad := [k for k, equals, _ in pairs if not equals]:
        raise RecipeError(f"-p {text}: {bad[0]!r} is not option=value")
    return make_pass(name, {k: _value(v) for k, _, v in pairs}, f"-p {name}")


def _value(text: str) -> Any:
    """A TOML value, or the bare word as a string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def shipped() -> list[str]:
    """Names of the recipes that come with rewright."""
    return sorted(p.stem for p in SHIPPED.glob("*.toml"))


def make_pass(name: str, options: dict[str, Any], where: str = "") -> Pass:
    """A pass by name with checked options. Raises RecipeError naming the nearest pass or option."""
    kind = find_pass(name)
    known = tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
    _known_keys(options, known, where or name)
    if not known:
        return kind()
    return _checked(kind, options, where or name)


def _known_keys(data: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a table, got {data!r}")
    for key in data:
        if key not in known:
            takes = f"It takes {', '.join(known)}" if known else "It has no options"
            raise RecipeError(f"{where} has no option {key!r}.{near(key, known)} {takes}")


def _checked(kind: Any, value: Any, where: str) -> Any:
    try:
        return pydantic.TypeAdapter(kind).validate_python(value, strict=False)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(p) for p in first["loc"])])
        raise RecipeError(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}") from error


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's strings are JSON's but for this character
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
