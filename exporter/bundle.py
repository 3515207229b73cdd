"""Bundles: all artifacts of one model in one folder that can be verified without running anything.

    bundle.json                        the manifest: every file's size and sha256, golden self-tests, licence
    tokenizer/FILE                     tokenizer files, stored once where all artifacts agree on them
    artifacts/TARGET/artifact.json     an artifact, as it was exported, without those files
    artifacts/TARGET/...

The manifest protects the files, and its own `digest` protects the manifest against accidents; who made it is for a
signature over bundle.json to say.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from exporter import artifact as artifacts
from exporter.artifact import Artifact, File, Golden, Record
from exporter.checkpoint import TOKENIZER_FILES
from exporter.errors import ArtifactError, OutputError

NAME = "bundle.json"
LARGEST_BUNDLE_MANIFEST = 16 * 2**20  # bytes; it is read whole
TOKENIZER, ARTIFACTS = "tokenizer", "artifacts"
TARGET_NAME = r"^[a-z0-9]+(-[a-z0-9]+)*$"


class Source(Record):
    """The checkpoint that every artifact of a bundle came from."""

    name: str
    digest: str
    licence: str | None
    family: str
    parameters: int


class Part(Record):
    """One target's artifact.

    `folder` makes up the folder that the target's runtime loads: path there -> path in the bundle. `bytes` is its size,
    shared files included. `golden` is its self-test: an artifact is right where it answers so within the tolerance.
    """

    requires: dict[str, str]
    recipe: list[dict[str, Any]]
    folder: dict[str, str]
    bytes: int
    golden: Golden


class Manifest(Record):
    """bundle.json. `digest` is the sha256 of the manifest's own JSON without that field."""

    format_version: Literal[1] = 1
    source: Source
    files: dict[str, File]
    targets: Annotated[dict[Annotated[str, Field(pattern=TARGET_NAME)], Part], Field(min_length=1)]
    bytes: int
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def schema() -> dict[str, Any]:
    """The published JSON Schema of bundle.json."""
    return Manifest.model_json_schema()


def make(out: Path, dest: Path) -> Manifest:
    """Put all artifacts of an export into one folder.

    Args:
        out: Output folder of an export, with a folder per target.
        dest: Absent or empty. It is written under a temporary name beside it, and renamed when it is whole.

    Returns:
        What bundle.json says.

    Raises:
        ArtifactError: there is no artifact, one is not what its artifact.json says, or they are of several models.
        OutputError: `dest` cannot be used, or the disk is full.
    """
    _require_free(dest)
    made = _find(out)
    for target, artifact in made.items():
        _verify_artifact(out / target, target, artifact)
    shared = _shared(made.values())
    folders = {target: _folder(target, artifact, shared) for target, artifact in made.items()}
    with _renamed_when_whole(dest) as fresh:
        for target, folder in folders.items():
            _copy(out / target, fresh, folder)
        manifest = _describe(fresh, made, folders)
        for target, part in manifest.targets.items():  # what was copied is still what was verified
            _require_agreement(fresh, target, part, manifest)
        (fresh / NAME).write_text(artifacts.to_json(manifest), encoding="utf-8")
    return manifest


