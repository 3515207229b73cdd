"""Pictures of coloured shapes with questions about them: what the multimodal reference model learns and is measured on.

Everything is drawn here from a seed, so nothing is downloaded. A picture's seed is (seed, part, index); the parts
`TRAIN`, `CALIBRATION` and `TEST` never meet, so a test picture is none that training saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TRAIN, CALIBRATION, TEST = range(3)
SIZE, CELLS = 64, 4  # pixels a side; cells a side, at most one shape in each
CELL = SIZE // CELLS
SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = {
    "red": (220, 45, 45),
    "green": (50, 180, 60),
    "blue": (55, 85, 225),
    "yellow": (230, 210, 50),
    "purple": (160, 60, 190),
    "white": (235, 235, 235),
}
NUMBERS = ("zero", "one", "two", "three", "four")
COLUMNS, ROWS = ("a", "b", "c", "d"), ("first", "second", "third", "fourth")
MOST = 4  # shapes in a picture

Pixels = NDArray[np.uint8]


class Thing(NamedTuple):
    """One shape: what it is, and its cell counted from the top left."""

    shape: str
    colour: str
    column: int
    row: int


class Question(NamedTuple):
    """A question whose answer is one word."""

    kind: str
    text: str
    answer: str


class Scene(NamedTuple):
    """What is in a picture, its pixels [SIZE, SIZE, 3], and a question of each kind that it allows, shuffled."""

    things: tuple[Thing, ...]
    pixels: Pixels
    questions: tuple[Question, ...]


def scene(seed: int, part: int, index: int) -> Scene:
    """The picture of one place of one part: the same arguments give the same bytes."""
    rng = np.random.default_rng((seed, part, index))
    things = _things(rng)
    asked = tuple(_questions(things, rng))
    return Scene(things, _draw(things, rng), tuple(asked[place] for place in rng.permutation(len(asked))))


def caption(things: tuple[Thing, ...]) -> str:
    """`first a red square, fourth c blue circle`, row by row."""
    return ", ".join(f"{ROWS[t.row]} {COLUMNS[t.column]} {t.colour} {t.shape}" for t in things)


def _things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One to MOST shapes in different cells, of few kinds, so that counts over one are common."""
    shapes = rng.choice(SHAPES, rng.integers(1, 4), replace=False)
    colours = rng.choice(list(COLOURS), rng.integers(1, 5), replace=False)
    cells = rng.choice(CELLS * CELLS, rng.integers(1, MOST + 1), replace=False)
    return tuple(
        Thing(str(rng.choice(shapes)), str(rng.choice(colours)), int(cell) % CELLS, int(cell) // CELLS)
        for cell in sorted(cells)
    )


def _draw(things: tuple[Thing, ...], rng: np.random.Generator) -> Pixels:
    """Shapes of unequal size and shade, off their cells' centres, on a dark ground, with noise."""
    picture = np.broadcast_to(rng.uniform(0, 60, 3), (SIZE, SIZE, 3)).copy()
    ys, xs = np.mgrid[:SIZE, :SIZE] + 0.5
    for thing in things:
        x, y = (cell * CELL + CELL / 2 + rng.uniform(-1.5, 1.5) for cell in (thing.column, thing.row))
        shade = np.array(COLOURS[thing.colour]) + rng.uniform(-20, 20, 3)
        picture[_inside(thing.shape, xs - x, ys - y, rng.uniform(5, 6.5))] = shade
    return (picture + rng.normal(0, 5, picture.shape)).clip(0, 255).astype(np.uint8)


def _inside(shape: str, dx: NDArray[np.float64], dy: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Which pixels a shape covers, by their distance from its centre."""
    across, along = np.abs(dx), np.abs(dy)
    if shape == "square":
        return np.maximum(across, along) <= 0.9 * radius
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "triangle":
        return (along <= radius) & (across <= (dy + radius) / 2)
    return (np.minimum(across, along) <= 0.3 * radius) & (np.maximum(across, along) <= radius)


def _questions(things: tuple[Thing, ...], rng: np.random.Generator) -> Iterator[Question]:
    """One question of each kind that the picture allows; answers that are rare are asked for more often."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    present = things[rng.integers(len(things))]
    shape, colour = (shape, colour) if rng.random() < 0.4 else (present.shape, present.colour)
    yield Question("count", "how many shapes?", NUMBERS[len(things)])
    yield Question("count shape", f"how many {_plural(shape)}?", NUMBERS[sum(t.shape == shape for t in things)])
    yield Question("count colour", f"how many {colour} ones?", NUMBERS[sum(t.colour == colour for t in things)])
    there = any((t.shape, t.colour) == (shape, colour) for t in things)
    yield Question("exists", f"is there a {colour} {shape}?", "yes" if there else "no")
    yield from _about_one(things, rng)


def _about_one(things: tuple[Thing, ...], rng: np.random.Generator) -> Iterator[Question]:
    """Questions that only make sense of something that is there once."""
    lonely = [thing for thing in things if sum(t.shape == thing.shape for t in things) == 1]
    if lonely:
        thing = lonely[rng.integers(len(lonely))]
        yield Question("colour", f"what colour is the {thing.shape}?", thing.colour)
        yield Question("column", f"which column is the {thing.shape} in?", COLUMNS[thing.column])
        yield Question("row", f"which row is the {thing.shape} in?", ROWS[thing.row])
    lonely = [thing for thing in things if sum(t.colour == thing.colour for t in things) == 1]
    if lonely:
        thing = lonely[rng.integers(len(lonely))]
        yield Question("shape", f"what shape is the {thing.colour} one?", thing.shape)


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"
