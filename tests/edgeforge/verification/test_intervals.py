"""Intervals against SciPy's bootstrap, and how often they hold a mean that is known."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats

from edgeforge.verification.intervals import (
    SEED,
    TokenSums,
    choose_unit,
    divergence_values,
    intervals_of,
    percentile_interval,
    resampled_means,
    resampled_percentile,
    tail_share,
)

BLOCK = 64


def correlated(draw: np.random.Generator, blocks: int, share: float = 0.5) -> np.ndarray:
    """Figures of mean 0 and variance 1, of which a share is common to all tokens of a block."""
    common = draw.normal(size=(blocks, 1)) * np.sqrt(share)
    return common + draw.normal(size=(blocks, BLOCK)) * np.sqrt(1 - share)


def sums_of(values: np.ndarray, **others: np.ndarray) -> TokenSums:
    sums = TokenSums()
    for index, block in enumerate(values):
        named = {name: torch.from_numpy(other[index]) for name, other in others.items()}
        sums.add(len(block), {"x": torch.from_numpy(block)} | named)
    return sums


def interval_of(values: np.ndarray, resamples: int = 4000):
    sums, counts = sums_of(values).units(1)["x"]
    means = resampled_means(sums[:, None], counts[:, None], resamples)[:, 0]
    return percentile_interval(means, tail_share(len(sums)))


@pytest.mark.parametrize("units", [8, 16, 40, 500])
def test_the_share_of_the_tails_is_students_in_the_normal_distribution(units):
    quantile = stats.t.ppf(0.975, units - 1) * np.sqrt(units / (units - 1))
    assert tail_share(units) == pytest.approx(stats.norm.cdf(-quantile), rel=4e-3)


@pytest.mark.parametrize("units", [16, 100])
def test_intervals_are_scipys_percentiles(units):
    draw = np.random.default_rng(units)
    # A ratio of sums, with units of unequal length: what a perplexity is made of.
    counts = draw.integers(20, 60, units).astype(float)
    sums = counts * draw.gamma(2, size=units)
    tail = tail_share(units)
    wanted = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    means = resampled_means(sums[:, None], counts[:, None], 40_000)[:, 0]
    found = percentile_interval(means, tail)
    width = wanted.high - wanted.low
    assert found.low == pytest.approx(wanted.low, abs=0.03 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.03 * width)


@pytest.mark.parametrize("blocks", [8, 16, 64])
def test_intervals_hold_a_known_mean_as_often_as_they_say(blocks):
    draw = np.random.default_rng(blocks)
    held = 0
    for _ in range(400):
        found = interval_of(correlated(draw, blocks), 1000)
        held += found.low <= 0 <= found.high
    # 95 in 100; with 400 trials the count's own standard deviation is 1.1 in 100.
    assert 0.91 <= held / 400 <= 0.985


def test_single_tokens_as_units_would_hold_it_far_less_often():
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        tokens = correlated(draw, 16).reshape(-1, 1)
        means = resampled_means(tokens, np.ones_like(tokens), 500)[:, 0]
        found = percentile_interval(means, tail_share(len(tokens)))
        held += found.low <= 0 <= found.high
    assert held / 200 < 0.6


def test_a_ratio_of_what_is_alike_has_a_narrow_interval():
    draw = np.random.default_rng(6)
    hard = 3 + correlated(draw, 16)
    other = hard + 0.03 + 0.01 * draw.normal(size=hard.shape)
    zeros = torch.zeros(BLOCK, 3)
    shared, artifact = TokenSums(), TokenSums()
    for one, two in zip(hard, other, strict=True):
        losses = torch.from_numpy(one[:-1])
        shared.add(
            BLOCK,
            {"float": losses, "quantized": losses} | divergence_values("quantization", zeros),
        )
        artifact.add(
            BLOCK,
            {"artifact": torch.from_numpy(two[:-1])}
            | divergence_values("lowering", zeros)
            | divergence_values("total", zeros),
        )
    found = intervals_of(shared, artifact)
    ratio = np.exp(other[:, :-1].mean() - hard[:, :-1].mean())
    assert found.perplexity_ratio.low < ratio < found.perplexity_ratio.high
    wide = found.perplexity["float"].high / found.perplexity["float"].low - 1
    narrow = found.perplexity_ratio.high / found.perplexity_ratio.low - 1
    assert narrow < 0.01 * wide
    assert (found.total.kl_mean.low, found.total.kl_mean.high) == (0, 0)


def test_the_same_seed_draws_the_same_units():
    sums, counts = np.random.default_rng(7).normal(size=(20, 2)), np.ones((20, 2))
    first = resampled_means(sums, counts)
    assert (first == resampled_means(sums, counts)).all()
    assert (first != resampled_means(sums, counts, seed=1)).any()
    # Columns of one draw come from the same units.
    twice = resampled_means(np.repeat(sums[:, :1], 2, 1), counts)
    assert (twice[:, 0] == twice[:, 1]).all()


def test_units_are_whole_blocks_joined_where_they_are_many():
    assert [choose_unit(blocks) for blocks in (0, 3, 4, 7, 8, 16, 63)] == [
        None,
        None,
        0.5,
        0.5,
        1,
        1,
        1,
    ]
    assert [choose_unit(blocks) for blocks in (64, 259, 512, 10_000)] == [2, 8, 16, 16]
    assert all(32 <= blocks // choose_unit(blocks) <= 1024 for blocks in range(32, 300_000, 97))


def test_units_add_up_to_the_text():
    values = np.arange(21 * 10, dtype=float).reshape(21, 10)
    sums = sums_of(values, short=values[:, :9])
    for unit, units in ((0.5, 42), (1, 21), (4, 6)):
        for name, given in (("x", values), ("short", values[:, :9])):
            found, counts = sums.units(unit)[name]
            assert len(found) == len(counts) == units
            assert (found.sum(), counts.sum()) == (given.sum(), given.size)
    assert sums.units(4)["x"][0][0] == values[:4].sum()
    assert sums.units(0.5)["x"][0][1] == values[0, 5:].sum()
    assert sums.units(0.5)["short"][1][:2].tolist() == [5, 4]


def test_what_is_not_a_number_gives_no_interval_and_no_warning(recwarn):
    means = resampled_means(np.array([[1.0], [np.nan]] * 8), np.ones((16, 1)))
    found = percentile_interval(means[:, 0], 0.025)
    assert np.isnan(found.low) and np.isnan(found.high) and not recwarn.list


def test_intervals_of_a_long_text_cost_little():
    started = time.process_time()
    resampled_means(np.ones((1024, 12)), np.ones((1024, 12)))
    assert time.process_time() - started < 2


def test_a_percentile_of_drawn_units_is_numpys_of_the_drawn_tokens():
    """Against drawing the same units again and sorting all their tokens."""
    draw = np.random.default_rng(1)
    sizes = draw.integers(200, 300, 12)
    units = np.repeat(np.arange(12), sizes)
    values = draw.exponential(size=sizes.sum()) * (1 + units)
    found = resampled_percentile(values, units, 0.01)
    drawn = np.random.default_rng(SEED).integers(0, 12, (len(found), 12))
    for row in range(0, len(found), 97):
        tokens = np.sort(np.concatenate([values[units == unit] for unit in drawn[row]]))[::-1]
        assert found[row] == tokens[int(np.ceil(0.01 * len(tokens))) - 1]
    assert np.isnan(resampled_percentile(np.array([1.0, np.nan]), np.array([0, 1]), 0.01)).all()