def verify(folder: Path) -> Manifest:
    """Compare every file of a bundle with its manifest. Runs nothing; memory is bounded by the manifest.

    Returns:
        What bundle.json says.

    Raises:
        ArtifactError: names the first file, in sorted order, that is changed, missing or added; or what else is wrong:
            a link or special file, a path that leaves the folder, a manifest that is not of this version, contradicts
            itself or an artifact.json, or is not in its one canonical form.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no bundle; `pocket bundle` makes them")
    list(artifacts.files_under(folder))  # refuses links and special files before anything is opened
    manifest = _read(folder / NAME)
    _require_consistent(manifest)
    artifacts.compare_files(folder, manifest.files, NAME)
    for target, part in manifest.targets.items():
        _require_agreement(folder, target, part, manifest)
    return manifest


def _find(out: Path) -> dict[str, Artifact]:
    """Artifacts by target."""
    if not out.is_dir():
        raise ArtifactError(f"no such folder: {out}; give the output folder of `pocket export`")
    if (out / artifacts.NAME).is_file():
        raise ArtifactError(f"{out} is one artifact; give the folder that it lies in")
    names = sorted(path.name for path in out.iterdir() if (path / artifacts.NAME).is_file())
    if not names:
        raise ArtifactError(f"{out} holds no artifact; `pocket export` makes them")
    made = {name: artifacts.load(out / name) for name in names}
    _require_one_model(made)
    return made


def _require_one_model(made: Mapping[str, Artifact]) -> None:
    first, *others = made
    for other in others:
        if _source(made[other]) != _source(made[first]):
            raise ArtifactError(f"{first} and {other} are not of one model; bundle them apart")


def _verify_artifact(folder: Path, target: str, artifact: Artifact) -> None:
    if target == f"{artifact.target}.failed":  # as an export names it
        raise ArtifactError(f"{folder} failed its check; export it again, or delete it to bundle the others")
    if artifact.target != target or not re.match(TARGET_NAME, target):
        raise ArtifactError(f"{folder} is an artifact for {artifact.target!r}; its folder must have the target's name")
    try:
        artifacts.verify_files(folder, artifact)
    except ArtifactError as error:
        raise ArtifactError(f"{target}: {error}; export it again") from None


def _shared(made: Collection[Artifact]) -> set[str]:
    """Tokenizer files on which all artifacts that have them agree."""
    digests = {name: {a.files[name].sha256 for a in made if name in a.files} for name in TOKENIZER_FILES}
    return {name for name, found in digests.items() if len(found) == 1}


def _folder(target: str, artifact: Artifact, shared: set[str]) -> dict[str, str]:
    """Path in an artifact's folder -> path in the bundle."""
    names = sorted([artifacts.NAME, *artifact.files])
    return {name: _place(target, name, shared=name in shared) for name in names}


def _place(target: str, name: str, shared: bool) -> str:
    return f"{TOKENIZER}/{name}" if shared else f"{ARTIFACTS}/{target}/{name}"


def _copy(source: Path, fresh: Path, folder: Mapping[str, str]) -> None:
    for name, place in folder.items():
        if not (fresh / place).exists():  # a shared file is there after the first artifact
            (fresh / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, fresh / place)


def _describe(fresh: Path, made: Mapping[str, Artifact], folders: Mapping[str, dict[str, str]]) -> Manifest:
    files = {name: artifacts.describe_file(fresh / name) for name in artifacts.files_under(fresh)}
    targets = {target: _part(artifact, folders[target], files) for target, artifact in made.items()}
    draft = Manifest(
        source=_source(next(iter(made.values()))),
        files=files,
        targets=targets,
        bytes=_bytes(files, files),
        digest="0" * 64,
    )
    _require_consistent(draft)
    return draft.model_copy(update={"digest": digest_of(draft)})


def _part(artifact: Artifact, folder: dict[str, str], files: Mapping[str, File]) -> Part:
    size = _bytes(files, folder.values())
    return Part(requires=artifact.requires, recipe=artifact.recipe, folder=folder, bytes=size, golden=artifact.golden)


def _source(artifact: Artifact) -> Source:
    m = artifact.model
    return Source(name=m.source, digest=m.digest, licence=m.licence, family=m.family, parameters=m.source_parameters)


def _bytes(files: Mapping[str, File], names: Iterable[str]) -> int:
    return sum(files[name].bytes for name in names)


