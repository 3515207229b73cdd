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

    workshop.release()  # as the end of a process does
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


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "out", {"job": 1})
    begun = (tmp_path / "out" / WORK / "making-of-the-first").absolute()
    begun.mkdir()
    for job in (1, 2):
        with pytest.raises(OutputError, match="another process is exporting into"):
            Workshop(tmp_path / "out", {"job": job})

    assert begun.is_dir()
    workshop.release()
    Workshop(tmp_path / "out", {"job": 1})
    assert not begun.exists()


def test_a_work_folder_that_no_export_made_is_refused_and_kept(tmp_path: Path) -> None:
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"is not an export's \(it holds mine\)"):
        Workshop(tmp_path / "out", {})
    assert [path.name for path in work.iterdir()] == ["mine"]

    (work / "job.json").write_bytes(b"\xff{{" * 1000)
    with pytest.raises(OutputError, match="unfinished export of another job"):
        Workshop(tmp_path / "out", {})
    assert sorted(path.name for path in work.iterdir()) == ["job.json", "mine"]


def test_a_work_folder_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link; delete it"):
        Workshop(tmp_path / "out", {})
    assert (tmp_path / "elsewhere" / "precious").is_file()


def test_an_error_takes_the_parents_that_were_made_with_it(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "a" / "b" / "out", {})
    with pytest.raises(CheckpointError), abandoned_on_error(workshop):
        raise CheckpointError("bad")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_outlives_a_kill_and_goes_when_its_stage_is_whole(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "out", {"job": 1})

    def die(folder: Path) -> None:
        (workshop.journal("key") / "layer").write_text("finished")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workshop.stage("a", "key", die)
    workshop.release()

    again = Workshop(tmp_path / "out", {"job": 1})
    assert (again.journal("key") / "layer").read_text() == "finished"
    assert not list(again.journal("other").iterdir())
    again.stage("a", "key", fill)
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "out" / WORK).iterdir() if path.is_dir()) == [
        "a",
        "journal",
    ]
    assert not list(again.journal("key").iterdir())
