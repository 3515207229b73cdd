"""Stages: whole or not there; found again only for the same work."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from exporter.errors import CheckpointError, OutputError
from exporter.stages import WORK, Workshop, abandoned_on_error, code_version, key_of


def fill(folder: Path) -> None:
    (folder / "data").write_text("whole")


def test_a_finished_stage_is_found_again_by_the_same_job(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        folder, was_there = Workshop(tmp_path / "out", {"job": 1}).stage(
            "a", "key", lambda f: (made.append(1), fill(f))[1]
        )
        assert (folder / "data").read_text() == "whole"
        assert was_there == (len(made) == 1 and _ == 1)
    assert made == [1]


def test_a_stage_that_dies_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "out", {"job": 1})

    def die(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.stage("a", "key", die)

    assert [path.name.split("-")[0] for path in (tmp_path / "out" / WORK).iterdir() if path.is_dir()] == ["making"]
    Workshop(tmp_path / "out", {"job": 1})
    assert not [path for path in (tmp_path / "out" / WORK).iterdir() if path.is_dir()]


def test_another_job_does_not_take_up_unfinished_stages(tmp_path: Path) -> None:
    Workshop(tmp_path / "out", {"job": 1})
    with pytest.raises(OutputError, match=r"holds an unfinished export of another job; delete .*\.pocket"):
        Workshop(tmp_path / "out", {"job": 2})


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match=r"is not empty \(it holds precious.txt\)"):
        Workshop(tmp_path, {})
    with pytest.raises(OutputError, match="is a file"):
        Workshop(tmp_path / "precious.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_finished_stages_move_to_their_final_names(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "out", {})
    folder, _ = workshop.stage("a", "key", fill)
    workshop.publish(folder, "final")
    workshop.write("note.txt", "hello")
    workshop.finish()

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["final", "note.txt"]


@pytest.mark.parametrize("error", [CheckpointError("bad"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_leaves_nothing_behind(error: Exception, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "out", {})
    with pytest.raises((CheckpointError, OutputError)), abandoned_on_error(workshop):
        raise error
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_folder_that_was_there_leaves_it_empty(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, {})
    with pytest.raises(OutputError, match="no space left on the disk of"), abandoned_on_error(workshop):
        raise RuntimeError("io error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_keys_tell_different_work_apart() -> None:
    assert key_of(1, {"a": 2, "b": 3}) == key_of(1, {"b": 3, "a": 2}) != key_of(1, {"a": 2, "b": 4})
    assert code_version("exporter") == code_version("exporter") != code_version("targets")
