"""Bundles: made the same every time, and every way to tamper with one is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter import artifact as artifacts
from exporter import bundle
from exporter.errors import ArtifactError, OutputError
from tests import fakes
from tests.models import LLAMA, random_model

TOKENIZER = {"tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"{}"}
SCHEMA = fakes.ROOT / "exporter" / "schemas" / "bundle.schema.json"


def export(out: Path, own_config: bytes = b"{}") -> Path:
    """Two artifacts of one model, and what an export leaves beside them."""
    for name, config in (("fake", b"{}"), ("other", own_config)):
        files = {**TOKENIZER, "tokenizer_config.json": config}
        fakes.write_artifact(out / name, random_model(LLAMA), fakes.FakeTarget(name), files)
    (out / "model").mkdir()
    (out / "model" / "pocket.json").write_text("{}")
    (out / "report.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("export") / "out")


@pytest.fixture
def made(exported: Path, tmp_path: Path) -> Path:
    bundle.make(exported, tmp_path / "made")
    return tmp_path / "made"


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in artifacts.files_under(folder)}


def test_a_bundle_that_was_just_made_is_verified(made: Path) -> None:
    manifest = bundle.verify(made)

    assert set(manifest.targets) == {"fake", "other"}
    assert manifest.source.licence == "apache-2.0"
    assert sorted([*manifest.files, bundle.NAME]) == sorted(content(made))
    assert manifest.bytes == sum(len(data) for name, data in content(made).items() if name != bundle.NAME)


def test_tokenizer_files_on_which_all_agree_are_stored_once(made: Path) -> None:
    tokenizers = [name for name in content(made) if "tokenizer" in name]

    assert tokenizers == ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


def test_tokenizer_files_that_differ_stay_with_their_artifacts(tmp_path: Path) -> None:
    bundle.make(export(tmp_path / "out", own_config=b'{"b": 2}'), tmp_path / "made")

    assert [name for name in content(tmp_path / "made") if "tokenizer" in name] == [
        "artifacts/fake/tokenizer_config.json",
        "artifacts/other/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ]
    bundle.verify(tmp_path / "made")


@pytest.mark.parametrize("target", ["fake", "other"])
def test_a_targets_folder_can_be_put_together_again(target: str, exported: Path, made: Path, tmp_path: Path) -> None:
    part = bundle.verify(made).targets[target]
    for name, place in part.folder.items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / place, tmp_path / "again" / name)

    assert content(tmp_path / "again") == content(exported / target)
    assert part.bytes == sum(map(len, content(exported / target).values()))


def test_the_golden_self_test_travels_with_each_target(exported: Path, made: Path) -> None:
    manifest = bundle.verify(made)

    for target, part in manifest.targets.items():
        artifact = artifacts.load(exported / target)
        assert (part.golden, part.requires) == (artifact.golden, artifact.requires)


def test_making_it_twice_gives_the_same_bytes(exported: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()  # an empty folder may be there
    bundle.make(exported, tmp_path / "again")

    assert content(tmp_path / "again") == content(made)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# Tampering: with files


def test_a_flipped_bit_in_any_file_is_named(made: Path) -> None:
    names = sorted(content(made))
    assert len(names) == 9
    for name in names:
        data = (made / name).read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            (made / name).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(ArtifactError, match=name):
                bundle.verify(made)
        (made / name).write_bytes(data)
    bundle.verify(made)


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(made: Path) -> None:
    data = (made / bundle.NAME).read_bytes()
    for at in range(0, len(data), 5):  # all of them: five times as long
        (made / bundle.NAME).write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(ArtifactError, match=r"bundle\.json"):
            bundle.verify(made)


def test_a_removed_file_is_named(made: Path) -> None:
    for name in sorted(set(content(made)) - {bundle.NAME}):
        data = (made / name).read_bytes()
        (made / name).unlink()
        with pytest.raises(ArtifactError, match=rf"^'{name}' is missing: bundle.json names it$"):
            bundle.verify(made)
        (made / name).write_bytes(data)


@pytest.mark.parametrize("name", ["added", "artifacts/fake/libevil.so", "tokenizer/merges.txt"])
def test_an_added_file_is_named(name: str, made: Path) -> None:
    (made / name).write_bytes(b"")

    with pytest.raises(ArtifactError, match=rf"^'{name}' was added: bundle.json does not name it$"):
        bundle.verify(made)


def test_a_renamed_file_is_named_by_whichever_name_comes_first(made: Path) -> None:
    (made / "tokenizer/tokenizer.json").rename(made / "tokenizer/vocab.json")
    with pytest.raises(ArtifactError, match=r"^'tokenizer/tokenizer.json' is missing"):
        bundle.verify(made)
    (made / "tokenizer/vocab.json").rename(made / "tokenizer/a.json")
    with pytest.raises(ArtifactError, match=r"^'tokenizer/a.json' was added"):
        bundle.verify(made)


def test_two_files_that_changed_places_are_named(made: Path) -> None:
    one, two = made / "artifacts/fake/artifact.json", made / "artifacts/other/artifact.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)

    with pytest.raises(ArtifactError, match=r"^'artifacts/fake/artifact.json' was changed"):
        bundle.verify(made)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "bundle.json", "extra", "artifacts"])
def test_a_link_is_refused_by_name(name: str, made: Path) -> None:
    if (made / name).exists():
        (made / name).rename(made.parent / "elsewhere")  # the same bytes, but outside
    else:
        (made.parent / "elsewhere").write_bytes(b"")
    (made / name).symlink_to(made.parent / "elsewhere")

    with pytest.raises(ArtifactError, match=rf"^'{name}' is a link or special file; only plain files may be$"):
        bundle.verify(made)


def test_a_pipe_is_refused_without_being_opened(made: Path) -> None:
    (made / bundle.NAME).unlink()
    os.mkfifo(made / bundle.NAME)

    with pytest.raises(ArtifactError, match=r"^'bundle.json' is a link or special file"):
        bundle.verify(made)


# Tampering: with the manifest, by someone who writes the digest anew


def forge(made: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest, and give it a digest that is right."""
    fields = json.loads((made / bundle.NAME).read_text())
    change(fields)
    fields["digest"] = "0" * 64
    draft = bundle.Manifest.model_validate(fields)
    forged = draft.model_copy(update={"digest": bundle.digest_of(draft)})
    (made / bundle.NAME).write_text(artifacts.to_json(forged))


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """Another path for a file that a part has, in the part and in the files."""

    def change(fields: dict[str, Any]) -> None:
        fields["files"][new] = fields["files"][old]
        for part in fields["targets"].values():
            part["folder"] = {name: new if place == old else place for name, place in part["folder"].items()}

    return change


