"""N:M pruning: which of M neighbours goes next, how many stay in each layer, and the number of a pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from exporter.errors import WeightError


def without_cheapest(mask: Tensor, cost: Tensor, m: int) -> Tensor:
    """Drop one more of every M neighbours: the kept one that costs least, of equal ones the first.

    Args:
        mask: [out, in], bool, what is kept; at least one in every group.
        cost: [out, in], finite, of dropping each.
        m: Neighbours in a group; divides `in`.

    Returns:
        [out, in], bool: a mask nested in `mask`.
    """
    groups = cost.masked_fill(~mask, torch.inf).view(len(cost), -1, m)
    cheapest = groups.argmin(-1, keepdim=True)  # the first of equal ones
    return mask.view(groups.shape).scatter(-1, cheapest, False).view(mask.shape)


def places_of_mask(mask: Tensor, m: int) -> Tensor:
    """Where in its group of M each kept one stands: [out, kept], uint8, rising within a group.

    Args:
        mask: [out, in], bool, as many kept in every row.
        m: Neighbours in a group.
    """
    return (mask.nonzero()[:, 1] % m).to(torch.uint8).view(len(mask), -1)


def index_bits(n: int, m: int) -> int:
    """Bits that number every way to keep n of m: ceil(log2 C(m, n))."""
    return (math.comb(m, n) - 1).bit_length()


def pattern_numbers(places: Tensor, n: int) -> Tensor:
    """Number the pattern of every group: sum over i of C(place_i, i + 1), the combinatorial number system.

    Args:
        places: [out, groups * n], uint8, rising within a group, each under 16.
        n: Kept in a group.

    Returns:
        [out, groups], int64, each under C(m, n) where places are under m.
    """
    table = torch.tensor([[math.comb(place, i + 1) for i in range(n)] for place in range(16)])
    groups = places.long().view(len(places), -1, n)
    return table[groups, torch.arange(n)].sum(-1)


def pattern_places(numbers: Tensor, n: int, m: int) -> Tensor:
    """The exact inverse of `pattern_numbers`: [out, groups * n], uint8.

    Raises:
        WeightError: no pattern of n:m has such a number.
    """
    if numbers.numel() and int(numbers.max()) >= math.comb(m, n):
        raise WeightError(f"there is no pattern {int(numbers.max())} of {n}:{m}; there are {math.comb(m, n)}")
    return _patterns(n, m)[numbers].flatten(1)


def patterns_of(n: int, m: int, kept: int) -> tuple[int, int]:
    """Bits of a pattern's number, and the patterns in a row that keeps so many columns.

    Raises:
        WeightError: there is no such sparsity, or the columns are no whole groups.
    """
    if not (2 <= m <= 16 and 1 <= n <= m) or kept % n:
        raise WeightError(f"{n}:{m} is not a sparsity of rows that keep {kept} columns")
    return index_bits(n, m), kept // n


def kept_per_layer(
    influence: Sequence[float], sizes: Sequence[int], n: int, low: int, high: int, spread: float
) -> list[int]:
    """How many of M each layer keeps: more where it matters, within the budget of n everywhere.

    x_i = n + spread * (influence_i / mean - 1), clipped to low..high, rounded half up. While the layers together keep
    more than n of M would, the layer that was rounded up most gives one back; then what is left of the budget goes
    where x_i is missed most. A step never makes a layer of less influence keep more than one of greater.

    Args:
        influence: Of each layer, at least 0 on the mean.
        sizes: Weights of each layer that are pruned.
        n: Kept on the mean, low <= n <= high.
        low: Least.
        high: Most.
        spread: How far apart; 0 gives n everywhere.

    Returns:
        A number for each layer, with sum(kept * size) <= n * sum(size), monotone in influence.

    Source: after the description of PBS2P, arXiv:2502.01705, section on coarse-stage search. Differs: its equation is
    not known to us; the target is inferred, the repair of the rounding is ours.
    """
    mean = math.fsum(influence) / len(influence)
    wanted = [n + spread * (value / mean - 1) if mean > 0 else float(n) for value in influence]
    kept = [math.floor(min(max(value, low), high) + 0.5) for value in wanted]
    rising = sorted(range(len(kept)), key=lambda layer: influence[layer])
    left = n * sum(sizes) - sum(map(math.prod, zip(kept, sizes)))
    while left < 0:
        lowest = [next(layer for layer in rising if kept[layer] == count) for count in sorted({*kept} - {low})]
        given = max(lowest, key=lambda layer: kept[layer] - wanted[layer])
        kept[given], left = kept[given] - 1, left + sizes[given]
    while True:
        highest = [next(layer for layer in rising[::-1] if kept[layer] == count) for count in sorted({*kept} - {high})]
        fitting = [layer for layer in highest if sizes[layer] <= left]
        if not fitting:
            return kept
        taken = max(fitting, key=lambda layer: wanted[layer] - kept[layer])
        kept[taken], left = kept[taken] + 1, left - sizes[taken]


@cache
def _patterns(n: int, m: int) -> Tensor:
    """Every way to keep n of m, in the order of its number: [C(m, n), n], uint8."""
    places = torch.tensor(list(combinations(range(m), n)), dtype=torch.uint8)
    return places[pattern_numbers(places, n)[:, 0].argsort()]
