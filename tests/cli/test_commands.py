"""Every command on one small export, as a user would type it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter import evaluate as evaluation
from exporter import pipeline
from exporter.checking import Outcome
from exporter.cli.export import print_outcomes
from exporter.evaluate import Comparison, Divergence
from exporter.recipe import parse
from tests.cli.conftest import Ran

Pocket = Callable[..., Ran]
ONNX = "onnxruntime-mobile"
SMALL = parse({"steps": [{"kind": "quantize", "algorithm": "rtn", "bits": 4, "group": 32}]})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in 4 bits, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("commands") / "out"
    pipeline.run(pipeline.Job("builtin", (ONNX,), folder, SMALL))
    return folder


def test_run_prints_the_same_text_for_model_and_artifact(pocket: Pocket, out: Path) -> None:
    model = pocket("run", out / "model", "--prompt", "import ", "--new-tokens", 12)
    artifact = pocket("run", out / ONNX, "--prompt", "import ", "--new-tokens", 12)

    assert model.code == artifact.code == 0
    assert artifact.out == model.out
    assert artifact.out.startswith("import ")


def test_run_tells_machines_the_tokens(pocket: Pocket, out: Path) -> None:
    found = json.loads(pocket("run", out / ONNX, "--new-tokens", 5, "--json").out)

    assert len(found["tokens"]) <= 5
    assert found["prompt"] == [pipeline.load("builtin").architecture.bos]


def test_check_says_ok_and_the_numbers(pocket: Pocket, out: Path) -> None:
    ran = pocket("check", out / ONNX, "--json")
    found = json.loads(ran.out)

    assert ran.code == 0
    assert found["comparison"]["ok"] is True
    assert all(finding["ok"] for finding in found["findings"])


def test_check_of_a_changed_file_is_refused_by_name(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    data = tmp_path / "out" / ONNX / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)

    ran = pocket("check", tmp_path / "out" / ONNX)

    assert ran.code == 2
    assert "model.onnx.data" in ran.err


def test_check_against_another_model_is_refused(pocket: Pocket, out: Path) -> None:
    ran = pocket("check", out / ONNX, "--model", pipeline.BUILTIN_FOLDER)

    assert ran.code == 2
    assert "is another model than the one" in ran.err


def test_check_without_its_model_says_where_to_give_it(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / ONNX, tmp_path / "alone")

    ran = pocket("check", tmp_path / "alone")

    assert ran.code == 2
    assert "give it with --model" in ran.err


def test_check_of_no_artifact_is_refused(pocket: Pocket, tmp_path: Path) -> None:
    ran = pocket("check", tmp_path)
    assert ran.code == 2
    assert "is no artifact; `pocket export` makes them" in ran.err


def test_evaluate_gives_model_and_artifact_nearly_one_perplexity(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(pipeline.SAMPLE.read_text()[:20_000])
    words = ("--text", text, "--windows", 4, "--length", 64, "--json")

    model = json.loads(pocket("evaluate", out / "model", *words).out)
    artifact = json.loads(pocket("evaluate", out / ONNX, *words).out)

    assert artifact["perplexity"] == pytest.approx(model["perplexity"], rel=0.05)
    assert model["perplexity"] < 200


def test_compress_saves_a_model_that_export_takes(pocket: Pocket, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{kind: quantize, algorithm: rtn, bits: 8, group: 32}]")

    assert pocket("compress", "builtin", "--recipe", recipe, "-o", tmp_path / "small").code == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["model", "report.json"]
    assert pocket("export", tmp_path / "small" / "model", "-t", ONNX, "-o", tmp_path / "out").code == 0


def test_a_model_calibrated_on_the_sample_that_ships_is_told_of(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "fasp-int4.yaml"
    words = ("--recipe", recipe, "-t", ONNX, "-o", tmp_path / "out", "--dry-run")

    assert "note: calibrating on the sample that ships" in pocket("export", pipeline.BUILTIN_FOLDER, *words).err
    assert "note:" not in pocket("export", "builtin", *words).err


def test_where_greedy_texts_part_is_said_with_its_gap(capsys: pytest.CaptureFixture[str]) -> None:
    parted = Divergence(
        position=5, reference_token=1, candidate_token=2, reference_gap=0.03, allowed_gap=4.0, is_tie=True
    )
    compared = Comparison(
        positions=64, max_abs=0.29, relative_l2=0.02, budget_l2=0.1, kl=0.01, top1=0.9, prefill_decode_l2=0.01,
        greedy_agreement=5, new_tokens=64, divergence=parted, ok=True, reasons=[],
    )  # fmt: skip
    outcome = Outcome(target="t", file_bytes=1, bits_per_weight=4.0, native=1, sites=1, folded=[], notes=[],
                      findings=[], comparison=compared)  # fmt: skip

    print_outcomes([outcome])

    line = (
        "t: greedy text parts at token 5: a tie within the budget (the model's logits of the two tokens are 0.03 apart"
    )
    assert line in capsys.readouterr().out


def test_dry_run_prints_a_plan_and_writes_nothing(pocket: Pocket, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "fasp-int4.yaml"
    ran = pocket("export", "builtin", "--recipe", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    found = json.loads(ran.out)

    assert found["steps"] == ["fasp 0.2", "quantize gptq 4"]
    assert {"onnxruntime-mobile", "executorch-android", "coreml-ios"} <= set(found["targets"])
    assert all(plan["predicted_bytes"] > 100_000 for plan in found["targets"].values())
    assert found["parameters"] < found["source_parameters"]
    assert not (tmp_path / "out").exists()


def test_probe_bundle_and_verify_follow_each_other(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    words = ("--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2, "--warmups", 1, "--json")
    measured = json.loads(pocket("probe", out / ONNX, "--phone", "host", *words).out)
    assert measured["kind"] == "host"

    assert pocket("bundle", out, "-o", tmp_path / "bundle").code == 0
    assert pocket("verify", tmp_path / "bundle").code == 0
    manifest = tmp_path / "bundle" / "artifacts" / ONNX / "model.onnx"
    manifest.write_bytes(manifest.read_bytes() + b"x")
    ran = pocket("verify", tmp_path / "bundle")
    assert ran.code == 2
    assert "model.onnx" in ran.err


def test_an_unknown_phone_is_refused_with_those_installed(pocket: Pocket, out: Path) -> None:
    ran = pocket("probe", out / ONNX, "--phone", "abacus")
    assert ran.code == 2
    assert "no phone named 'abacus'; installed: host" in ran.err


def test_targets_and_doctor_say_what_is_installed(pocket: Pocket) -> None:
    assert "onnxruntime-mobile" in pocket("targets").out
    assert {row["target"] for row in json.loads(pocket("targets", "--json").out)} >= {ONNX, "coreml-ios"}
    assert "pocket-exporter" in pocket("doctor").out
    assert json.loads(pocket("doctor", "--json").out)["python"] == sys.version.split()[0]


def test_a_prompt_longer_than_the_context_is_refused(pocket: Pocket, out: Path) -> None:
    ran = pocket("run", out / ONNX, "--new-tokens", 5000)
    assert ran.code == 2
    assert "do not fit the context" in ran.err


def test_check_derives_again_what_artifact_json_says(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / ONNX / "artifact.json"
    good = json.loads(path.read_text())
    lies = {"budget": {**good["budget"], "relative_l2": 1e9}, "model": {**good["model"], "layers": 99},
            "decisions": good["decisions"][1:]}  # fmt: skip
    for name, lie in lies.items():
        path.write_text(json.dumps({**good, name: lie}))
        ran = pocket("check", tmp_path / "out" / ONNX)
        assert ran.code == 3
        assert f"artifact.json: {name}: not what this model gives" in ran.err


def strict(text: str) -> Any:
    """JSON as other languages read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_an_infinite_perplexity_is_null_in_json(
    pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LARGEST_LOSS", 0.0)
    (tmp_path / "text").write_text("import os\n" * 100)
    ran = pocket("evaluate", "builtin", "--text", tmp_path / "text", "--windows", 1, "--length", 32, "--json")

    found = strict(ran.out)
    assert found["perplexity"] is None
    assert found["nll"] > 0


def test_every_command_prints_the_same_strict_json_twice(pocket: Pocket, out: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("import os\n" * 100)
    for words in (
        ("check", out / ONNX),
        ("run", out / ONNX, "-n", 3),
        ("evaluate", "builtin", "--text", text, "--windows", 1, "--length", 32),
        ("export", "builtin", "-t", ONNX, "-o", tmp_path / "x", "--dry-run"),
        ("targets",),
        ("doctor",),
    ):
        first, second = pocket(*words, "--json").out, pocket(*words, "--json").out
        assert strict(first)
        assert first == second