def digest_of(manifest: Manifest) -> str:
    """The sha256 that a manifest's `digest` must be: over its compact JSON with sorted keys, without that field."""
    content = manifest.model_dump(mode="json", exclude={"digest"})
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Manifest:
    """Read a manifest that must be the very bytes that `make` writes: no second spelling, no duplicate keys."""
    absent = f"{path.parent} is no bundle: it has no {NAME}; `pocket bundle` makes them"
    manifest = artifacts.read_record(path, Manifest, absent, LARGEST_BUNDLE_MANIFEST)
    try:
        expected, content = digest_of(manifest), artifacts.to_json(manifest).encode()
    except ValueError as error:
        raise ArtifactError(f"{NAME!r} was changed: {error}") from None
    if manifest.digest != expected:
        raise ArtifactError(f"{NAME!r} was changed: its digest is not that of its content")
    if path.read_bytes() != content:
        raise ArtifactError(f"{NAME!r} was changed: it is not spelt as `pocket bundle` writes it")
    return manifest


def _require_consistent(manifest: Manifest) -> None:
    """Refuse paths that could leave the folder or fall together, and fields that contradict each other."""
    _require_apart(manifest.files)
    used: set[str] = set()
    for target, part in manifest.targets.items():
        _require_apart(part.folder)
        for name, place in part.folder.items():
            if place not in (_place(target, name, shared=True), _place(target, name, shared=False)):
                raise ArtifactError(f"{NAME}: {target}: {name!r} cannot lie at {place!r}")
            if place not in manifest.files:
                raise ArtifactError(f"{NAME}: {target}: {place!r} is not among the files")
        if part.bytes != _bytes(manifest.files, part.folder.values()):
            raise ArtifactError(f"{NAME}: {target}: {part.bytes} is not the sum of its files' bytes")
        used.update(part.folder.values())
    if left := sorted(set(manifest.files) - used):
        raise ArtifactError(f"{NAME}: {left[0]!r} belongs to no target")
    if manifest.bytes != _bytes(manifest.files, manifest.files):
        raise ArtifactError(f"{NAME}: {manifest.bytes} is not the sum of the files' bytes")


def _require_apart(names: Iterable[str]) -> None:
    """Refuse two paths that are one on a file system which folds case or composes accents, as phones' do."""
    seen: dict[str, str] = {}
    for name in names:
        artifacts.checked_path(name)
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise ArtifactError(f"{NAME}: {seen[folded]!r} and {name!r} are one path where case does not count")
        seen[folded] = name


def _require_agreement(folder: Path, target: str, part: Part, manifest: Manifest) -> None:
    """Refuse a manifest that says something else than the artifact.json in the bundle."""
    path = _place(target, artifacts.NAME, shared=False)
    if part.folder.get(artifacts.NAME) != path:
        raise ArtifactError(f"{NAME}: {target}: has no {path}")
    artifact = artifacts.load(folder / ARTIFACTS / target)
    files = {name: manifest.files[place] for name, place in part.folder.items() if name != artifacts.NAME}
    same = artifact.files == files and artifact.target == target and _source(artifact) == manifest.source
    if not same or part != _part(artifact, part.folder, manifest.files):
        raise ArtifactError(f"{NAME} and {path} contradict each other")


def _require_free(dest: Path) -> None:
    if dest.exists() and not dest.is_dir():
        raise OutputError(f"{dest} is a file; give a folder that is empty or does not exist")
    if dest.is_dir() and (held := sorted(path.name for path in dest.iterdir())):
        raise OutputError(f"{dest} is not empty (it holds {held[0]}); give an empty or new folder")


@contextmanager
def _renamed_when_whole(dest: Path) -> Iterator[Path]:
    """A fresh folder beside `dest` that gets its name at the end; after an error nothing is left."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    except OSError as error:
        raise OutputError(f"{dest}: {error.strerror}") from None
    try:
        yield fresh
        fresh.chmod(0o755)
        fresh.rename(dest)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "no space left on its disk; free some or choose another -o" if full else error.strerror
        raise OutputError(f"{error.filename or dest}: {why}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
