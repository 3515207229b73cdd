"""Percentiles of raw samples, and a bootstrap interval that respects which samples were taken together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.artifact import Record

RESAMPLES = 2000
SEED = 0  # the same samples give the same interval


class Statistic(Record):
    """A quantity over its samples.

    `p90` is the bad tail: nine of ten samples were at least as good, be it a time or a rate. `low` and `high` bound the
    95 % bootstrap interval of `p50`; they are None where there was one round only. `n` counts samples.
    """

    unit: str
    p50: float
    p90: float
    low: float | None
    high: float | None
    n: int


def seconds(rounds: Sequence[Sequence[float]]) -> Statistic:
    """Times, in seconds.

    Args:
        rounds: Samples by round, the same number in each, all over 0.
    """
    samples = np.asarray(rounds, dtype=np.float64)  # [rounds, samples]
    p50, p90 = np.percentile(samples, [50, 90])
    low, high = _interval(samples) if len(samples) > 1 else (None, None)
    return Statistic(unit="s", p50=float(p50), p90=float(p90), low=low, high=high, n=samples.size)


def rate(rounds: Sequence[Sequence[float]], work: int, unit: str) -> Statistic:
    """Work per second: the statistics of the seconds, turned over, so that p90 stays the slow tail.

    Args:
        rounds: Seconds by round, the same number in each, all over 0.
        work: Done in each sample.
        unit: Of the result.
    """
    took = seconds(rounds)
    low = None if took.high is None else work / took.high
    high = None if took.low is None else work / took.low
    return Statistic(unit=unit, p50=work / took.p50, p90=work / took.p90, low=low, high=high, n=took.n)


def _interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of the median.

    Whole rounds are drawn, not single samples: those of one round share its clock speed and its neighbours, and
    drawing them apart would make the interval too narrow.

    Args:
        samples: [rounds, samples], at least two rounds.
    """
    generator = np.random.default_rng(SEED)
    draws = generator.integers(len(samples), size=(RESAMPLES, len(samples)))
    medians = [np.median(samples[draw]) for draw in draws]
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)
