"""Recipes: what they may say, and the published schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from exporter import recipe as recipes
from exporter.errors import RecipeError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = ROOT / "exporter" / "schemas" / "recipe.schema.json"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_read_and_fits_the_published_schema(path: Path) -> None:
    assert recipes.load(path).steps
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(SCHEMA.read_text()))


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    assert json.loads(SCHEMA.read_text()) == recipes.schema(), "run scripts/schemas"


def test_calibration_text_lies_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("calibration: {text: words.txt}")

    assert recipes.load(tmp_path / "r.yaml").calibration.text == str(tmp_path / "words.txt")


def test_an_empty_recipe_is_the_model_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")

    assert recipes.load(tmp_path / "r.yaml") == recipes.Recipe()


def test_a_recipe_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        recipes.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_bytes(b" " * (recipes.LARGEST_RECIPE + 1))
    with pytest.raises(RecipeError, match="a recipe has at most 262144"):
        recipes.load(tmp_path / "r.yaml")


def test_yaml_tags_that_would_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="is not YAML"):
        recipes.load(tmp_path / "r.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "steps: [{kind: *i}]", "a recipe has no aliases"),
        ("steps: &a [{kind: fasp, sparsity: *a}]", "a recipe has no aliases"),
        ("version: 1\nversion: 1", "key 'version' is given twice"),
        ("version: 2001-99-99", "is not YAML: month must be in"),
        ("calibration: {seed: " + "9" * 5000 + "}", "is not YAML: Exceeds the limit"),
        ("calibration: {seed: -1}", "calibration.seed: Input should be greater than or equal to 0"),
        ("[" * 5000, "is not YAML: maximum recursion depth"),
        ("!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as refused:
        recipes.load(tmp_path / "r.yaml")
    assert "\n" not in str(refused.value)
