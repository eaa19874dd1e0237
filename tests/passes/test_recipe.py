"""Recipes are checked to the last key, answered with the nearest name, and come back from their resolved form unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewright.ir.errors import RecipeError
from rewright.passes import PASSES, find_pass
from rewright.passes.pipeline import Budget
from rewright.passes.quantization.quantize_linear import QuantizeLinear
from rewright.passes.recipe import Recipe, make_pass, shipped

FULL = """
target = "h200"
ignore = ["lm_head", "embed"]
[sizes]
sequence = 128
"batch.1" = 2
[verify]
min_cosine = 0.99
max_drift = 0.5
[[pass]]
name = "fuse-add-layer-norm"
require_match = false
[[pass]]
name = "quantize-linear"
min_weights = 1024
"""


def test_a_recipe_becomes_passes_with_checked_options() -> None:
    recipe = Recipe.parse(FULL)
    assert recipe.passes == (find_pass("fuse-add-layer-norm")(), QuantizeLinear(min_weights=1024))
    assert (recipe.target, recipe.ignore) == ("h200", ("lm_head", "embed"))
    assert recipe.budget == Budget(min_cosine=0.99, max_drift=0.5)
    assert recipe.sizes == {"sequence": 128, "batch.1": 2}
    assert recipe.require_match == {"quantize-linear"}


def test_what_a_recipe_leaves_out_has_a_default() -> None:
    recipe = Recipe.parse("")
    assert (recipe.passes, recipe.target, recipe.ignore, recipe.budget) == ((), "cpu", (), Budget())


def test_the_resolved_recipe_is_accepted_back_and_says_everything(tmp_path: Path) -> None:
    recipe = Recipe.parse(FULL, "mine.toml")
    path = tmp_path / "recipe.resolved.toml"
    path.write_text(recipe.to_toml(), encoding="utf8")
    back = Recipe.load(path)
    assert (back.passes, back.sizes, back.target, back.ignore, back.budget, back.require_match) == (
        recipe.passes,
        recipe.sizes,
        recipe.target,
        recipe.ignore,
        recipe.budget,
        recipe.require_match,
    )
    assert back.to_toml().splitlines()[1:] == recipe.to_toml().splitlines()[1:]
    assert 'weights = "int8-channel"' in recipe.to_toml()  # a default, spelt out
    assert recipe.to_toml().startswith("# resolved from: mine.toml\n")


def test_odd_strings_survive_the_round_trip() -> None:
    recipe = Recipe((), ignore=('a"b\\c\nd\te\x01\x7f', "ü😀"), source="two\nlines")
    assert Recipe.parse(recipe.to_toml()).ignore == recipe.ignore


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.passes or recipe.only_tidies
    back = Recipe.parse(recipe.to_toml())
    assert (back.passes, back.tidy) == (recipe.passes, recipe.tidy)
    assert (Path(find_pass.__code__.co_filename).parent / "recipes" / f"{name}.toml").read_text(encoding="utf8").startswith("# ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targett = 1", "text has no option 'targett'. Did you mean 'target'?"),
        ("[verify]\nmin_cosin = 1", r"text: \[verify\] has no option 'min_cosin'. Did you mean 'min_cosine'"),
        (
            '[[pass]]\nname = "quantize-linear"\nwieghts = "int8-channel"',
            r"text: pass\[0\] \(quantize-linear\) has no option 'wieghts'. Did you mean 'weights'",
        ),
        ('[[pass]]\nname = "quantize-linaer"', "no pass named 'quantize-linaer'. Did you mean 'quantize-linear'"),
        ('[[pass]]\nname = "drop-no-ops"\nrank = 1', "'rank'. It has no options"),
        ("[[pass]]\nrank = 1", r"text: pass\[0\] has no name"),
        ("[pass]\nname = 1", r"passes are written as \[\[pass\]\] tables"),
        ("pass = 1", r"passes are written as \[\[pass\]\] tables"),
        ("verify = 1", "must be a table, got 1"),
        ("[sizes]\nsequence = 0", "text: sizes.sequence: input should be greater than 0, got 0"),
        ("target = 1", r"text: target: input should be a valid string, got 1"),
        ('ignore = "lm_head"', "text: ignore: input should be a valid tuple, got 'lm_head'"),
        ("[verify]\nmin_cosine = 'high'", "text: verify.min_cosine: input should be a valid number.*got 'high'"),
        (
            '[[pass]]\nname = "drop-no-ops"\n[[pass]]\nname = "quantize-linear"\nmin_weights = "many"',
            r"text: pass\[1\] \(quantize-linear\).min_weights: .*got 'many'",
        ),
        ('[[pass]]\nname = "quantize-linear"\nweights = "int7"', r"text: pass\[0\] \(quantize-linear\).weights: input should be 'int8-channel', .* got 'int7'"),
        ('[[pass]]\nname = "drop-no-ops"\nrequire_match = "perhaps"', r"text: pass\[0\].require_match: .*got 'perhaps'"),
        ("target = \n[[pass\n", "the recipe text is not valid TOML: .*line 1"),
        ("target = 'a'\ntarget = 'b'", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_answered_with_place_and_nearest_name(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        Recipe.parse(text)
    assert "\n" not in str(refused.value)


def test_an_unknown_or_unreadable_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe named 'encoder-int9'. Did you mean 'encoder-int8'.* a file must end in .toml"):
        Recipe.load("encoder-int9")
    with pytest.raises(RecipeError, match="can't be read: No such file"):
        Recipe.load(tmp_path / "nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a UTF-8 text file"):
        Recipe.load(tmp_path / "bytes.toml")


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_can_be_made_by_name_and_takes_no_unknown_option(name: str) -> None:
    assert make_pass(name, {}) == find_pass(name)()
    with pytest.raises(RecipeError, match="has no option 'surprise'"):
        make_pass(name, {"surprise": 1})
