"""Every recipe that the project ships, chains among them: the built-in model through it, to every target, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from exporter import checking, pipeline, plugins, recipe, store
from exporter.pipeline import Job

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_gives_artifacts_that_are_their_models(path: Path, tmp_path: Path) -> None:
    names = tuple(plugins.target_names())
    outcomes = pipeline.run(Job("builtin", names, tmp_path / "out", recipe.load(path)))

    assert [outcome.target for outcome in outcomes] == list(names)
    for outcome in outcomes:
        assert outcome.ok, (outcome.target, [f.detail for f in outcome.findings if not f.ok], outcome.comparison)
    report = json.loads((tmp_path / "out" / pipeline.REPORT).read_text())
    assert checking.Report.model_validate(report).outcomes == outcomes


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_compressed_model_comes_back_from_disk_as_it_was(path: Path, tmp_path: Path) -> None:
    model = pipeline.compress(pipeline.load("builtin"), recipe.load(path))
    store.save(model, tmp_path)
    back = store.load(tmp_path)

    assert back.architecture == model.architecture
    assert [dict(step) for step in back.provenance.steps] == [dict(step) for step in model.provenance.steps]
    for site, weight in model.weights.items():
        assert torch.equal(back.weights[site].dense(torch.float64), weight.dense(torch.float64)), site
