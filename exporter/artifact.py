"""artifact.json: what an exported folder says of itself. Read from outside, so checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from exporter.errors import ArtifactError, FileChangedError

NAME = "artifact.json"
LARGEST_MANIFEST = 256 * 2**20  # bytes; a manifest is read whole
R = TypeVar("R", bound="Record")
CHUNK = 2**20  # bytes; everything else is streamed


class Record(BaseModel):
    """A frozen piece of a manifest: unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


TokenId = Annotated[int, Field(ge=0)]


def _from_json(value: Any) -> Any:
    return math.inf if value is None else value


Number = Annotated[  # a result that may be infinite, which JSON cannot say: there it is null
    float,
    BeforeValidator(_from_json),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]


class File(Record):
    """A file: its size, and its sha256 in hexadecimal."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Decision(Record):
    """What a target stores for one site, and why.

    `tree` is the model's, `stored` the artifact's; `native` says that no node was folded.
    """

    site: str
    shape: tuple[int, int]
    tree: str
    stored: str
    native: bool
    reason: str
    bytes: int


class Budget(Record):
    """How far an artifact's logits may lie from its model's, derived from what each leaf does to its input.

    `relative_l2` bounds |a - r| / |r| over the logits of a position; `reason` is the derivation.
    """

    model_config = ConfigDict(allow_inf_nan=False)  # an infinite budget would be a check that cannot fail

    relative_l2: Annotated[float, Field(ge=0)]
    reason: str


class Golden(Record):
    """Answers that travel with an artifact: the model's greedy text, and its largest logits at every step.

    `top[i]` and `logits[i]` are the token ids and logits of the largest few after `prompt + tokens[:i]`; an artifact
    is right where each logit is within `tolerance` (absolute). An encoder has no `tokens`: `top[i]` and `logits[i]` are
    the channels and values of the largest few, by size, of the hidden state at position i of `prompt`.
    """

    model_config = ConfigDict(allow_inf_nan=False)  # an infinite tolerance would be a check that cannot fail

    prompt: Annotated[list[TokenId], Field(min_length=1)]
    tokens: list[TokenId]
    top: Annotated[list[list[TokenId]], Field(min_length=1)]
    logits: list[list[float]]
    tolerance: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _same_steps(self) -> Golden:
        if len(self.top) > (len(self.tokens) + 1 if self.tokens else len(self.prompt)):
            raise ValueError(f"{len(self.top)} steps for {len(self.tokens)} tokens after {len(self.prompt)}")
        if [len(row) for row in self.top] != [len(row) for row in self.logits] or not all(self.top):
            raise ValueError("top and logits differ in shape, or a step has none")
        return self


class Summary(Record):
    """The model inside, as far as a runner must know it; `causal` tells a decoder from an encoder."""

    source: str
    digest: str
    licence: str | None
    family: str
    parameters: Annotated[int, Field(ge=1)]
    source_parameters: Annotated[int, Field(ge=1)]
    vocab: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=2)]
    layers: Annotated[int, Field(ge=1)]
    bos: TokenId | None
    eos: list[TokenId]
    causal: bool = True


class Artifact(Record):
    """One exported folder."""

    format_version: Literal[1] = 1
    target: str
    model: Summary
    recipe: list[dict[str, Any]]
    decisions: list[Decision]
    notes: list[str]
    requires: dict[str, str]
    budget: Budget
    golden: Golden
    files: dict[str, File]

    @model_validator(mode="after")
    def _golden_fits_the_model(self) -> Artifact:
        golden, causal = self.golden, self.model.causal
        if bool(golden.tokens) != causal:
            raise ValueError("a decoder has golden tokens, an encoder has none")
        fed = len(golden.prompt) + (len(golden.top) - 1 if causal else 0)
        named = [golden.prompt, golden.tokens, *golden.top] if causal else [golden.prompt]
        if max(map(max, named)) >= self.model.vocab:
            raise ValueError(f"the golden text has a token that a vocabulary of {self.model.vocab} does not")
        if self.model.bos is not None and self.model.bos >= self.model.vocab:
            raise ValueError(f"BOS token {self.model.bos} is none of a vocabulary of {self.model.vocab}")
        if fed > self.model.context:
            raise ValueError(f"the golden text feeds {fed} tokens; the context is {self.model.context}")
        return self

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, the tokenizer's included, artifact.json apart."""
        return sum(file.bytes for file in self.files.values())

    @property
    def bits_per_weight(self) -> float:
        """File bytes x 8 / parameters of the source (before pruning): masks, scales and embeddings included."""
        return self.file_bytes * 8 / self.model.source_parameters


