"""How many bits each layer gets, where all of them together have a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-9  # of the largest influence: a layer that changes nothing has no logarithm


def ideal_bits(influence: Tensor, sizes: Tensor, average: float) -> Tensor:
    """Widths, whatever they are, that minimise `sum_l s_l N_l 4^-b_l` with `sum_l N_l b_l = average * sum_l N_l`.

    b_l = average + 1/2 log2 s_l - 1/2 sum_j (N_j / N) log2 s_j: one more bit for four times the influence, after which
    a bit is worth the same, s_l 4^-b_l, in every layer.

    Args:
        influence: [layers], s; under `LEAST` times the largest it counts as that.
        sizes: [layers], N: weights of a layer, > 0.
        average: Bits a weight.

    Returns:
        [layers], float64; may be fractional, or under 0.

    Source: CASP, arXiv:2503.05936, as reconstructed: its text was not at hand and its released code lists layers by
    hand. That an error falls as 4^-b is the usual model of a uniform grid.
    """
    logarithms = _positive(influence).log2()
    share = sizes.double() / sizes.double().sum()
    return average + logarithms / 2 - (share * logarithms).sum() / 2


def allocated(influence: Tensor, sizes: Sequence[float], levels: Sequence[float], budget: float) -> list[float]:
    """Widths out of a few, from the lowest up, each rise to whoever gains most by it, until the budget is spent.

    A rise from b to b' is worth `s_l N_l (4^-b - 4^-b')` for `N_l (b' - b)` bits. Once a rise does not fit, nobody
    takes it any more: a layer of less influence never gets more bits than one of more. With two levels this gives the
    higher to the most influential layers, as many as the budget holds.

    Args:
        influence: [layers], s.
        sizes: N, numbers of each layer, > 0.
        levels: Widths in bits, rising, at least one.
        budget: Bits of all layers together.

    Returns:
        A level for each layer.

    Raises:
        ValueError: the budget does not hold all layers at the lowest level.

    Source: as `ideal_bits`. Ours: equal gains go to the earlier layer, so runs repeat.
    """
    left = budget - sum(sizes) * levels[0]
    if left < 0:
        raise ValueError(f"{budget} bits do not hold {sum(sizes)} numbers of {levels[0]} bits")
    worth, places = _positive(influence).tolist(), [0] * len(sizes)  # place: of the level that a layer is at
    closed = {len(levels) - 1}  # places from which nobody rises
    while rising := [layer for layer, place in enumerate(places) if place not in closed]:
        best = max(rising, key=lambda layer: worth[layer] * _gain(levels, places[layer]))
        cost = sizes[best] * (levels[places[best] + 1] - levels[places[best]])
        if cost <= left:
            left -= cost
            places[best] += 1
        else:
            closed.add(places[best])
    return [levels[place] for place in places]


def _gain(levels: Sequence[float], place: int) -> float:
    """What a rise from a level to the next saves of 4^-b, a bit of it."""
    before, after = levels[place], levels[place + 1]
    return float((4**-before - 4**-after) / (after - before))


def _positive(influence: Tensor) -> Tensor:
    influence = influence.double()
    return influence.clamp(min=max(float(influence.max()) * LEAST, torch.finfo(torch.float64).tiny))
