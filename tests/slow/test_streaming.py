"""A model of many layers in less memory than it has bytes, killed with -9 and taken up again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.streaming import (
    COMMAND,
    MIB,
    SIZES,
    STEPS,
    digests,
    interpreter,
    kill_moments,
    make_checkpoint,
    planned,
    sampled,
)

KILLS = 3
RECIPE = """\
calibration: {windows: 4, length: 128}
steps:
  - {kind: fasp, sparsity: 0.2}
  - {kind: quantize, algorithm: gptq, bits: 4, group: 32}
"""
BESIDE = 64 * MIB  # over what the plan says

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 60 M parameters in shards, and a recipe."""
    folder = tmp_path_factory.mktemp("streaming")
    make_checkpoint(folder / "model", "tall")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def words(scratch: Path, out: str) -> list[str]:
    return [*COMMAND, str(scratch / "model"), "--recipe", str(scratch / "recipe.yaml"), "-o", str(scratch / out)]


def test_killed_compressions_stay_small_and_end_in_the_same_bytes(scratch: Path) -> None:
    stored = sum(path.stat().st_size for path in (scratch / "model").glob("*.safetensors"))  # bfloat16
    base, expected = interpreter(), max(planned(words(scratch, "planned")).values())
    whole = sampled(words(scratch, "whole"))
    moments = kill_moments(scratch / "killed", SIZES["tall"][1], STEPS, whole.seconds, KILLS, seed=os.getpid())
    print(*moments, sep="\n")  # noqa: T201 (of another run than the last one: worth reading where it fails)
    runs = [sampled(words(scratch, "killed"), moment) for moment in (*moments, None)]

    assert not (scratch / "planned").exists()
    assert sum(run.was_killed for run in runs) == KILLS
    assert digests(scratch / "killed") == digests(scratch / "whole")
    for run in (whole, *runs):
        assert run.peak - base < expected + BESIDE
    assert expected + BESIDE < 2 * stored, "no less than the model alone takes in memory as float32"
