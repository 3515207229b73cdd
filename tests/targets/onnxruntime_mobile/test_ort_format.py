"""model.ort: the same logits as the artifact that it is made from, and no name before they are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.errors import ArtifactError, CheckFailedError, OutputError
from targets.onnxruntime_mobile import TARGET, runner
from targets.onnxruntime_mobile.ort_format import convert
from tests.fakes import write_artifact
from tests.models import LLAMA, low_bit, random_model

MODEL = random_model(LLAMA).with_weights({"model.embed_tokens": low_bit((96, 64), 4, 32)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact with a tied low-bit embedding."""
    write_artifact(tmp_path / "artifact", MODEL, TARGET, {})
    return tmp_path / "artifact"


def test_the_command_writes_a_file_with_the_same_logits(folder: Path, tmp_path: Path) -> None:
    words = ["-m", "targets.onnxruntime_mobile.ort_format", folder, tmp_path / "model.ort"]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)

    ort, onnx = runner.open_session(tmp_path / "model.ort"), TARGET.session(folder)
    for tokens in ([1, 5, 7], [9]):
        assert torch.allclose(ort.step(tokens), onnx.step(tokens), rtol=1e-5, atol=1e-5)


def test_wrong_golden_answers_leave_no_file(folder: Path, tmp_path: Path) -> None:
    made = json.loads((folder / "artifact.json").read_text())
    made["golden"]["logits"][2][0] += 100
    (folder / "artifact.json").write_text(json.dumps(made))

    with pytest.raises(CheckFailedError, match="step 2: a logit is 1"):
        convert(folder, tmp_path / "model.ort")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_file_that_exists_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ort").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        convert(folder, tmp_path / "model.ort")
    assert (tmp_path / "model.ort").read_text() == "precious"


def test_a_folder_that_is_no_artifact_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact"):
        convert(tmp_path, tmp_path / "model.ort")
    words = ["-m", "targets.onnxruntime_mobile.ort_format", tmp_path, tmp_path / "model.ort"]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
