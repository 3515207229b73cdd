"""The six lines of the README, and what an export leaves in its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from exporter import pipeline, plugins, store
from exporter.checking import Outcome
from exporter.errors import CheckpointError
from exporter.recipe import Recipe, parse

ROOT = Path(__file__).parents[2]
ONNX = "onnxruntime-mobile"
SMALL = parse({"calibration": {"windows": 4, "length": 64}, "steps": [
    {"kind": "fasp", "sparsity": 0.2},
    {"kind": "quantize", "algorithm": "gptq", "bits": 4, "group": 32},
]})  # fmt: skip


def test_the_readmes_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    monkeypatch.chdir(ROOT)
    code = lines.group(1).replace('"out"', repr(str(tmp_path / "out")))

    exec(compile(code, "README.md", "exec"), {})

    assert (tmp_path / "out" / ONNX / "artifact.json").is_file()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The built-in model, pruned and in 4 bits, for ONNX Runtime."""
    out = tmp_path_factory.mktemp("export") / "out"
    return out, pipeline.run(pipeline.Job("builtin", (ONNX,), out, SMALL))


def test_an_export_leaves_artifact_model_and_report_and_nothing_else(exported: tuple[Path, list[Outcome]]) -> None:
    out, outcomes = exported
    assert sorted(path.name for path in out.iterdir()) == ["model", ONNX, "report.json"]
    assert all(outcome.ok for outcome in outcomes)
    report = json.loads((out / "report.json").read_text())
    assert [outcome["target"] for outcome in report["outcomes"]] == [ONNX]


def test_the_model_folder_holds_the_compressed_model(exported: tuple[Path, list[Outcome]]) -> None:
    out, _ = exported
    model, source = store.load(out / "model"), pipeline.load("builtin")

    assert model.parameters < 0.9 * source.parameters
    assert model.provenance.parameters == source.parameters
    assert [step["kind"] for step in model.provenance.steps] == ["fasp", "quantize"]


def test_an_export_in_memory_gives_the_same_artifact(exported: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    model = pipeline.compress(pipeline.load("builtin"), SMALL)
    pipeline.export(model, [ONNX], tmp_path / "out")

    names = [path.name for path in (exported[0] / ONNX).iterdir()]
    assert all((tmp_path / "out" / ONNX / n).read_bytes() == (exported[0] / ONNX / n).read_bytes() for n in names)


def test_a_plan_predicts_the_files_bytes(exported: tuple[Path, list[Outcome]]) -> None:
    source = pipeline.load("builtin")
    plan = plugins.target(ONNX).plan(pipeline.predict(source, SMALL), pipeline.context_of(source, None))
    written = sum(path.stat().st_size for path in (exported[0] / ONNX).glob("model.onnx*"))

    assert plan.bytes == pytest.approx(written, rel=0.05)


def test_a_saved_model_is_exported_like_its_checkpoint(exported: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    outcomes = pipeline.run(pipeline.Job(str(exported[0] / "model"), (ONNX,), tmp_path / "out", Recipe()))

    assert outcomes[0].ok
    assert (tmp_path / "out" / ONNX / "model.onnx.data").read_bytes() == (
        exported[0] / ONNX / "model.onnx.data"
    ).read_bytes()


def test_text_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LARGEST_TEXT", 3)
    (tmp_path / "t.txt").write_text("long")
    with pytest.raises(CheckpointError, match="at most 3 are read"):
        pipeline.read_text(tmp_path / "t.txt")
