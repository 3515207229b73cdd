"""Random numbers of a distribution. A seed gives the same numbers each time, but not those that Apple's runtime gives.

A seed of -1, which stands for none, gives others each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from targets.coreml_ios.executor.values import Value, number, require_room, whole, wholes


def bernoulli(shape: Value, prob: Value = 0.5, seed: Value = -1) -> Tensor:
    """1 with probability `prob`, else 0."""
    return torch.bernoulli(torch.full(_sizes(shape), number(prob)), generator=_generator(seed))


def normal(shape: Value, mean: Value = 0.0, stddev: Value = 1.0, seed: Value = -1) -> Tensor:
    """`mean` + stddev N, where N is normal with mean 0 and variance 1."""
    return number(mean) + number(stddev) * torch.randn(_sizes(shape), generator=_generator(seed))


def uniform(shape: Value, low: Value = 0.0, high: Value = 1.0, seed: Value = -1) -> Tensor:
    """`low` + (high - low) U, where U is uniform in [0, 1)."""
    return number(low) + (number(high) - number(low)) * torch.rand(_sizes(shape), generator=_generator(seed))


def categorical(x: Tensor, mode: str = "logits", size: Value = 1, seed: Value = -1) -> Tensor:
    """`size` places of the last axis, drawn with replacement: place i with probability e^x[i] / sum_j e^x[j].

    In the mode `probs`, x[i] itself takes the place of e^x[i].
    """
    if mode not in ("logits", "probs"):
        raise ValueError(f"mode {mode!r} is not one of logits, probs")
    count, places = whole(size), x.shape[-1]
    shares = x.softmax(-1) if mode == "logits" else x
    require_room(x.numel() // max(places, 1) * count)
    drawn = torch.multinomial(shares.reshape(-1, places), count, replacement=True, generator=_generator(seed))
    return drawn.reshape([*x.shape[:-1], count])


def _sizes(shape: Value) -> list[int]:
    sizes = wholes(shape)
    require_room(math.prod(sizes))
    return sizes


def _generator(seed: Value) -> torch.Generator:
    generator, number = torch.Generator(), whole(seed)
    if number == -1:
        generator.seed()
        return generator
    return generator.manual_seed(number)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "random_bernoulli": bernoulli,
    "random_categorical": categorical,
    "random_normal": normal,
    "random_uniform": uniform,
}
