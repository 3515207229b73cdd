"""artifact.json and the files that it speaks for."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from exporter import artifact as artifacts
from exporter.errors import ArtifactError
from tests import fakes
from tests.models import LLAMA, random_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fakes.write_artifact(tmp_path / "fake", random_model(LLAMA), fakes.TARGET, {"tokenizer.json": b"{}"})
    return tmp_path / "fake"


def verify(folder: Path) -> None:
    artifacts.verify_files(folder, artifacts.load(folder))


def rewrite(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / artifacts.NAME).read_text())
    (folder / artifacts.NAME).write_text(json.dumps({**content, **changes}))


def test_an_artifact_survives_being_saved(folder: Path) -> None:
    made = artifacts.load(folder)
    before = (folder / artifacts.NAME).read_bytes()

    artifacts.save(made, folder)

    assert artifacts.load(folder) == made
    assert (folder / artifacts.NAME).read_bytes() == before


def test_untouched_files_are_verified(folder: Path) -> None:
    verify(folder)


def test_a_flipped_bit_in_any_file_is_named(folder: Path) -> None:
    names = sorted(artifacts.load(folder).files)
    assert names == ["model/pocket.json", "model/weights.safetensors", "tokenizer.json"]
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=rf"^'{name}' was changed: its sha256 is \w{{64}}, not \w{{64}}$"):
            verify(folder)
        (folder / name).write_bytes(content)


def test_the_first_of_several_wrong_files_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(ArtifactError, match=r"^'tokenizer.json' was changed: it has 3 bytes, not 2$"):
        verify(folder)
    (folder / "model" / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"^'model/weights.safetensors' is missing: artifact.json names it$"):
        verify(folder)
    (folder / "a").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"^'a' was added: artifact.json does not name it$"):
        verify(folder)


def test_links_and_special_files_are_refused(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_bytes()
    (folder.parent / "elsewhere").write_bytes(content)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(ArtifactError, match=r"'tokenizer.json' is a link or special file; only plain files may be"):
        verify(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"'tokenizer.json' is a link or special file"):
        verify(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "c:x", "a//b", "./a", "", "a\0b"])
def test_a_path_that_could_leave_the_folder_is_refused(name: str, folder: Path) -> None:
    rewrite(folder, files={name: {"bytes": 0, "sha256": "0" * 64}})

    with pytest.raises(ArtifactError, match="leaves its folder; only relative paths below it may be"):
        verify(folder)


def test_a_size_beyond_all_disks_is_a_change_and_costs_nothing(folder: Path) -> None:
    files = json.loads((folder / artifacts.NAME).read_text())["files"]
    files["tokenizer.json"]["bytes"] = 10**30
    rewrite(folder, files=files)

    with pytest.raises(ArtifactError, match=r"'tokenizer.json' was changed: it has 2 bytes, not 10{30}"):
        verify(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file: Invalid JSON"),
        (b"\xff\xfe", "the file: Invalid JSON"),
        (b"[" * 100_000, "the file: Invalid JSON"),
        (b"[]", "the file: Input should be an object"),
        (b"{}", "target: Field required"),
    ],
)
def test_what_is_no_artifact_json_is_refused_in_one_line(content: bytes, says: str, folder: Path) -> None:
    (folder / artifacts.NAME).write_bytes(content)

    with pytest.raises(ArtifactError, match=says) as refused:
        artifacts.load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"files": {"a": {"bytes": -1, "sha256": "0" * 64}}}, "files.a.bytes: Input should be greater than or equal"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 63}}}, "files.a.sha256: String should match"),
        (
            {"budget": {"relative_l2": float("inf"), "reason": ""}},
            "budget.relative_l2: Input should be a finite number",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict[str, Any], says: str, folder: Path) -> None:
    rewrite(folder, **changes)

    with pytest.raises(ArtifactError, match=says):
        artifacts.load(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tolerance": float("inf")}, "golden.tolerance: Input should be a finite number"),
        ({"tolerance": -1.0}, "golden.tolerance: Input should be greater than or equal to 0"),
        ({"top": []}, "golden.top: List should have at least 1 item"),
        ({"prompt": []}, "golden.prompt: List should have at least 1 item"),
        ({"logits": [[1.0]]}, "golden: Value error, top and logits differ in shape"),
        ({"tokens": [1]}, "golden: Value error, 8 steps for 1 tokens"),
        ({"prompt": [96]}, "Value error, the golden text has a token that a vocabulary of 96 does not"),
        ({"prompt": [1] * 26}, "Value error, the golden text feeds 33 tokens; the context is 32"),
    ],
)
def test_golden_answers_that_could_not_fail_or_not_run_are_refused(
    changes: dict[str, Any], says: str, folder: Path
) -> None:
    golden = json.loads((folder / artifacts.NAME).read_text())["golden"]
    rewrite(folder, golden={**golden, **changes})

    with pytest.raises(ArtifactError, match=says):
        artifacts.load(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source_parameters": 0}, "model.source_parameters: Input should be greater than or equal to 1"),
        ({"context": 1}, "model.context: Input should be greater than or equal to 2"),
        ({"bos": 96}, "BOS token 96 is none of a vocabulary of 96"),
        ({"bos": -1}, "model.bos: Input should be greater than or equal to 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes: dict[str, Any], says: str, folder: Path) -> None:
    model = json.loads((folder / artifacts.NAME).read_text())["model"]
    rewrite(folder, model={**model, **changes})

    with pytest.raises(ArtifactError, match=says):
        artifacts.load(folder)


def test_an_oversized_manifest_is_not_read(folder: Path) -> None:
    with (folder / artifacts.NAME).open("r+b") as stream:
        stream.truncate(artifacts.LARGEST_MANIFEST + 1)  # sparse: takes no disk

    with pytest.raises(ArtifactError, match=r"has 268435457 bytes; a manifest has at most 268435456"):
        artifacts.load(folder)


def test_files_are_streamed(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(64 * 2**20)
    tracemalloc.start()

    described = artifacts.describe_file(tmp_path / "large")

    assert described.bytes == 64 * 2**20
    assert tracemalloc.get_traced_memory()[1] < 4 * artifacts.CHUNK
    tracemalloc.stop()


def test_a_folder_without_artifact_json_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact; `pocket export` makes them"):
        artifacts.load(tmp_path)


def test_bits_per_weight_counts_every_file(folder: Path) -> None:
    made = artifacts.load(folder)
    on_disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != artifacts.NAME)

    assert made.file_bytes == on_disk
    assert made.bits_per_weight == 8 * on_disk / made.model.source_parameters


def test_only_an_encoder_has_no_golden_tokens(folder: Path) -> None:
    made = json.loads((folder / artifacts.NAME).read_text())

    rewrite(folder, golden={**made["golden"], "tokens": [], "top": [[3]], "logits": [[0.5]]})
    with pytest.raises(ArtifactError, match="a decoder has golden tokens, an encoder has none"):
        artifacts.load(folder)
    rewrite(folder, golden=made["golden"], model={**made["model"], "causal": False})
    with pytest.raises(ArtifactError, match="a decoder has golden tokens, an encoder has none"):
        artifacts.load(folder)


def test_an_artifact_of_before_encoders_is_a_decoders(folder: Path) -> None:
    made = json.loads((folder / artifacts.NAME).read_text())
    del made["model"]["causal"]

    rewrite(folder, model=made["model"])

    assert artifacts.load(folder).model.causal is True
