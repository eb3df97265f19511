"""Medians, spreads and intervals, held against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from device_harness.measuring.statistics import (
    FEWEST_PAIRS,
    median_interval,
    paired_ratio,
    summarize,
)


@pytest.mark.parametrize("count", [*range(1, 31), 100, 501])
def test_intervals_of_the_median_are_those_of_scipys_quantile_test(count):
    values = np.random.default_rng(count).exponential(size=count)
    found = median_interval(list(values))
    if count < FEWEST_PAIRS:
        assert found is None
        return
    theirs = stats.quantile_test(values, q=1, p=0.5).confidence_interval(0.95)
    assert found == pytest.approx((theirs.low, theirs.high))


def test_they_hold_the_median_95_times_in_100_though_nothing_is_normal():
    draw, held = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = median_interval(list(draw.lognormal(sigma=2, size=9)))
        held += low <= 1 <= high
    assert held / 2000 > 0.945


@pytest.mark.parametrize(
    ("values", "spread", "reliable"),
    [
        ([100.0], None, False),  # of one run nothing is known
        ([100.0, 100.0], 0.0, True),
        ([97.6, 100.0, 102.5], 0.049, True),
        ([97.0, 100.0, 102.5], 0.055, False),
    ],
)
def test_a_spread_over_five_percent_is_unreliable(values, spread, reliable):
    found = summarize(values)
    assert found.spread == (None if spread is None else pytest.approx(spread))
    assert found.is_reliable is reliable


def test_a_ratio_is_the_median_of_pairs_and_not_of_medians():
    # Heat halves both within the series; each pair still says 2.
    slow = [100.0, 90.0, 80.0, 70.0, 60.0, 50.0]
    found = paired_ratio([(2 * each, each) for each in slow])
    assert (found.value, found.low, found.high, found.pairs) == (2.0, 2.0, 2.0, 6)
    assert paired_ratio([]) is None
