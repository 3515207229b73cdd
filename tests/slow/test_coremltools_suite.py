"""A fixed sample of coremltools' own tests, on our executor; bench/coremltools_tests.py runs all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.coremltools_tests import is_ours, read

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 12  # tests a file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sampled(out: Path, only: str, sample: int = SAMPLE) -> list[dict[str, object]]:
    command = [sys.executable, "bench/coremltools_tests.py", str(out), "--sample", str(sample), "--only", only]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # its exit code says what the rows say
    return list(read(out))


def assert_right(rows: list[dict[str, object]], least: int) -> None:
    assert [f"{row['test']}: {row['message']}" for row in rows if is_ours(row)] == []
    assert sum(bool(row["predictions"]) and row["outcome"] == "passed" for row in rows) >= least


def test_operations_say_what_coremltools_expects(tmp_path: Path) -> None:
    assert_right(sampled(tmp_path, "mil/ops/tests"), least=200)


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="coremltools' torch front end needs numpy < 2.4: pip install 'numpy<2.4'",
)
def test_models_from_torch_say_what_torch_says(tmp_path: Path) -> None:
    assert_right(sampled(tmp_path, "frontend/torch/test/test_torch_ops", 80), least=50)


def test_damaged_packages_end_in_a_clear_error() -> None:
    said = subprocess.run([sys.executable, "scripts/fuzz_coreml.py", "--count", "7000"], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert said.returncode == 0, said.stdout
    assert "7000 damaged packages, 0 that ended in anything but a clear error" in said.stdout
