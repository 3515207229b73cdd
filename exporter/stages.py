"""Content-addressed stages: a kill at any moment loses at most the stage under way.

A stage's folder is written under a temporary name and renamed when it is whole. Its name holds a hash of everything
that it depends on, so that the same work is found again, and other work is not. A long stage keeps what it has finished
in a journal of its own (`journal.py`): then a kill loses at most the layer under way.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from exporter.errors import OutputError, PocketError

WORK = ".pocket"
JOB, LOCK = "job.json", "lock"


def key_of(*parts: Any) -> str:
    """Hash of JSON-like values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code_version(*packages: str) -> str:
    """Hash over the sources of import packages: changed code never takes up another version's stages."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(__file__).parent.parent / package
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Workshop:
    """The output folder of one job, and the finished stages that lie in it.

    Args:
        out: The output folder: absent, empty, or left by a killed run of the same job.
        job: Everything that the job depends on.

    Raises:
        OutputError: the folder holds something else, or another process works in it.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out, self._work = out, out / WORK
        self._new = [folder for folder in (out, *out.parents) if not folder.exists()]
        lock = _claim(out, self._work, key_of(job), self._new)
        self.release = weakref.finalize(self, os.close, lock)  # once: when asked, or when nobody holds this any more

    def stage(self, name: str, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of a finished stage, made now unless an earlier run finished it.

        Args:
            name: For people.
            key: Hash of everything that the stage depends on.
            make: Fills an empty folder.

        Returns:
            The folder, and whether it was there already.
        """
        folder = self._work / f"{name}-{key}"
        was_there = folder.is_dir()
        if not was_there:
            fresh = Path(tempfile.mkdtemp(prefix="making-", dir=self._work))
            make(fresh)
            fresh.chmod(0o755)
            fresh.rename(folder)
        shutil.rmtree(self._journal(key), ignore_errors=True)  # the stage is whole
        return folder, was_there

    def journal(self, key: str) -> Path:
        """A folder for what the making of a stage has finished: it outlives a kill, and goes when the stage is whole.

        Args:
            key: The stage's.
        """
        folder = self._journal(key)
        folder.mkdir(exist_ok=True)
        return folder

    def _journal(self, key: str) -> Path:
        return self._work / f"journal-{key}"

    def publish(self, folder: Path, name: str) -> Path:
        """Move a finished stage to its final name; already there where a killed run came this far."""
        final = self.out / name
        if not final.exists():
            folder.rename(final)
        return final

    def write(self, name: str, content: str) -> None:
        """Write a file of the output folder, whole or not at all."""
        fresh = self._work / name
        fresh.write_text(content, encoding="utf-8")
        fresh.rename(self.out / name)

    def finish(self) -> None:
        """Remove the stages: the job is done."""
        shutil.rmtree(self._work)

    def abandon(self) -> None:
        """Remove what this job made: it failed in a way that running it again would not mend."""
        _remove(self.out if self._new else self._work, self._new[1:])


@contextmanager
def abandoned_on_error(workshop: Workshop) -> Iterator[None]:
    """Leave nothing behind after an error; a kill, which this cannot see, leaves the finished stages.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except PocketError:
        workshop.abandon()
        raise
    except OSError as error:
        workshop.abandon()
        raise _output_error(workshop.out, error) from None
    except Exception as error:
        if "No space left" not in str(error):  # safetensors and onnx wrap the system's error in their own
            raise
        workshop.abandon()
        raise OutputError(f"no space left on the disk of {workshop.out}; free some or choose another -o") from None
    finally:
        workshop.release()


def _output_error(out: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left on the disk of {out}; free some or choose another -o")
    return OutputError(f"{error.filename or out}: {error.strerror or error}")


def _remove(folder: Path, parents: Iterable[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with suppress(OSError):  # somebody else put something there
            parent.rmdir()


def _claim(out: Path, work: Path, job: str, new: Sequence[Path]) -> int:
    """Make the work folder, or take up the one that a killed run of the same job left; returns the lock's descriptor.

    The lock ends with the process, however that ends.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder that is empty or does not exist")
    if work.is_symlink():
        raise OutputError(f"{work} is a link; delete it or choose another -o")
    others = [path.name for path in out.iterdir() if path != work] if out.is_dir() else []
    if others and not (work / JOB).is_file():
        raise OutputError(f"{out} is not empty (it holds {sorted(others)[0]}); give an empty or new folder")
    was_there = work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = _locked(out, work / LOCK)
        try:
            _take_up(out, work, job.encode())
        except BaseException:
            (work / LOCK).unlink(missing_ok=True)
            os.close(lock)
            if not was_there:
                _remove(work, new)
            raise
    except OSError as error:
        raise _output_error(out, error) from None
    return lock


def _locked(out: Path, path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OutputError(f"another process is exporting into {out}; wait for it or choose another -o") from None
    return lock


def _take_up(out: Path, work: Path, job: bytes) -> None:
    """Know the job again and clear what it left half made, or write down that it is this one."""
    if (work / JOB).is_file():
        with (work / JOB).open("rb") as stream:
            is_same = stream.read(len(job) + 1) == job
        if not is_same:
            raise OutputError(f"{out} holds an unfinished export of another job; delete {work} or choose another -o")
        for left in work.glob("making-*"):
            shutil.rmtree(left)
        return
    if foreign := sorted(path.name for path in work.iterdir() if path.name not in (LOCK, f"{JOB}.new")):
        raise OutputError(f"{work} is not an export's (it holds {foreign[0]}); delete it or choose another -o")
    fresh = work / f"{JOB}.new"
    fresh.write_bytes(job)
    fresh.rename(work / JOB)
