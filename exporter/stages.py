"""Content-addressed stages: a kill at any moment loses at most the stage under way.

A stage's folder is written under a temporary name and renamed when it is whole. Its name holds a hash of everything
that it depends on, so that the same work is found again, and other work is not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from exporter.errors import OutputError, PocketError

WORK = ".pocket"
JOB = "job.json"


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
        OutputError: the folder holds something else.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.out, self._work = out, out / WORK
        self._is_new = not out.exists()
        _claim(out, self._work, key_of(job))

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
        if folder.is_dir():
            return folder, True
        fresh = Path(tempfile.mkdtemp(prefix="making-", dir=self._work))
        make(fresh)
        fresh.chmod(0o755)
        fresh.rename(folder)
        return folder, False

    def publish(self, folder: Path, name: str) -> Path:
        """Move a finished stage to its final name; already there where a killed run came this far."""
        final = self.out / name
        if not final.exists():
            folder.rename(final)
        return final

    def write(self, name: str, content: str) -> None:
        """Write a file of the output folder, whole or not at all."""
        fresh = self._work / name
        fresh.write_text(content)
        fresh.rename(self.out / name)

    def published(self, name: str) -> Path | None:
        """The folder of that final name, where a killed run of this job came that far."""
        return self.out / name if (self.out / name).is_dir() else None

    def finish(self) -> None:
        """Remove the stages: the job is done."""
        shutil.rmtree(self._work)

    def abandon(self) -> None:
        """Remove what this job made: it failed in a way that running it again would not mend."""
        shutil.rmtree(self.out if self._is_new else self._work, ignore_errors=True)


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


def _output_error(out: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left on the disk of {out}; free some or choose another -o")
    return OutputError(f"{error.filename or out}: {error.strerror or error}")


def _claim(out: Path, work: Path, job: str) -> None:
    """Make the work folder, or take up the one that a killed run of the same job left."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder that is empty or does not exist")
    if work.is_dir() and (work / JOB).is_file():
        _take_up(out, work, job)
        return
    others = [path.name for path in out.iterdir() if path != work] if out.is_dir() else []
    if others:
        raise OutputError(f"{out} is not empty (it holds {sorted(others)[0]}); give an empty or new folder")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        fresh = work / f"{JOB}.{os.getpid()}"
        fresh.write_text(json.dumps({"job": job}))
        fresh.rename(work / JOB)
    except OSError as error:
        raise _output_error(out, error) from None


def _take_up(out: Path, work: Path, job: str) -> None:
    found = json.loads((work / JOB).read_text())
    if found != {"job": job}:
        raise OutputError(f"{out} holds an unfinished export of another job; delete {work} or choose another -o")
    for left in work.glob("making-*"):
        shutil.rmtree(left)
