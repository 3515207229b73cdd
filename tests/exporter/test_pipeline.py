"""The six lines of the README, and what an export leaves in its folder."""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from exporter import pipeline, plugins, store
from exporter.checking import Outcome
from exporter.errors import CheckpointError, RecipeError
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


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [{"kind": "swsc"}, {"kind": "casp", "bits": 4}],
            "q_proj is 12 shared rows .*; casp compresses plain matrices",
        ),
        ([{"kind": "casp", "bits": 4}, {"kind": "swsc"}], "q_proj is rank 24 .*; it takes plain matrices"),
        (
            [{"kind": "quantize"}, {"kind": "casp", "bits": 4}],
            "q_proj is 4-bit group 32; casp compresses plain matrices",
        ),
        ([{"kind": "quantize"}, {"kind": "quantize", "bits": 8}], "nothing is left to round"),
        ([{"kind": "casp", "bits": 4}, {"kind": "pbs2p"}], "pbs2p binarizes plain matrices"),
    ],
    ids=lambda part: "-".join(step["kind"] for step in part) if isinstance(part, list) else "",
)
def test_two_steps_for_the_same_matrices_are_refused_before_either_works(
    steps: list[dict[str, object]], message: str, tmp_path: Path
) -> None:
    recipe, begun = parse({"steps": steps}), list[str]()

    class Noting(pipeline.Unwatched):
        def stage(self, name: str) -> AbstractContextManager[pipeline.Report]:
            begun.append(name)
            return super().stage(name)

    for attempt in (
        lambda: pipeline.compress(pipeline.load("builtin"), recipe, Noting()),
        lambda: pipeline.run(pipeline.Job("builtin", (), tmp_path / "out", recipe), Noting()),
    ):
        with pytest.raises(RecipeError, match=message):
            attempt()
    assert begun == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ({"kind": "quantize"}, "quantize gptq 4"),
        ({"kind": "quantize", "bits": None, "sparsity": "2:4"}, "quantize gptq 2:4"),
        ({"kind": "quantize", "algorithm": "rtn", "sparsity": "2:4"}, "quantize rtn 2:4 4"),
        ({"kind": "swsc"}, "swsc"),
        ({"kind": "fasp", "sparsity": 0.2}, "fasp 0.2"),
    ],
)
def test_a_step_is_named_by_what_is_said_of_it(step: dict[str, object], name: str) -> None:
    assert pipeline.step_name(parse({"steps": [step]}).steps[0]) == name


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_recipe_fits_the_built_in_model_and_all_targets(path: Path, tmp_path: Path) -> None:
    job = pipeline.Job("builtin", tuple(plugins.target_names()), tmp_path / "out", pipeline.recipe(path))
    ahead = pipeline.prospect(job)
    assert list(ahead.plans) == list(job.targets)
    assert len(ahead.model.provenance.steps) == len(job.recipe.steps)