def save(artifact: Artifact, folder: Path) -> None:
    """Write artifact.json: sorted keys, no dates, so equal artifacts are equal bytes."""
    (folder / NAME).write_text(to_json(artifact), encoding="utf-8")


def to_json(record: Record) -> str:
    """A record as JSON with sorted keys."""
    content = record.model_dump(mode="json")
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def load(folder: Path) -> Artifact:
    """Read a folder's artifact.json.

    Raises:
        ArtifactError: there is none, or it is not of this format.
    """
    return read_record(folder / NAME, Artifact, f"{folder} is no artifact; `pocket export` makes them")


def read_record(path: Path, kind: type[R], absent: str, largest: int = LARGEST_MANIFEST) -> R:
    """Read and check a JSON record of at most `largest` bytes.

    Raises:
        ArtifactError: `absent` where there is no such file; else the first field that is wrong.
    """
    if not path.is_file():
        raise ArtifactError(absent)
    if path.stat().st_size > largest:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {largest}")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {where}: {first['msg']}") from None


def describe_file(path: Path) -> File:
    """Size and sha256 of a file, streamed."""
    return File(bytes=path.stat().st_size, sha256=sha256_of([path]))


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256 in hexadecimal of files read one after another; streamed."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def verify_files(folder: Path, artifact: Artifact) -> None:
    """Compare an artifact's files with what its artifact.json says of them.

    Raises:
        ArtifactError: names the first file, in sorted order, that is changed, missing or added; or a path that leaves
            the folder, a link or a special file.
    """
    compare_files(folder, artifact.files, NAME)


def compare_files(folder: Path, expected: Mapping[str, File], manifest: str) -> None:
    """Compare all files below a folder, the manifest itself apart, with their sizes and digests. Streams.

    Args:
        folder: Where they lie.
        expected: File by relative path.
        manifest: Name of the file that says so.

    Raises:
        ArtifactError: names the first file, in sorted order, that is changed, missing or added; or a path that leaves
            the folder, a link or a special file.
    """
    for name in expected:
        checked_path(name)
    present = set(files_under(folder)) - {manifest}
    for name in sorted(present | set(expected)):
        if name not in expected:
            raise ArtifactError(f"{name!r} was added: {manifest} does not name it")
        if name not in present:
            raise ArtifactError(f"{name!r} is missing: {manifest} names it")
        _compare_file(folder / name, name, expected[name])


def _compare_file(path: Path, name: str, expected: File) -> None:
    size = path.stat().st_size
    if size != expected.bytes:  # before anything is read
        raise FileChangedError(f"{name!r} was changed: it has {size} bytes, not {expected.bytes}")
    found = describe_file(path).sha256
    if found != expected.sha256:
        raise FileChangedError(f"{name!r} was changed: its sha256 is {found}, not {expected.sha256}")


def files_under(folder: Path) -> Iterator[str]:
    """Relative POSIX paths of all files below a folder, sorted.

    Raises:
        ArtifactError: a link or a special file is among them.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(
                f"{path.relative_to(folder).as_posix()!r} is a link or special file; only plain files may be"
            )
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def checked_path(name: str) -> PurePosixPath:
    r"""A manifest's path, refused where it could leave its folder.

    Raises:
        ArtifactError: absolute, empty, or with `..`, `\\` or a drive in it.
    """
    path = PurePosixPath(name)
    parts = name.split("/")
    if path.is_absolute() or any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\:\0"):
        raise ArtifactError(f"path {name!r} leaves its folder; only relative paths below it may be")
    return path
