"""Recipes: the committed ones, what overrides what, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from icportrait.presets import PRESETS
from training.__main__ import RECIPES
from training.recipe import STAGES, Data, RecipeError, load_recipe


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_are_followed(path: Path, kind: str) -> None:
    preset, data, recipe = load_recipe(path, kind, [])
    assert type(recipe) is STAGES[kind] and (preset in PRESETS or preset == "")
    tables = tomllib.loads(path.read_text())
    for key, value in (tables.get("all", {}) | tables.get(kind, {})).items():
        assert getattr(recipe, key) == value
    for key, value in tables.get("data", {}).items():
        assert getattr(data, key) == value


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_nearer_settings_win(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, 'preset = "demo-128"\n[data]\npairs = 5\n[all]\nsteps = 1\nbatch = 2\n[vae]\nbatch = 3'
    )
    assert load_recipe(path, "vae", [])[2].batch == 3
    preset, data, recipe = load_recipe(path, "matching", ["data.seed=7", "temperature=1", "bf16 = false"])
    assert (preset, data) == ("demo-128", Data(pairs=5, seed=7))
    assert recipe == STAGES["matching"](steps=1, batch=2, temperature=1.0, bf16=False)
    assert load_recipe(path, "vae", ["steps=9", "steps=8"])[2].steps == 8


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[vea]\nsteps = 1", [], r"vea is unknown, expected preset, \[data\], \[all\] or \[vae\]"),
        ("vae = 1", [], r"vae is 1, expected a table"),
        ("[vae]\nstep = 1", [], r"step is unknown to VaeRecipe, expected one of steps, batch"),
        ("[vae]\nf_ref_drop = 0.1", [], r"f_ref_drop is unknown to VaeRecipe"),
        ('[all]\nsteps = "1"', [], r"steps is '1', expected int"),
        ("[all]\nsteps = 1.5", [], r"steps is 1.5, expected int"),
        ("[all]\nsteps = true", [], r"steps is True, expected int"),
        ("[all]\nbf16 = 1", [], r"bf16 is 1, expected bool"),
        ("[data]\nseeds = 1", [], r"seeds is unknown to Data"),
        ("", ["data.pairs=many"], r"--set data.pairs=many: expected key=value in TOML"),
        ("", ["steps"], r"--set steps: expected key=value in TOML, such as steps=100"),
        ("", ["steps=1\nbatch=2"], r"--set steps=1\\nbatch=2: expected key=value"),
        ("", ["data.pair=3"], r"pair is unknown to Data"),
        ("", ["all.steps=3"], r"all is unknown to VaeRecipe"),
        ("[vae", [], r"recipe.toml: Expected ']'"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file(tmp_path, text), "vae", overrides)


def test_flows_are_true_or_matched(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"flows is 'guessed', expected one of true, matched"):
        load_recipe(recipe_file(tmp_path, ""), "appearance", ['flows="guessed"'])
    with pytest.raises(RecipeError, match=r"nowhere.toml: .*No such file"):
        load_recipe(tmp_path / "nowhere.toml", "vae", [])
