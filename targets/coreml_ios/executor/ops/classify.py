"""The last operation of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def classify(probabilities: Tensor, classes: Sequence[str | int]) -> tuple[str | int, dict[str | int, float]]:
    """The class of the largest probability, the first of these where several are, and every class's probability."""
    values = probabilities.reshape(-1).tolist()
    by_class = dict(zip(classes, values, strict=True))
    return classes[int(probabilities.argmax())], by_class


OPERATIONS: dict[str, Callable[..., Any]] = {"classify": classify}
