"""How much a loss would change without a group of weights: its Taylor expansion at the weights, summed up over groups.

Removing a weight w changes the loss by -w g + w^2 h / 2 to second order; the diagonal of the Hessian, h, is taken as
the mean of squared per-sample gradients, F (the diagonal of the empirical Fisher matrix).

Source: LLM-Pruner, arXiv:2305.11627, whose measures are points of this space; AdaPruner, arXiv:2503.06184, searches it.
Differs: the paper's own subspace is not published in detail; this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import torch
from torch import Tensor

Granularity = Literal["coarse", "fine"]
Aggregation = Literal["sum", "mean", "max", "prod", "first"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


@dataclass(frozen=True)
class Metric:
    """One way to count the importance of groups.

    Args:
        granularity: `fine` adds up sizes of the scores of weights, `coarse` takes the size of a row's sum, so that
            the two orders may cancel.
        first, second: 0..1, weights of the first and second order of the expansion.
        weight_power, gradient_power: 0..2, exponents in the first order; 1 and 0 are magnitude.
        aggregation: Over the matrices of a group; `first` is the one that the others hang on (q, gate).
    """

    granularity: Granularity = "fine"
    first: float = 1.0
    second: float = 0.0
    weight_power: float = 1.0
    gradient_power: float = 1.0
    aggregation: Aggregation = "sum"


def weight_scores(weight: Tensor, gradient: Tensor, fisher: Tensor, metric: Metric) -> Tensor:
    """Of each weight: s = c1 |w|^a |g|^b - c2 w^2 F / 2.

    Args:
        weight: [out, in], any float type; computed in float64.
        gradient: [out, in], g, mean over samples.
        fisher: [out, in], F, mean over samples of squared gradients, >= 0.
        metric: c1 = first, c2 = second, a = weight_power, b = gradient_power.

    Returns:
        [out, in], float64, of either sign.
    """
    size = weight.double().abs()
    order_1 = size**metric.weight_power * gradient.double().abs() ** metric.gradient_power
    return metric.first * order_1 - metric.second * 0.5 * size.square() * fisher.double()


def row_scores(scores: Tensor, granularity: Granularity) -> Tensor:
    """Of each row: sum |s| (fine) or |sum s| (coarse); [rows, n] to [rows]."""
    return scores.abs().sum(1) if granularity == "fine" else scores.sum(1).abs()


def group_scores(members: Sequence[Tensor], aggregation: Aggregation) -> Tensor:
    """Of each group, from the scores of its rows in every matrix that it spans.

    Rows of one matrix are added; then matrices are aggregated. A product is taken as a sum of logarithms, so that no
    product of small numbers becomes 0; only the order of the results has a meaning.

    Args:
        members: [groups, rows of a group] of each matrix, >= 0; the number of rows may differ.
        aggregation: Over matrices.

    Returns:
        [groups], float64.

    Source: LLM-Pruner. Differs: it aggregates row by row before it adds the rows of a head; the same for sum and mean,
    and needed here because with grouped queries a head has more rows in q than in k.
    """
    sums = torch.stack([member.double().sum(1) for member in members])  # [matrices, groups]
    match aggregation:
        case "sum":
            return sums.sum(0)
        case "mean":
            return sums.mean(0)
        case "max":
            return sums.amax(0)
        case "prod":
            return sums.log().sum(0)
        case "first":
            return sums[0]
        case _:
            assert_never(aggregation)
