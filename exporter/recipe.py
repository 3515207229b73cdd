"""Recipes: which steps compress a model, in order, and on which text they are calibrated. YAML, checked by pydantic."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from exporter.artifact import Record
from exporter.compress.adapruner import AdaPrunerConfig, require_windows
from exporter.compress.casp import CaspConfig
from exporter.compress.fasp import FaspConfig
from exporter.compress.pbs2p import Pbs2pConfig
from exporter.compress.quantize import QuantizeConfig
from exporter.compress.recovery import LoraConfig
from exporter.compress.swsc import SwscConfig
from exporter.errors import RecipeError

Step = Annotated[
    AdaPrunerConfig | CaspConfig | FaspConfig | LoraConfig | Pbs2pConfig | QuantizeConfig | SwscConfig,
    Field(discriminator="kind"),
]

LARGEST_RECIPE = 2**18  # bytes


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which unfold to any size, and no key twice, of which one would be ignored."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases; write it out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for index, key in enumerate(keys) if key in keys[:index]), None):
            raise yaml.MarkedYAMLError(problem=f"key {twice!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class CalibrationText(Record):
    """The text that calibrated steps see.

    `text` is a file, relative to the recipe's folder; without it, the sample that ships with the built-in model. For a
    multimodal model it may be JSON lines (`.jsonl`), each of a picture and its text: one gives one window.
    `windows` pieces of `length` tokens are drawn from it at places that `seed` decides. Steps that search want
    `validation` pieces too: they are cut off the end of the text first.
    """

    text: str | None = None
    windows: Annotated[int, Field(ge=1, le=100_000)] = 64
    length: Annotated[int, Field(ge=2, le=131_072)] = 256
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validation: Annotated[int, Field(ge=0, le=100_000)] = 0


class Recipe(Record):
    """Steps in order; a recipe without steps exports a model as it is."""

    version: Literal[1] = 1
    calibration: CalibrationText = CalibrationText()
    steps: tuple[Step, ...] = ()

    @model_validator(mode="after")
    def _has_text_to_search_on(self) -> Self:
        """A step that searches is refused here, in front of the others' work, where its text is not asked for."""
        for step in self.steps:
            if isinstance(step, AdaPrunerConfig):
                require_windows(step, self.calibration.windows, self.calibration.validation)
        return self


def load(path: Path) -> Recipe:
    """Read a recipe; its calibration text becomes a path that is good from here.

    Raises:
        RecipeError: no such file, no YAML, or a key or value that a recipe does not have.
    """
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}")
    if path.stat().st_size > LARGEST_RECIPE:
        raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {LARGEST_RECIPE}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no date, too long a number
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    recipe = parse(content if content is not None else {}, str(path))
    text = recipe.calibration.text
    if text is None:
        return recipe
    return with_text(recipe, path.parent / text)


def with_text(recipe: Recipe, text: Path) -> Recipe:
    """The same recipe, calibrated on another file."""
    calibration = recipe.calibration.model_copy(update={"text": str(text)})
    return recipe.model_copy(update={"calibration": calibration})


def parse(content: Any, name: str = "recipe") -> Recipe:
    """Check a recipe that is already parsed.

    Raises:
        RecipeError: names the first key or value that is wrong, with the nearest that would be right.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from None


def schema() -> dict[str, Any]:
    """The published JSON Schema of recipes."""
    return TypeAdapter(Recipe).json_schema()


def _explain(error: ValidationError) -> str:
    unknown = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]
    first = (unknown or error.errors())[0]  # a misspelt key tells more than the one that it leaves missing
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return f"unknown key {where!r}{_nearest(key, _keys(first['loc']))}"
    if first["type"] == "union_tag_invalid":
        context: Mapping[str, Any] = first.get("ctx", {})
        return f"{where}: unknown kind {context.get('tag')!r}; kinds: {context.get('expected_tags')}"
    return f"{where or 'the recipe'}: {first['msg'].removeprefix('Value error, ')}"


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that would be right where `location` ends in a wrong one."""
    kinds: dict[str, type[BaseModel]] = {
        "adapruner": AdaPrunerConfig,
        "casp": CaspConfig,
        "fasp": FaspConfig,
        "lora": LoraConfig,
        "pbs2p": Pbs2pConfig,
        "quantize": QuantizeConfig,
        "swsc": SwscConfig,
    }
    holder: type[BaseModel] = Recipe
    if location[0] == "calibration" and len(location) > 1:
        holder = CalibrationText
    elif location[0] == "steps" and len(location) > 2:
        holder = kinds[str(location[2])]
    return list(holder.model_fields)


def _nearest(key: str, keys: list[str]) -> str:
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; keys: {', '.join(keys)}"
