"""Selectors: names and patterns, and what is said where one matches nothing."""

from __future__ import annotations

import pytest

from exporter.errors import RecipeError
from exporter.selectors import select

SITES = [f"model.layers.{layer}.{part}" for layer in range(12) for part in ("q_proj", "down_proj")] + ["lm_head"]


def test_a_name_selects_its_site_alone() -> None:
    assert select(SITES, ["model.layers.1.q_proj"], []) == ["model.layers.1.q_proj"]


def test_a_pattern_matches_from_the_start_of_a_name() -> None:
    assert select(SITES, [r"re:.*\.1\.down_proj"], []) == ["model.layers.1.down_proj"]
    assert select(SITES, [r"re:model\.layers\.1\."], []) == ["model.layers.1.q_proj", "model.layers.1.down_proj"]
    with pytest.raises(RecipeError, match="matches no site"):
        select(SITES, ["re:down_proj"], [])


def test_a_dot_in_a_plain_name_is_a_dot() -> None:
    with pytest.raises(RecipeError, match="matches no site"):
        select(["modelxlayers"], ["model.layers"], [])


def test_sites_stay_in_order_and_come_once() -> None:
    assert select(SITES, ["lm_head", "re:.*", "model.layers.0.q_proj"], []) == SITES


def test_ignore_wins() -> None:
    assert select(SITES, ["re:.*"], ["re:model.*"]) == ["lm_head"]
    assert select(SITES, ["lm_head"], ["lm_head"]) == []


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_selector_that_matches_nothing_is_told_with_the_nearest_names(field: str) -> None:
    targets, ignore = (["lm_hed"], []) if field == "targets" else (["re:.*"], ["lm_hed"])
    with pytest.raises(RecipeError, match=rf"{field}: 'lm_hed' matches no site; nearest: lm_head"):
        select(SITES, targets, ignore)


def test_without_sites_there_is_nothing_near() -> None:
    with pytest.raises(RecipeError, match="nearest: there are none"):
        select([], ["re:.*"], [])


def test_a_broken_pattern_is_told_with_its_reason() -> None:
    with pytest.raises(RecipeError, match=r"targets: 're:\(' is no regular expression: missing \)"):
        select(SITES, ["re:("], [])
