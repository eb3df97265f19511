"""Medians, their spread, and intervals of medians that assume no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

LEVEL: Final = 0.95
LARGEST_SPREAD: Final = 0.05
FEWEST_PAIRS: Final = 6
"""The fewest values whose smallest and largest hold the median 95 times in 100."""


@dataclass(frozen=True)
class Summary:
    """What some runs gave of one figure.

    Attributes:
        median: of the runs.
        smallest: of them.
        largest: of them.
        count: how many runs.
    """

    median: float
    smallest: float
    largest: float
    count: int

    @property
    def spread(self) -> float | None:
        """The largest less the smallest, over the median; None of a single run.

        >>> Summary(100.0, 98.0, 102.0, 5).spread
        0.04
        """
        return (self.largest - self.smallest) / self.median if self.count > 1 else None

    @property
    def is_reliable(self) -> bool:
        """Whether there is a spread, and it is no larger than `LARGEST_SPREAD`."""
        return self.spread is not None and self.spread <= LARGEST_SPREAD


def summarize(values: Sequence[float]) -> Summary | None:
    """Sums up some runs; None where there is none.

    >>> summarize([3.0, 1.0, 2.0])
    Summary(median=2.0, smallest=1.0, largest=3.0, count=3)
    """
    if not values:
        return None
    return Summary(median(values), min(values), max(values), len(values))


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """An interval that holds the median at least 95 times in 100, whatever the distribution is.

    Its ends are values themselves: how many of n values lie below the median is binomial, as heads
    of n coins are (the sign test; Conover, "Practical Nonparametric Statistics", chapter 3).

    Returns:
        None of fewer than six values, which cannot hold it so often.

    >>> median_interval([5, 1, 4, 2, 3, 6]), median_interval([1, 2, 3, 4, 5])
    ((1, 6), None)
    """
    count, outside, place = len(values), 0.0, 0
    while place < count // 2:
        outside += 2 * math.comb(count, place) / 2**count
        if 1 - outside < LEVEL:
            break
        place += 1
    if not place:
        return None
    ordered = sorted(values)
    return ordered[place - 1], ordered[count - place]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one is as the other, by pairs of runs that followed each other.

    Attributes:
        value: the median of the pairs' ratios.
        low: the lower end of its 95 % interval; None of fewer than six pairs.
        high: the upper end.
        pairs: how many.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio | None:
    """The ratio of pairs of figures; None where there is no pair.

    >>> paired_ratio([(2.0, 1.0), (3.0, 1.0), (4.0, 1.0)])
    Ratio(value=3.0, low=None, high=None, pairs=3)
    """
    if not pairs:
        return None
    ratios = [one / other for one, other in pairs]
    low, high = median_interval(ratios) or (None, None)
    return Ratio(median(ratios), low, high, len(ratios))
