"""An artifact whose runtime is not here: a stand-in runs it, says so, times nothing, and tells what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import pipeline
from exporter.recipe import parse
from tests.cli.test_commands import Pocket
from tests.targets.coreml_ios.damage import another_place, damage, edit, last_bit, maker

COREML = "coreml-ios"
SAID = "reference executor on Linux, not Apple's runtime"
FOUR = parse({"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 32}]})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in 4 bits, for Core ML."""
    folder = tmp_path_factory.mktemp("stand_in") / "out"
    pipeline.run(pipeline.Job("builtin", (COREML,), folder, FOUR, context=96))
    return folder


def test_check_runs_it_and_says_in_what(pocket: Pocket, out: Path) -> None:
    ran = pocket("check", out / COREML)

    assert ran.code == 0
    assert f"coreml-ios: run in a stand-in: {SAID}" in ran.out
    assert "stand-in run: ok" in ran.out
    assert "ok: float32 execution: " in ran.out


def test_check_tells_machines_too(pocket: Pocket, out: Path) -> None:
    found = json.loads(pocket("check", out / COREML, "--json").out)

    assert found["stand_in"] == SAID
    assert found["comparison"]["ok"] is True
    assert found["comparison"]["relative_l2"] < found["comparison"]["budget_l2"] / 4
    assert "files" in [finding["what"] for finding in found["findings"]]


def test_run_prints_the_models_text_and_notes_in_what(pocket: Pocket, out: Path) -> None:
    model = pocket("run", out / "model", "--prompt", "import ", "--new-tokens", 12)
    artifact = pocket("run", out / COREML, "--prompt", "import ", "--new-tokens", 12)

    assert artifact.code == 0
    assert artifact.out == model.out
    assert f"note: coreml-ios is run in a stand-in: {SAID}" in artifact.err
    assert "note:" not in model.err


def test_run_tells_machines_of_a_stand_in_only(pocket: Pocket, out: Path) -> None:
    artifact, model = (json.loads(pocket("run", out / name, "--new-tokens", 3, "--json").out)
                       for name in (COREML, "model"))  # fmt: skip

    assert artifact.pop("stand_in") == SAID
    assert artifact == model


def test_evaluate_gives_the_models_perplexity_and_says_in_what(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(pipeline.SAMPLE.read_text()[:8_000])
    words = ("--text", text, "--windows", 2, "--length", 48)

    ran = pocket("evaluate", out / COREML, *words, "--reference", out / "model", "--json")
    found = json.loads(ran.out)

    assert found["stand_in"] == SAID
    assert found["reference"]["kl"] < 1e-4
    assert f"note: coreml-ios is run in a stand-in: {SAID}" in pocket("evaluate", out / COREML, *words).err


def test_probe_times_no_stand_in(pocket: Pocket, out: Path) -> None:
    ran = pocket("probe", out / COREML, "--prompt-tokens", 8, "--new-tokens", 4)

    assert ran.code == 2
    assert f"coreml-ios runs here in a stand-in: {SAID}; its times say nothing of a phone's" in ran.err


def scale(package: Path) -> None:
    damage(package, "model.layers.2.mlp.up_proj", "scale", last_bit)


def attribute(package: Path) -> None:
    edit(package, lambda operations: setattr(maker(operations, "silu_1"), "type", "relu"))


@pytest.mark.parametrize(
    ("how", "departs"),
    [
        (scale, r"linear linear_\d+, on the way to linear model.layers.2.mlp.up_proj"),
        (attribute, "relu silu_1, on the way to activation silu"),
    ],
)
def test_check_of_a_changed_file_names_the_first_operation_that_departs(
    how: Callable[[Path], None], departs: str, pocket: Pocket, out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "out")
    how(tmp_path / "out" / COREML / "model.mlpackage")

    ran = pocket("check", tmp_path / "out" / COREML)

    assert ran.code == 3
    assert re.search(f"WRONG: float32 execution: .*the first operation whose value departs: {departs}", ran.out)
    assert re.search("WRONG: files: 'model.mlpackage/.*' was changed: its sha256 is", ran.out)
    assert re.search(f"error: coreml-ios: float32 execution: .*the first operation .*departs: {departs}", ran.err)


def test_a_changed_mask_is_named_too(pocket: Pocket, tmp_path: Path) -> None:
    sparse = parse({"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 32, "sparsity": "2:4"}]})
    pipeline.run(pipeline.Job("builtin", (COREML,), tmp_path / "out", sparse, context=32))
    site = "model.layers.1.self_attn.o_proj"
    damage(tmp_path / "out" / COREML / "model.mlpackage", f"{site}.kept_0", "data_mask", another_place)

    ran = pocket("check", tmp_path / "out" / COREML)

    assert ran.code == 3
    assert re.search(f"the first operation whose value departs: linear linear_.*, on the way to linear {site}", ran.out)


def test_a_link_is_not_followed(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    weights = tmp_path / "out" / COREML / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.rename(tmp_path / "weight.bin")
    weights.symlink_to(tmp_path / "weight.bin")

    ran = pocket("check", tmp_path / "out" / COREML)

    assert ran.code == 2
    assert "is a link or special file" in ran.err
