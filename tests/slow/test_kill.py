"""kill -9 in the middle of an export, then the same command: byte-identical to an undisturbed run."""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "fasp-int4.yaml"
KILLS = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def command(model: Path, text: Path, out: Path) -> list[str]:
    words = ["export", str(model), "--recipe", str(RECIPE), "--calibration", str(text), "-o", str(out)]
    return [sys.executable, "-c", "from exporter.cli import main; main()", *words]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_exports_resume_to_the_same_bytes(stories: Path, stories_text: Path, tmp_path: Path) -> None:
    stages = [timed_stages(command(stories, stories_text, tmp_path / name)) for name in ("undisturbed", "again")][1]
    expected = digests(tmp_path / "undisturbed")
    assert digests(tmp_path / "again") == expected

    moments, seen = random.Random(0), []
    for index in range(KILLS):
        out = tmp_path / f"killed{index}"
        stage = moments.choice(list(stages))  # any stage, short ones too
        after_s = moments.uniform(0, 0.7) * stages[stage]  # a little early: a busy machine's seconds differ
        seen.append(kill_and_resume(command(stories, stories_text, out), stage, after_s))
        assert digests(out) == expected
    print("\n".join(seen))  # noqa: T201 (what was killed where is worth reading: pytest -s)
    assert any("finished by an earlier run" in line for line in seen)


def timed_stages(words: list[str]) -> dict[str, float]:
    """Run an export; returns seconds by stage, in order."""
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    found = re.findall(r"^(.*): done in ([\d.]+) s$", ran.stderr, re.MULTILINE)
    return {name: float(seconds) for name, seconds in found}


def kill_and_resume(words: list[str], stage: str, after_s: float) -> str:
    """Kill a run some seconds into a stage, run it again; returns what the second run took up."""
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.rstrip() == stage:
            break
    time.sleep(after_s)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL, "the run was over before it was killed"
    ran = subprocess.run(words, check=True, capture_output=True, text=True)
    taken_up = [line for line in ran.stderr.splitlines() if "finished by an earlier run" in line]
    return f"killed {after_s:.1f} s into '{stage}'; {'; '.join(taken_up) or 'nothing was finished'}"
