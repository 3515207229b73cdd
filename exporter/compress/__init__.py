"""Compression methods, a file each; a recipe's step finds its own by `kind`.

A new method is a module like those in `METHODS` (see `step.Method`) and one line there; methods do not import each
other. Each returns trees of `exporter.weights`, so that every target takes what any method makes.
"""

from __future__ import annotations

from typing import Any, cast

from exporter.calibrate import Samples
from exporter.compress import adapruner, casp, fasp, pbs2p, quantize, recovery, swsc
from exporter.compress.step import Journal, Method
from exporter.errors import RecipeError
from exporter.model import Model

METHODS: dict[str, Method] = {
    "adapruner": cast(Method, adapruner),
    "casp": cast(Method, casp),
    "fasp": cast(Method, fasp),
    "lora": cast(Method, recovery),
    "pbs2p": cast(Method, pbs2p),
    "quantize": cast(Method, quantize),
    "swsc": cast(Method, swsc),
}


def find(kind: str) -> Method:
    """The method of a step's `kind`.

    Raises:
        RecipeError: there is none.
    """
    if kind not in METHODS:
        raise RecipeError(f"no method named {kind!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[kind]


def needs_calibration(step: Any) -> bool:
    """Whether a step wants calibration samples."""
    return find(step.kind).needs_calibration(step)


def run(model: Model, step: Any, samples: Samples | None, journal: Journal) -> Model:
    """Follow one step of a recipe; see `step.Method.run`."""
    return find(step.kind).run(model, step, samples, journal)


def predict(model: Model, step: Any) -> Model:
    """What a step will make of a model, in shapes; see `step.Method.predict`."""
    return find(step.kind).predict(model, step)