def test_a_forged_manifest_that_changes_nothing_is_verified(made: Path) -> None:
    forge(made, lambda fields: None)

    bundle.verify(made)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "tokenizer/../../x", "tokenizer\\x", "c:x", "a//b", ""])
def test_a_path_that_leaves_the_folder_is_refused(path: str, made: Path) -> None:
    (made.parent / "x").write_bytes(TOKENIZER["tokenizer.json"])
    forge(made, renamed("tokenizer/tokenizer.json", path))

    with pytest.raises(ArtifactError, match="leaves its folder; only relative paths below it may be"):
        bundle.verify(made)


def set_in(*keys: str | Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """A change of the field at the end of a path of keys; the last of `keys` makes the new value of the old."""

    def change(fields: dict[str, Any]) -> None:
        *path, last, make = keys
        for key in path:
            fields = fields[key]
        fields[last] = make(fields.get(last))

    return change


def added_file(name: str) -> Callable[[dict[str, Any]], None]:
    return set_in("files", name, lambda _: {"bytes": 0, "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (added_file("TOKENIZER/tokenizer.json"), "are one path where case does not count"),
        (added_file("tokenizer/tokenizer.j\u017fon"), "are one path where case does not count"),
        (added_file("bundle.json"), "'bundle.json' belongs to no target"),
        (added_file("orphan"), "'orphan' belongs to no target"),
        (set_in("bytes", lambda n: n + 1), "is not the sum of the files' bytes"),
        (set_in("targets", "fake", "bytes", lambda n: n - 1), "fake: .* is not the sum of its files' bytes"),
        (renamed("tokenizer/tokenizer.json", "b"), r"fake: 'tokenizer.json' cannot lie at 'b'"),
        (
            set_in("targets", "fake", "folder", "b", lambda _: "artifacts/fake/b"),
            "fake: 'artifacts/fake/b' is not among the files",
        ),
        (
            set_in("files", "tokenizer/tokenizer.json", "bytes", lambda _: 10**18),
            "is not the sum of its files' bytes",
        ),
        (
            set_in("targets", "fake", "golden", "tolerance", lambda t: t * 1e6),
            "bundle.json and artifacts/fake/artifact.json contradict each other",
        ),
        (set_in("targets", "other", "requires", "torch", lambda _: "1.0"), "other/artifact.json contradict"),
        (set_in("source", "licence", lambda _: "mit"), "contradict each other"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    change: Callable[[dict[str, Any]], None], says: str, made: Path
) -> None:
    forge(made, change)

    with pytest.raises(ArtifactError, match=says):
        bundle.verify(made)


def test_a_target_without_its_artifact_json_is_refused(made: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        size = fields["files"].pop("artifacts/fake/artifact.json")["bytes"]
        del fields["targets"]["fake"]["folder"]["artifact.json"]
        fields["targets"]["fake"]["bytes"] -= size
        fields["bytes"] -= size

    forge(made, change)
    (made / "artifacts/fake/artifact.json").unlink()

    with pytest.raises(ArtifactError, match=r"bundle.json: fake: has no artifacts/fake/artifact.json"):
        bundle.verify(made)


def test_a_huge_size_is_a_change_and_costs_nothing(made: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        more = 10**18 - fields["files"]["tokenizer/tokenizer.json"]["bytes"]
        fields["files"]["tokenizer/tokenizer.json"]["bytes"] += more
        for holder in (fields, *fields["targets"].values()):
            holder["bytes"] += more

    forge(made, change)

    with pytest.raises(ArtifactError, match=r"^'tokenizer/tokenizer.json' was changed: it has 8 bytes, not 10{18}$"):
        bundle.verify(made)


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "Invalid JSON"),
        (lambda text: "[" * 100_000, "Invalid JSON"),
        (lambda text: text[:-10], "Invalid JSON"),
        (lambda text: "[]", "Input should be an object"),
        (lambda text: text.replace(" ", "  ", 1), "it is not spelt as `pocket bundle` writes it"),
        (lambda text: text + " ", "it is not spelt as `pocket bundle` writes it"),
        (replaced('"recipe": []', '"recipe": [{"a": NaN}]'), "bundle.json"),
        (replaced('"format_version": 1', '"format_version": 2'), "format_version: Input should be 1"),
        (replaced('"source": {', '"later": 1,\n "source": {'), "later: Extra inputs are not permitted"),
        (replaced('"licence": "apache-2.0"', '"licence": "mit"'), "its digest is not that of its content"),
        (replaced('"fake": {', '"../x": {'), "targets"),
    ],
)
def test_a_manifest_that_is_none_is_refused_in_one_line(change: Callable[[str], str], says: str, made: Path) -> None:
    (made / bundle.NAME).write_text(change((made / bundle.NAME).read_text()))

    with pytest.raises(ArtifactError, match=says) as refused:
        bundle.verify(made)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_named_twice_is_refused(made: Path) -> None:
    text = (made / bundle.NAME).read_text()
    start = text.index(' "files": {') + len(' "files": {')
    again = '\n  "tokenizer/tokenizer.json": {"bytes": 0, "sha256": "' + "0" * 64 + '"},'
    (made / bundle.NAME).write_text(text[:start] + again + text[start:])

    with pytest.raises(ArtifactError, match="it is not spelt as `pocket bundle` writes it"):
        bundle.verify(made)


def test_an_oversized_manifest_is_not_read(made: Path) -> None:
    with (made / bundle.NAME).open("r+b") as stream:
        stream.truncate(bundle.LARGEST_BUNDLE_MANIFEST + 1)  # sparse: takes no disk

    with pytest.raises(ArtifactError, match=r"has 16777217 bytes; a manifest has at most 16777216"):
        bundle.verify(made)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="absent is no bundle; `pocket bundle` makes them"):
        bundle.verify(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"is no bundle: it has no bundle.json; `pocket bundle` makes them"):
        bundle.verify(tmp_path)


# Making


def refused(out: Path, dest: Path, says: str, kind: type[Exception] = ArtifactError) -> None:
    beside = sorted(dest.parent.iterdir())
    with pytest.raises(kind, match=says) as error:
        bundle.make(out, dest)
    assert "\n" not in str(error.value)
    assert sorted(dest.parent.iterdir()) == beside  # nothing is left behind


def test_artifacts_are_verified_before_they_are_bundled(tmp_path: Path) -> None:
    out = export(tmp_path / "out")
    (out / "other" / "model" / "weights.safetensors").write_bytes(b"")

    says = r"^other: 'model/weights.safetensors' was changed: it has 0 bytes, not \d+; export it again$"
    refused(out, tmp_path / "made", says)


def test_an_export_folder_without_artifacts_is_refused(tmp_path: Path) -> None:
    out = export(tmp_path / "out")

    refused(tmp_path / "absent", tmp_path / "made", "no such folder: .*absent; give the output folder")
    refused(out / "model", tmp_path / "made", "holds no artifact; `pocket export` makes them")
    refused(out / "fake", tmp_path / "made", "is one artifact; give the folder that it lies in")


def test_an_artifact_under_another_targets_name_is_refused(tmp_path: Path) -> None:
    out = export(tmp_path / "out")
    (out / "fake").rename(out / "faker")

    refused(out, tmp_path / "made", "is an artifact for 'fake'; its folder must have the target's name")


def test_an_artifact_that_failed_its_check_is_not_left_out_silently(tmp_path: Path) -> None:
    out = export(tmp_path / "out")
    (out / "fake").rename(out / "fake.failed")

    refused(out, tmp_path / "made", "fake.failed failed its check; export it again, or delete it to bundle the others")


def test_artifacts_of_two_models_are_refused(tmp_path: Path) -> None:
    out = export(tmp_path / "out")
    made = artifacts.load(out / "other")
    artifacts.save(made.model_copy(update={"model": made.model.model_copy(update={"digest": "1"})}), out / "other")

    refused(out, tmp_path / "made", "fake and other are not of one model; bundle them apart")


def test_a_destination_that_is_taken_is_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "b").write_text("")
    (tmp_path / "file").write_text("")

    says = r"full is not empty \(it holds b\); give an empty or new folder"
    refused(exported, tmp_path / "full", says, OutputError)
    refused(exported, tmp_path / "file", "file is a file; give a folder that is empty or does not exist", OutputError)
    with pytest.raises(OutputError, match=r"file.*: (Not a directory|File exists)"):
        bundle.make(exported, tmp_path / "file" / "made")


def test_a_failing_copy_leaves_nothing_behind(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, to: Path) -> None:
        raise OSError(28, "No space left on device", str(to))

    monkeypatch.setattr(shutil, "copyfile", full)

    refused(exported, tmp_path / "made", "no space left on its disk; free some or choose another -o", OutputError)


KILLED = """
import os, shutil, sys
from pathlib import Path
from exporter import bundle
copied, copy = [], shutil.copyfile
def killed(source, to):
    copied.append(copy(source, to))
    if len(copied) == 3:
        os.kill(os.getpid(), 9)
shutil.copyfile = killed
bundle.make(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_nothing_under_the_final_name(exported: Path, tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, exported, tmp_path / "made"])

    assert ended.returncode == -9
    assert not (tmp_path / "made").exists()
    bundle.make(exported, tmp_path / "made")
    bundle.verify(tmp_path / "made")


# The published schema


def test_the_published_schema_is_the_manifests() -> None:
    assert json.loads(SCHEMA.read_text()) == bundle.schema(), "write it anew: docs/bundle.md says how"


def test_a_manifest_fits_the_published_schema(made: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    fields = json.loads((made / bundle.NAME).read_text())

    jsonschema.validate(fields, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**fields, "later": 1}, schema)
