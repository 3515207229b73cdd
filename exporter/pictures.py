"""Texts about pictures: JSON lines that name their picture, and the calibration windows that come of them.

A set is a file of lines beside its pictures, PNG or JPEG: {"image": "0001.png", "text": "<image> ..."}. Nothing in it
is trusted: sizes, fields and paths are checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.artifact import checked_path
from exporter.calibrate import Samples
from exporter.errors import ArtifactError, CheckpointError, RecipeError
from exporter.model import Model, Vision
from exporter.pixels import pixels_of, scaling_of, vision_of
from exporter.tokenizer import Tokenizer

SUFFIX = ".jsonl"
LARGEST_LINES = 64 * 2**20  # bytes, of a file of lines
MOST_LINES = 2**20
MOST_NUMBERS = 2**29  # of the pixels of all windows: 2 GiB


@dataclass(frozen=True)
class Line:
    """One line of a set: its number from 1, the picture's path, and its other fields, all text."""

    number: int
    picture: Path
    fields: Mapping[str, str]


def read(path: Path, model: Model, windows: int, length: int, seed: int) -> Samples:
    """Calibration windows of texts that hold a picture each.

    Args:
        path: JSON lines with `image` and `text`, in which one image token stands for the picture.
        model: Whose tokenizer and pictures.
        windows: To draw; a line gives one window, its text cut to `length`.
        length: Tokens of a window, BOS and the picture's places included.
        seed: Of the draw.

    Returns:
        ids [windows, length] and pixels [windows, channels, height, width], in the order of the lines.

    Raises:
        RecipeError: the model sees no pictures; too few lines have that many tokens; a text without its image token.
        CheckpointError: a line or picture that cannot be read, or a model that does not say how it scales pixels.
    """
    vision = vision_of(model)
    if windows < 1 or length <= vision.tokens + 1:
        raise RecipeError(
            f"{windows} windows of {length} tokens are not possible: a picture takes {vision.tokens} tokens, so at "
            f"least 1 window of {vision.tokens + 2}"
        )
    if windows * vision.size**2 * vision.channels > MOST_NUMBERS:
        raise RecipeError(f"{windows} pictures of {vision.size} pixels a side do not fit 2 GiB; ask for fewer")
    tokenizer = Tokenizer.of(model)
    texts = [
        (line, prompt(tokenizer, line.fields["text"], vision, f"{path}, line {line.number}"))
        for line in lines_of(path, ("text",))
    ]
    long = [(line, tokens[:length]) for line, tokens in texts if len(tokens) >= length]
    if len(long) < windows:
        raise RecipeError(
            f"{path}: {len(long)} of {len(texts)} texts have {length} tokens; {windows} windows of that length are "
            "asked for: ask for fewer or shorter ones"
        )
    chosen = [long[place] for place in _drawn(len(long), windows, seed)]
    scaling = scaling_of(model)
    pixels = torch.stack([pixels_of(line.picture, vision, scaling) for line, _ in chosen])
    return Samples(torch.tensor([tokens for _, tokens in chosen]), pixels)


def prompt(tokenizer: Tokenizer, text: str, vision: Vision, name: str) -> list[int]:
    """Tokens of a text, BOS first, in which the image token is there once for every place that the picture takes.

    Raises:
        RecipeError: the text holds no image token, or several; `name` says which text.
    """
    tokens = tokenizer.encode(text)
    found = tokens.count(vision.token)
    if found != 1:
        word = tokenizer.word(vision.token)
        raise RecipeError(f"{name}: the text holds {found} image tokens; put {word!r} once where the picture belongs")
    place = tokens.index(vision.token)
    return [*tokens[:place], *[vision.token] * vision.tokens, *tokens[place + 1 :]]


def lines_of(path: Path, names: Sequence[str]) -> list[Line]:
    """The lines of a set; fields beside `image` and `names` are passed on where they are text.

    Raises:
        CheckpointError: no such file, too large, or a line that is no object with these fields, or whose picture is
            not there or lies outside of the file's folder.
    """
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    if path.stat().st_size > LARGEST_LINES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_LINES} are read")
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if len(rows) > MOST_LINES:
        raise CheckpointError(f"{path} has {len(rows)} lines; at most {MOST_LINES} are read")
    found = [_line(path, number, row, names) for number, row in enumerate(rows, 1) if row.strip()]
    if not found:
        raise CheckpointError(f"{path} has no lines")
    return found


def _line(path: Path, number: int, row: str, names: Sequence[str]) -> Line:
    where = f"{path}, line {number}"
    try:
        value = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds no JSON object")
    for name in ("image", *names):
        if not isinstance(value.get(name), str):
            raise CheckpointError(f"{where}: {name!r} is {str(value.get(name))[:60]!r}; it must be text")
    fields = {name: text for name, text in value.items() if name != "image" and isinstance(text, str)}
    return Line(number, _picture(path.parent, value["image"], where), fields)


def _picture(folder: Path, name: str, where: str) -> Path:
    """A picture's path, which may not leave the folder, not by a link either."""
    try:
        picture = folder / checked_path(name)
    except ArtifactError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        is_there, is_inside = picture.is_file(), picture.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a name too long, one that is no Unicode, a link to itself
        is_there = False
    if not is_there:
        raise CheckpointError(f"{where}: there is no picture {name[:200]!r}")
    if not is_inside:
        raise CheckpointError(f"{where}: picture {name!r} is a link that leaves its folder")
    return picture


def _drawn(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `count` places, each at most once, rising."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    return sorted(order)
