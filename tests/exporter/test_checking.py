"""What a check finds, and in which order: files first; what is known to be wrong is not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter import artifact as artifacts
from exporter import checking, pipeline
from exporter.cli.export import refuse_failed
from exporter.errors import CheckFailedError
from exporter.session import TorchSession
from exporter.weights import Dense
from tests.fakes import TARGET, FakeTarget
from tests.models import LLAMA, random_model

MODEL = random_model(LLAMA)
SITE = "model.layers.0.mlp.down_proj"
OTHER = MODEL.with_weights({SITE: Dense(MODEL.weights[SITE].dense() * 1.01)})


class Rounding(FakeTarget):
    """Its files are the model's; its runtime computes with a slightly other matrix."""

    def session(self, folder: Path, threads: int = 1) -> TorchSession:
        return TorchSession(OTHER)


class NeverRun(FakeTarget):
    """Must not be run."""

    def session(self, folder: Path, threads: int = 1) -> TorchSession:
        raise AssertionError("a file that is known to be wrong was run")


def made_by(target: FakeTarget, folder: Path) -> artifacts.Artifact:
    """An artifact as the pipeline writes it."""
    folder.mkdir()
    return pipeline.lower(MODEL, target, folder, 32)


def test_a_right_artifact_is_ok(tmp_path: Path) -> None:
    outcome = checking.check(tmp_path / "a", made_by(TARGET, tmp_path / "a"), MODEL, TARGET)

    assert outcome.ok
    assert outcome.problems == []
    assert outcome.comparison is not None


def test_a_wrong_file_is_told_by_part_and_not_run(tmp_path: Path) -> None:
    target = NeverRun()
    outcome = checking.check(tmp_path / "a", made_by(target, tmp_path / "a"), OTHER, target)

    assert not outcome.ok
    assert outcome.comparison is None
    assert outcome.problems == [f"{SITE}: differs"]


def test_a_runtime_that_rounds_too_much_is_told_apart_from_wrong_files(tmp_path: Path) -> None:
    target = Rounding()
    outcome = checking.check(tmp_path / "a", made_by(target, tmp_path / "a"), MODEL, target)

    assert not outcome.ok
    assert all(found.ok for found in outcome.findings)
    assert all(problem.endswith(checking.RIGHT_FILES) for problem in outcome.problems)
    with pytest.raises(CheckFailedError, match="relative L2"):
        refuse_failed([outcome])


@pytest.mark.parametrize("field", ["model", "budget", "decisions"])
def test_a_manifest_that_says_something_else_is_found(field: str, tmp_path: Path) -> None:
    made = made_by(TARGET, tmp_path / "a")
    changed = {
        "model": made.model.model_copy(update={"parameters": 7}),
        "budget": made.budget.model_copy(update={"relative_l2": 0.5}),
        "decisions": made.decisions[1:],
    }

    outcome = checking.check(tmp_path / "a", made.model_copy(update={field: changed[field]}), MODEL, TARGET)

    assert outcome.problems == [f"artifact.json: {field}: not what this model gives"]
