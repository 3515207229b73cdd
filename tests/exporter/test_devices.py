"""The tests of other_device.py, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("other_device.py")


def test_methods_give_the_same_model_on_another_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parents[2])
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
